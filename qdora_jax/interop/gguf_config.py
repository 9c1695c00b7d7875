"""A GGUF file's metadata as the `config.json` of the same model.

llama.cpp's converter leaves out what its own code knows by heart; where it
does, a constant below says so.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from qdora_jax import paths
from qdora_jax.interop.gguf_header import Header

_EMBEDDING = 'token_embd.weight'
# general.architecture -> (model_type, class of transformers).
ARCHITECTURES = {
  'llama': ('llama', 'LlamaForCausalLM'),
  'qwen2': ('qwen2', 'Qwen2ForCausalLM'),
  'qwen3': ('qwen3', 'Qwen3ForCausalLM'),
  'gemma2': ('gemma2', 'Gemma2ForCausalLM'),
  'gemma3': ('gemma3_text', 'Gemma3ForCausalLM'),
  'phi3': ('phi3', 'Phi3ForCausalLM'),
  'olmo2': ('olmo2', 'Olmo2ForCausalLM'),
  'smollm3': ('smollm3', 'SmolLM3ForCausalLM'),
  'granite': ('granite', 'GraniteForCausalLM'),
}
# llama.cpp's graphs: Gemma 3's local layers turn by this base, and every sixth
# layer sees all; every fourth of SmolLM3's does not turn.
_GEMMA3_LOCAL_THETA, _GEMMA3_PATTERN, _SMOLLM3_INTERVAL = 1e4, 6, 4
# llama.cpp: layers of the 27B models of Gemma 2 and 3, which scale scores by
# width / heads; all others by the size of a head.
_GEMMA_27B = {'gemma2': 46, 'gemma3': 62}


def build(
  header: Header, read: Callable[[str], np.ndarray], path: str
) -> dict[str, Any]:
  """What Hugging Face's `config.json` of this model would hold.

  Args:
    header: of the file.
    read: gives one of its tensors, by llama.cpp's name.
    path: the file, for error messages.

  Raises:
    ValueError: for an architecture that is not supported (naming the nearest),
      for metadata that is missing, or that says what is not supported.
  """
  return _Builder(header, read, path).build()


class _Builder:
  """The metadata of one file, under the keys of its architecture."""

  def __init__(
    self, header: Header, read: Callable[[str], np.ndarray], path: str
  ):
    self.fields, self.tensors = header.fields, header.tensors
    self.read, self.path = read, path
    self.arch = self.field('general.architecture')
    if not isinstance(self.arch, str) or self.arch not in ARCHITECTURES:
      raise ValueError(
        f'{path}: architecture {self.arch!r} is not supported; near: '
        f'{", ".join(paths.near(str(self.arch), ARCHITECTURES))}. Load the '
        "model's Hugging Face directory instead"
      )

  def field(self, key: str) -> Any:
    """A field that must be there."""
    if key not in self.fields:
      raise ValueError(
        f'{self.path}: metadata {key!r} is missing; it has '
        f'{sorted(self.fields)}. Convert the model again with a current '
        'llama.cpp'
      )
    return self.fields[key]

  def need(self, key: str, kind: type = int) -> Any:
    """A field of the architecture's: a whole number above 0, or a number."""
    return self._typed(f'{self.arch}.{key}', kind)

  def take(self, key: str, default: Any, kind: type = int) -> Any:
    """The same, or a default where it is absent."""
    name = f'{self.arch}.{key}'
    return self._typed(name, kind) if name in self.fields else default

  def _typed(self, name: str, kind: type) -> Any:
    value = self.field(name)
    if kind is float and type(value) is float and np.isfinite(value):
      return _shortest(value)
    if kind is not float and type(value) is kind and value > 0:
      return value
    raise ValueError(
      f'{self.path}: {name} is {str(value)[:40]!r}, expected '
      f'{"a number" if kind is float else "a whole number above 0"}. Load the '
      "model's Hugging Face directory instead"
    )

  def build(self) -> dict[str, Any]:
    if _EMBEDDING not in self.tensors:
      raise ValueError(
        f'{self.path}: no tensor {_EMBEDDING!r}; it has {len(self.tensors)} '
        'others. Is it one part of several? Join them with llama-gguf-split '
        '--merge'
      )
    if len(self.tensors[_EMBEDDING].shape) != 2:
      raise ValueError(
        f'{self.path}: {_EMBEDDING} is {self.tensors[_EMBEDDING].shape}, '
        'expected (tokens, width). Download the file again'
      )
    model_type, architecture = ARCHITECTURES[self.arch]
    heads, width = (
      self.need('attention.head_count'),
      self.need('embedding_length'),
    )
    # ggml docs/gguf.md: absent means no grouped queries, and width / heads.
    head_dim = self.take('attention.key_length', width // heads)
    config = {
      'architectures': [architecture],
      'model_type': model_type,
      'vocab_size': self.tensors[_EMBEDDING].shape[0],
      'hidden_size': width,
      'intermediate_size': self.need('feed_forward_length'),
      'num_hidden_layers': self.need('block_count'),
      'num_attention_heads': heads,
      'num_key_value_heads': self.take('attention.head_count_kv', heads),
      'head_dim': head_dim,
      'max_position_embeddings': self.need('context_length'),
      'rms_norm_eps': self.need('attention.layer_norm_rms_epsilon', float),
      'rope_parameters': self._rope(head_dim),
      'tie_word_embeddings': 'output.weight' not in self.tensors,
      'bos_token_id': self._token_id('bos'),
      'eos_token_id': self._token_id('eos'),
      'pad_token_id': self._token_id('padding'),
      'dtype': 'float32',
    }
    self._expect('attention.value_length', head_dim)
    self._expect('expert_count', 0)
    return config | self._more(config)

  def _more(self, config: dict[str, Any]) -> dict[str, Any]:
    """What one architecture has and the others have not."""
    biases = {
      'attention_bias': 'blk.0.attn_q.bias' in self.tensors,
      'mlp_bias': 'blk.0.ffn_up.bias' in self.tensors,
    }
    # llama.cpp's graphs have no other activation.
    more: dict[str, Any] = {'hidden_act': 'silu'}
    if self.arch in ('gemma2', 'gemma3'):
      scalar = config['head_dim']
      if config['num_hidden_layers'] == _GEMMA_27B[self.arch]:
        scalar = config['hidden_size'] // config['num_attention_heads']
      more = {
        'hidden_activation': 'gelu_pytorch_tanh',
        'query_pre_attn_scalar': scalar,
        'sliding_window': self.take('attention.sliding_window', 4096),
        'attn_logit_softcapping': None,
        'final_logit_softcapping': None,
      }
      for key in ('attn_logit_softcapping', 'final_logit_softcapping'):
        more[key] = self.take(key, None, float)
    if self.arch == 'gemma2':
      caps = {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
      more |= {k: v for k, v in caps.items() if more[k] is None}
    if self.arch == 'gemma3':
      more['sliding_window_pattern'] = _GEMMA3_PATTERN
    if self.arch in ('llama', 'smollm3', 'granite'):
      more |= biases
    if self.arch in ('qwen3', 'olmo2'):
      more['attention_bias'] = biases['attention_bias']
    if self.arch == 'phi3':
      # llama.cpp writes 0 for Phi-4, which has none.
      off = ('phi3.attention.sliding_window', 0) in self.fields.items()
      window = None if off else self.take('attention.sliding_window', None)
      more['sliding_window'] = window
    if self.arch == 'smollm3':
      more['no_rope_layer_interval'] = _SMOLLM3_INTERVAL
    if self.arch == 'granite':
      more |= {
        'attention_multiplier': self.need('attention.scale', float),
        'embedding_multiplier': self.take('embedding_scale', 1.0, float),
        'residual_multiplier': self.take('residual_scale', 1.0, float),
        'logits_scaling': self.need('logit_scale', float),
      }
    return more

  def _rope(self, head_dim: int) -> dict[str, Any]:
    """Rotary settings; divisors that the file holds become LongRoPE's."""
    theta = self.take('rope.freq_base', 10000.0, float)
    rope: dict[str, Any] = {'rope_type': 'default', 'rope_theta': theta}
    width = self.take('rope.dimension_count', head_dim)
    if width != head_dim:
      if self.arch != 'phi3':
        self._expect('rope.dimension_count', head_dim)
      rope['partial_rotary_factor'] = width / head_dim
    longest = self.need('context_length')
    kind = self._string('rope.scaling.type', 'none')
    original = self.take('rope.scaling.original_context_length', longest)
    if kind == 'linear':
      rope |= {
        'rope_type': 'linear',
        'factor': self.need('rope.scaling.factor', float),
      }
    elif kind == 'yarn':
      rope |= {
        'rope_type': 'yarn',
        'factor': self.need('rope.scaling.factor', float),
        'original_max_position_embeddings': original,
      }
    elif kind not in ('none', 'longrope'):
      self._expect('rope.scaling.type', 'none')
    self._expect('rope.scale_linear', 1.0)
    factors = [f'rope_factors_{n}.weight' for n in ('short', 'long')]
    if 'rope_freqs.weight' in self.tensors:
      # Llama 3.1's, whose settings the converter has worked in.
      factors = ['rope_freqs.weight'] * 2
    if factors[0] in self.tensors and factors[1] in self.tensors:
      near, far = (self.read(name).reshape(-1).tolist() for name in factors)
      if kind not in ('none', 'longrope'):
        self._expect('rope.scaling.type', 'longrope')
      rope |= {
        'rope_type': 'longrope',
        'short_factor': near,
        'long_factor': far,
        'original_max_position_embeddings': original,
        'attention_factor': self.take('rope.scaling.attn_factor', 1.0, float),
      }
    if self.arch == 'gemma3':
      local = {'rope_type': 'default', 'rope_theta': _GEMMA3_LOCAL_THETA}
      return {'full_attention': rope, 'sliding_attention': local}
    return rope

  def _string(self, key: str, default: str) -> str:
    name = f'{self.arch}.{key}'
    return str(self.fields[name]) if name in self.fields else default

  def _expect(self, key: str, value: Any) -> None:
    """Refuses what the config has no words for."""
    name = f'{self.arch}.{key}'
    if name in self.fields and self.fields[name] != value:
      raise ValueError(
        f'{self.path}: {name} is {self.fields[name]!r}, expected {value!r}. '
        "Load the model's Hugging Face directory instead"
      )

  def _token_id(self, role: str) -> int | None:
    """The id of a special token; None, as in config.json, if it has none."""
    key = f'tokenizer.ggml.{role}_token_id'
    return self.fields[key] if key in self.fields else None


def _shortest(value: float) -> float:
  """A float32 of the file as config.json spells it: 9.9999997e-06 -> 1e-05."""
  return float(str(np.float32(value)))
