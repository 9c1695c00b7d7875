"""Writes a tiny model of a family as llama.cpp's converter would.

Conventions (convert_hf_to_gguf.py): LlamaModel and its heirs permute the rows
of q and k, Gemma's norms are stored with their 1 added, rotary divisors are
tensors, Phi-3's fused gate and up is called ffn_up. Which fields an
architecture has is what its class there writes.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {'gemma3_text': 'gemma3'}
_NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.qkv_proj': 'attn_qkv',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.gate_up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
_POST_NORMED = {
  'post_attention_layernorm': 'post_attention_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'post_feedforward_layernorm': 'post_ffw_norm',
}


def permute(w: np.ndarray, heads: int) -> np.ndarray:
  """Rotary halves side by side: rows 0, n/2, 1, n/2 + 1, ... of every head."""
  half = w.shape[0] // heads // 2
  order = [
    (2 * head + part) * half + i
    for head in range(heads)
    for i in range(half)
    for part in (0, 1)
  ]
  return w[order]


def name(tensor: str, arch: str) -> str:
  """llama.cpp's name of a Hugging Face tensor."""
  module, kind = tensor.rsplit('.', 1)
  layer = re.match(r'model\.layers\.(\d+)\.', module)
  inner = module[layer.end() :] if layer else module
  names = dict(_NAMES)
  if arch in ('gemma2', 'gemma3', 'olmo2'):
    names |= _POST_NORMED
  at = f'blk.{layer[1]}.' if layer else ''
  return f'{at}{names[inner]}.{kind}'


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
  """What each pair's frequency is divided by (convert_hf_to_gguf.py)."""
  out = []
  original = rope['original_max_position_embeddings']
  low, high = rope['low_freq_factor'], rope['high_freq_factor']
  for i in range(0, head_dim, 2):
    wave = 2 * math.pi * rope['rope_theta'] ** (i / head_dim)
    if wave < original / high:
      out.append(1.0)
    elif wave > original / low:
      out.append(rope['factor'])
    else:
      smooth = (original / wave - low) / (high - low)
      out.append(1 / ((1 - smooth) / rope['factor'] + smooth))
  return np.float32(out)


def write(
  path: Path,
  config: dict[str, Any],
  tensors: dict[str, np.ndarray],
  kind: str = 'F32',
  raw: Mapping[str, tuple[np.ndarray, Any]] | None = None,
  more: Mapping[str, Any] | None = None,
) -> Path:
  """The model in one file; matrices stored as `kind`, the rest as F32.

  raw holds tensors that are packed already, and their storage types; more,
  metadata beyond the converter's.
  """
  raw = {name(k, config['model_type']): v for k, v in (raw or {}).items()}
  model_type = config['model_type']
  arch = 'llama' if model_type == 'mistral' else model_type
  arch = ARCHITECTURES.get(arch, arch)
  heads = config['num_attention_heads']
  head = config.get('head_dim', config['hidden_size'] // heads)
  rope = config.get('rope_parameters', {'rope_theta': 10000.0})
  local = rope.get('sliding_attention', {})
  rope = rope.get('full_attention', rope)
  writer = gguf.GGUFWriter(path, arch)
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(heads)
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  writer.add_rope_freq_base(rope['rope_theta'])
  writer.add_file_type(0)
  if 'head_dim' in config:
    writer.add_key_length(head)
    writer.add_value_length(head)
  if arch in ('llama', 'smollm3', 'granite', 'phi3'):
    share = rope.get('partial_rotary_factor', 1.0)
    writer.add_rope_dimension_count(int(head * share))
  if arch in ('llama', 'smollm3', 'granite'):
    writer.add_vocab_size(config['vocab_size'])
  if local:
    writer.add_rope_freq_base_swa(local['rope_theta'])
  tokens = ['<unk>', '<s>', '</s>', 'a', 'b', 'ab']
  tokens += [f't{n}' for n in range(len(tokens), config['vocab_size'])]
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('qwen2')
  writer.add_token_list(tokens)
  writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
  writer.add_token_merges(['a b'])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_pad_token_id(0)
  extra = {}
  scaling = rope.get('rope_type', 'default')
  if scaling == 'linear':
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope['factor'])
  if scaling == 'yarn':
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope['factor'])
    writer.add_rope_scaling_orig_ctx_len(
      rope['original_max_position_embeddings']
    )
    for key, add in (
      ('attention_factor', writer.add_rope_scaling_yarn_attn_factor),
      ('beta_fast', writer.add_rope_scaling_yarn_beta_fast),
      ('beta_slow', writer.add_rope_scaling_yarn_beta_slow),
    ):
      if key in rope:
        add(rope[key])
  if scaling == 'llama3':
    extra['rope_freqs.weight'] = llama3_divisors(rope, head)
  if scaling == 'longrope':
    original = config['original_max_position_embeddings']
    factor = config['max_position_embeddings'] / original
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(
      math.sqrt(1 + math.log(factor) / math.log(original))
    )
    for n in ('short', 'long'):
      extra[f'rope_factors_{n}.weight'] = np.float32(rope[f'{n}_factor'])
  if arch in ('gemma2', 'gemma3', 'phi3'):
    writer.add_sliding_window(config.get('sliding_window') or 0)
  if arch == 'gemma2':
    writer.add_attn_logit_softcapping(config['attn_logit_softcapping'])
    writer.add_final_logit_softcapping(config['final_logit_softcapping'])
  if arch == 'granite':
    writer.add_attention_scale(config['attention_multiplier'])
    writer.add_embedding_scale(config['embedding_multiplier'])
    writer.add_residual_scale(config['residual_multiplier'])
    writer.add_logit_scale(config['logits_scaling'])
  for key, value in (more or {}).items():
    kind_of = gguf.GGUFValueType.get_type(value)
    writer.add_key_value(f'{arch}.{key}', value, kind_of)
  for key, w in tensors.items():
    if arch in ('llama', 'smollm3', 'granite'):
      if '.q_proj.' in key:
        w = permute(w, heads)
      if '.k_proj.' in key:
        w = permute(w, config['num_key_value_heads'])
    if arch.startswith('gemma') and key.endswith('norm.weight'):
      w = w + np.float32(1)
    extra[name(key, arch)] = w
  for key, w in extra.items():
    if key in raw:
      packed, stored = raw[key]
      writer.add_tensor(key, packed, raw_dtype=stored)
      continue
    stored = gguf.GGMLQuantizationType[kind if w.ndim == 2 else 'F32']
    writer.add_tensor(key, gguf.quantize(w, stored), raw_dtype=stored)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path
