"""A GGUF file's metadata as the `config.json` of the same Llama model."""

from typing import Any

import numpy as np

from qdora_jax.interop.gguf_header import Header

_EMBEDDING = 'token_embd.weight'


def build(header: Header, path: str) -> dict[str, Any]:
  """What Hugging Face's `config.json` of this model would hold.

  Args:
    header: of the file.
    path: the file, for error messages.

  Raises:
    ValueError: another architecture than llama, metadata that every Llama has
      is missing, or some is there that a plain Llama does not have.
  """
  fields, tensors = header.fields, header.tensors

  def field(key: str) -> Any:
    if key not in fields:
      raise ValueError(
        f'{path}: metadata {key!r} is missing; it has {sorted(fields)}.'
        ' Convert the model again with a current llama.cpp'
      )
    return fields[key]

  arch = field('general.architecture')
  if arch != 'llama':
    raise ValueError(
      f"{path}: architecture {arch!r} is not supported, expected 'llama'. Load"
      " the model's Hugging Face directory instead"
    )
  if _EMBEDDING not in tensors:
    raise ValueError(
      f'{path}: no tensor {_EMBEDDING!r}; it has {len(tensors)} others. Is it'
      ' one part of several? Join them with llama-gguf-split --merge'
    )
  heads = kv_heads = field('llama.attention.head_count')
  width = field('llama.embedding_length')
  head_dim = width // heads
  # ggml docs/gguf.md: absent means no grouped queries, and width / heads.
  if 'llama.attention.head_count_kv' in fields:
    kv_heads = fields['llama.attention.head_count_kv']
  if 'llama.attention.key_length' in fields:
    head_dim = fields['llama.attention.key_length']
  _expect_plain(fields, head_dim, path)
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': tensors[_EMBEDDING].shape[0],
    'hidden_size': width,
    'intermediate_size': field('llama.feed_forward_length'),
    'num_hidden_layers': field('llama.block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'head_dim': head_dim,
    # llama.cpp's llama graph has no other activation.
    'hidden_act': 'silu',
    'attention_bias': 'blk.0.attn_q.bias' in tensors,
    'mlp_bias': 'blk.0.ffn_up.bias' in tensors,
    'max_position_embeddings': field('llama.context_length'),
    'rms_norm_eps': _shortest(field('llama.attention.layer_norm_rms_epsilon')),
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': _shortest(field('llama.rope.freq_base')),
    },
    'tie_word_embeddings': 'output.weight' not in tensors,
    'bos_token_id': _token_id(fields, 'bos'),
    'eos_token_id': _token_id(fields, 'eos'),
    'pad_token_id': _token_id(fields, 'padding'),
    'dtype': 'float32',
  }


def _expect_plain(fields: dict[str, Any], head_dim: int, path: str) -> None:
  """Refuses what the config above has no words for."""
  plain = {
    'llama.attention.value_length': head_dim,
    'llama.rope.dimension_count': head_dim,
    'llama.rope.scaling.type': 'none',
    'llama.rope.scale_linear': 1.0,
    'llama.expert_count': 0,
  }
  for key, value in plain.items():
    if key in fields and fields[key] != value:
      raise ValueError(
        f'{path}: {key} is {fields[key]!r}, expected {value!r}. Load the'
        " model's Hugging Face directory instead"
      )


def _token_id(fields: dict[str, Any], role: str) -> int | None:
  """The id of a special token; None, as in config.json, if it has none."""
  key = f'tokenizer.ggml.{role}_token_id'
  if key not in fields:
    return None
  return fields[key]


def _shortest(value: float) -> float:
  """A float32 of the file as config.json spells it: 9.9999997e-06 -> 1e-05."""
  return float(str(np.float32(value)))
