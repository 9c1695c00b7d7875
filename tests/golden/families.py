"""A tiny model of every family: config.json and random weights.

Shapes follow Hugging Face's modules, not ours. Windows are shorter than the
prompt, pretraining lengths too, and every multiplier is away from 1, so that
what is left out shows in the logits.
"""

import zlib
from typing import Any

import numpy as np

from golden import weights

VOCAB, WIDTH, FF, LAYERS, HEADS, KV_HEADS = 64, 64, 128, 4, 4, 2
_COMMON = {
  'hidden_size': WIDTH,
  'intermediate_size': FF,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': HEADS,
  'num_key_value_heads': KV_HEADS,
  'vocab_size': VOCAB,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-5,
  'bos_token_id': 1,
  'eos_token_id': 2,
  # torch keeps the embedding of a padding token from learning.
  'pad_token_id': None,
  'dtype': 'float32',
}
_SLIDING, _FULL = 'sliding_attention', 'full_attention'
_LONG = {
  'rope_type': 'longrope',
  'rope_theta': 10000.0,
  'partial_rotary_factor': 0.5,
  'short_factor': [1.0, 1.1, 1.3, 1.6],
  'long_factor': [1.5, 2.0, 3.0, 4.0],
}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
  rope = {'rope_type': kind, 'rope_theta': 50000.0, **settings}
  return {'rope_parameters': rope}


CONFIGS: dict[str, dict[str, Any]] = {
  'llama2': {
    'model_type': 'llama',
    'num_key_value_heads': HEADS,
    'hidden_act': 'silu',
    'rope_theta': 10000.0,
    'rope_scaling': None,
    'torch_dtype': 'float32',
    'tie_word_embeddings': False,
  },
  'llama3': {
    'model_type': 'llama',
    'tie_word_embeddings': True,
    'mlp_bias': True,
    **_rope(
      'llama3',
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=16,
    ),
  },
  'llama_linear': {
    'model_type': 'llama',
    'tie_word_embeddings': True,
    **_rope('linear', factor=4.0),
  },
  'llama_yarn': {
    'model_type': 'llama',
    'tie_word_embeddings': True,
    **_rope('yarn', factor=4.0, original_max_position_embeddings=16),
  },
  'mistral': {
    'model_type': 'mistral',
    'head_dim': 24,
    'sliding_window': 6,
    'tie_word_embeddings': False,
    **_rope('default'),
  },
  'qwen2': {
    'model_type': 'qwen2',
    'tie_word_embeddings': True,
    'use_sliding_window': True,
    'sliding_window': 6,
    'max_window_layers': 2,
    **_rope('default'),
  },
  'qwen3': {
    'model_type': 'qwen3',
    'head_dim': 24,
    'tie_word_embeddings': False,
    'attention_bias': True,
    **_rope(
      'yarn',
      factor=4.0,
      original_max_position_embeddings=16,
      beta_fast=8.0,
      mscale=1.0,
      mscale_all_dim=0.5,
    ),
  },
  'gemma2': {
    'model_type': 'gemma2',
    'head_dim': 24,
    'query_pre_attn_scalar': 20,
    'sliding_window': 6,
    'attn_logit_softcapping': 2.0,
    'final_logit_softcapping': 3.0,
    'hidden_activation': 'gelu_pytorch_tanh',
    'tie_word_embeddings': True,
    **_rope('default'),
  },
  'gemma3': {
    'model_type': 'gemma3_text',
    'head_dim': 24,
    'query_pre_attn_scalar': 20,
    'sliding_window': 6,
    'layer_types': [_SLIDING, _FULL, _SLIDING, _FULL],
    'tie_word_embeddings': True,
    'rope_parameters': {
      _FULL: {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
      _SLIDING: {'rope_type': 'default', 'rope_theta': 10000.0},
    },
  },
  # The prompt is shorter than what LongRoPE's short factors are for.
  'phi3': {
    'model_type': 'phi3',
    'tie_word_embeddings': False,
    'sliding_window': 6,
    'rope_parameters': _LONG,
    'original_max_position_embeddings': 32,
  },
  # And longer.
  'phi3_long': {
    'model_type': 'phi3',
    'tie_word_embeddings': True,
    'rope_parameters': _LONG,
    'original_max_position_embeddings': 16,
  },
  'olmo2': {
    'model_type': 'olmo2',
    'tie_word_embeddings': False,
    **_rope('default'),
  },
  'smollm3': {
    'model_type': 'smollm3',
    'tie_word_embeddings': True,
    'no_rope_layers': [1, 0, 1, 0],
    'no_rope_layer_interval': 2,
    'layer_types': [_FULL] * LAYERS,
    **_rope('default'),
  },
  'granite': {
    'model_type': 'granite',
    'tie_word_embeddings': True,
    'embedding_multiplier': 5.0,
    'attention_multiplier': 0.2,
    'residual_multiplier': 0.4,
    'logits_scaling': 3.0,
    **_rope('default'),
  },
}

# What llama.cpp's converter does not write, as its files then say it: Gemma's
# scale of scores is that of the layer's heads, its pattern and SmolLM3's are
# those of the published models; Mistral's and Qwen's windows are gone, and
# YaRN's mscale.
AS_GGUF: dict[str, dict[str, Any]] = {
  'gemma2': {'query_pre_attn_scalar': 24},
  'gemma3': {'query_pre_attn_scalar': 24, 'layer_types': None},
  'smollm3': {'no_rope_layers': None, 'no_rope_layer_interval': 4},
  'mistral': {'sliding_window': None},
  'qwen2': {'use_sliding_window': False},
  'qwen3': _rope(
    'yarn', factor=4.0, original_max_position_embeddings=16, beta_fast=8.0
  ),
}


def as_gguf(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The same model, as far as a GGUF file can tell it."""
  config, tensors = make(name)
  if name in AS_GGUF:
    config |= AS_GGUF[name]
  return config, tensors


def make(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The config.json and the tensors of one of CONFIGS."""
  config = {**_COMMON, **CONFIGS[name]}
  family = config['model_type']
  head = config['head_dim'] if 'head_dim' in config else WIDTH // HEADS
  q, kv = HEADS * head, config['num_key_value_heads'] * head
  fused = family == 'phi3'
  gemma = family.startswith('gemma')
  modules = {'self_attn.o_proj': (WIDTH, q), 'mlp.down_proj': (WIDTH, FF)}
  if fused:
    modules['self_attn.qkv_proj'] = (q + 2 * kv, WIDTH)
    modules['mlp.gate_up_proj'] = (2 * FF, WIDTH)
  else:
    modules |= {f'self_attn.{n}_proj': (kv, WIDTH) for n in 'kv'}
    modules |= {f'mlp.{n}_proj': (FF, WIDTH) for n in ('gate', 'up')}
    modules['self_attn.q_proj'] = (q, WIDTH)
  norms = {'post_attention_layernorm': WIDTH}
  if family != 'olmo2':
    norms['input_layernorm'] = WIDTH
  if gemma:
    norms['pre_feedforward_layernorm'] = WIDTH
  if gemma or family == 'olmo2':
    norms['post_feedforward_layernorm'] = WIDTH
  if family in ('qwen3', 'gemma3_text'):
    norms |= {'self_attn.q_norm': head, 'self_attn.k_norm': head}
  if family == 'olmo2':
    norms |= {'self_attn.q_norm': q, 'self_attn.k_norm': kv}
  biased = ()
  if family == 'qwen2':
    biased = tuple(f'self_attn.{n}_proj' for n in 'qkv')
  if 'attention_bias' in config and config['attention_bias']:
    biased = tuple(f'self_attn.{n}_proj' for n in 'qkvo')
  if 'mlp_bias' in config and config['mlp_bias']:
    biased += tuple(f'mlp.{n}_proj' for n in ('gate', 'up', 'down'))
  rng = np.random.RandomState(zlib.crc32(name.encode()))

  def normal(*shape: int, scale: float, mean: float = 0.0) -> np.ndarray:
    return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

  mean = 0.0 if gemma else 1.0
  tensors = {'model.embed_tokens.weight': normal(VOCAB, WIDTH, scale=0.3)}
  for layer in range(LAYERS):
    at = f'model.layers.{layer}.'
    for module, (o, i) in modules.items():
      tensors[f'{at}{module}.weight'] = normal(o, i, scale=1.5 * i**-0.5)
      if module in biased:
        tensors[f'{at}{module}.bias'] = normal(o, scale=0.2)
    for module, n in norms.items():
      tensors[f'{at}{module}.weight'] = normal(n, scale=0.1, mean=mean)
  tensors['model.norm.weight'] = normal(WIDTH, scale=0.1, mean=mean)
  if not config['tie_word_embeddings']:
    tensors['lm_head.weight'] = normal(VOCAB, WIDTH, scale=WIDTH**-0.5)
  return config, tensors


def prompt() -> np.ndarray:
  """Tokens [2, 20] whose logits are kept."""
  return weights.batches(5, VOCAB, 1, 2, 20)[0]
