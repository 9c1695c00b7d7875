"""A GGUF file's metadata as the `config.json` of the same model.

llama.cpp's converter leaves out what its own code knows by heart; where it
does, a constant below says so. What a file does say of its architecture is
read, checked, known to change no logits (`HARMLESS`), or refused.
"""

import re
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
# Fields of an architecture, without its name, of no effect on logits.
HARMLESS = re.compile(
  # The rows of the embedding say it; Gemma 3's converter cuts some off.
  r'vocab_size'
  # Read by no graph of llama.cpp: the rows of q and k are always permuted.
  r'|tensor_data_layout'
  # What an embedding model makes of its last layer.
  r'|pooling_type'
  # Of layer norms; these models have RMS norms.
  r'|attention\.layer_norm_epsilon'
  # A note (but Granite's graph does not turn where it is false: see _more).
  r'|rope\.scaling\.finetuned'
)
# llama.cpp's graphs: Gemma 3's local layers turn by this base, and every sixth
# layer sees all; every second of Gemma 2's; every fourth of SmolLM3's does not
# turn.
_GEMMA3_LOCAL_THETA, _GEMMA3_PATTERN, _GEMMA2_PATTERN = 1e4, 6, 2
_SMOLLM3_INTERVAL = 4
# Others' files say nothing of windows.
_WINDOWED = ('llama', 'gemma2', 'gemma3', 'phi3')
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
      for metadata that is missing, not understood, or that says what is not
      supported.
  """
  return _Builder(header, read, path).build()


class _Builder:
  """The metadata of one file, under the keys of its architecture."""

  def __init__(
    self, header: Header, read: Callable[[str], np.ndarray], path: str
  ):
    self.fields, self.tensors = header.fields, header.tensors
    self.read, self.path = read, path
    # Names of the fields that were asked for.
    self.used: set[str] = set()
    self.arch = self.field('general.architecture')
    if not isinstance(self.arch, str) or self.arch not in ARCHITECTURES:
      raise ValueError(
        f'{path}: architecture {self.arch!r} is not supported; near: '
        f'{", ".join(paths.near(str(self.arch), ARCHITECTURES))}. Load the '
        "model's Hugging Face directory instead"
      )

  def field(self, key: str) -> Any:
    """A field that must be there."""
    self.used.add(key)
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
    for key in ('attention.value_length', 'attention.key_length_swa'):
      self._expect(key, head_dim)
    self._expect('attention.value_length_swa', head_dim)
    self._expect('expert_count', 0)
    self._expect('attention.causal', True)
    config |= self._more(config)
    self._check_rest()
    return config

  def _more(self, config: dict[str, Any]) -> dict[str, Any]:
    """What one architecture has and the others have not."""
    biases = {
      'attention_bias': 'blk.0.attn_q.bias' in self.tensors,
      'mlp_bias': 'blk.0.ffn_up.bias' in self.tensors,
    }
    window = self._window()
    # llama.cpp's graphs have no other activation.
    more: dict[str, Any] = {'hidden_act': 'silu'}
    if self.arch in ('gemma2', 'gemma3'):
      scalar = config['head_dim']
      if config['num_hidden_layers'] == _GEMMA_27B[self.arch]:
        scalar = config['hidden_size'] // config['num_attention_heads']
      more = {
        'hidden_activation': 'gelu_pytorch_tanh',
        'query_pre_attn_scalar': scalar,
        'sliding_window': window or 4096,
        'attn_logit_softcapping': None,
        'final_logit_softcapping': None,
      }
      for key in ('attn_logit_softcapping', 'final_logit_softcapping'):
        more[key] = self.take(key, None, float)
    if self.arch == 'gemma2':
      self._expect('attention.sliding_window_pattern', _GEMMA2_PATTERN)
      caps = {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
      more |= {k: v for k, v in caps.items() if more[k] is None}
    if self.arch == 'gemma3':
      key = 'attention.sliding_window_pattern'
      pattern = self.take(key, _GEMMA3_PATTERN)
      # llama.cpp: without a window, all layers see all.
      more['sliding_window_pattern'] = 1 if window is None else pattern
    if self.arch == 'llama' and window is not None:
      # Of Llama's two classes in transformers, the one with a window.
      if any(biases.values()):
        self._expect('attention.sliding_window', 0)
      more |= {
        'architectures': ['MistralForCausalLM'],
        'model_type': 'mistral',
        'sliding_window': window,
      }
    elif self.arch in ('llama', 'smollm3', 'granite'):
      more |= biases
    if self.arch in ('qwen3', 'olmo2'):
      more['attention_bias'] = biases['attention_bias']
    if self.arch == 'phi3':
      more['sliding_window'] = window
      # transformers' Phi3Config takes this one, 4096 where it is absent, and
      # passes over the one in rope_parameters.
      more['original_max_position_embeddings'] = self._original()
    if self.arch == 'smollm3':
      more['no_rope_layer_interval'] = _SMOLLM3_INTERVAL
    if self.arch == 'granite':
      # llama.cpp's build_granite: turns nothing if false.
      self._expect('rope.scaling.finetuned', True)
      more |= {
        'attention_multiplier': self.need('attention.scale', float),
        'embedding_multiplier': self.take('embedding_scale', 1.0, float),
        'residual_multiplier': self.take('residual_scale', 1.0, float),
        'logits_scaling': self.need('logit_scale', float),
      }
    return more

  def _window(self) -> int | None:
    """The window of an architecture that may have one; None for none."""
    key = 'attention.sliding_window'
    if self.arch not in _WINDOWED:
      return None
    # llama.cpp's converter writes 0 for Phi-4, which has none.
    off = (f'{self.arch}.{key}', 0) in self.fields.items()
    if off and self.arch != 'gemma2':
      return None
    return self.take(key, None)

  def _original(self) -> int:
    """The length of the texts of pretraining."""
    longest = self.need('context_length')
    return self.take('rope.scaling.original_context_length', longest)

  def _rope(self, head_dim: int) -> dict[str, Any]:
    """Rotary settings; divisors that the file holds become LongRoPE's."""
    theta = self.take('rope.freq_base', 10000.0, float)
    rope: dict[str, Any] = {'rope_type': 'default', 'rope_theta': theta}
    width = self.take('rope.dimension_count', head_dim)
    if width != head_dim:
      if self.arch != 'phi3':
        self._expect('rope.dimension_count', head_dim)
      rope['partial_rotary_factor'] = width / head_dim
    self._expect('rope.dimension_count_swa', width)
    original, kind = self._original(), self._kind()
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
      # convert_hf_to_gguf.py: transformers' settings, under these names.
      for key, name in (
        ('yarn_beta_fast', 'beta_fast'),
        ('yarn_beta_slow', 'beta_slow'),
        ('yarn_attn_factor', 'attention_factor'),
      ):
        value = self.take(f'rope.scaling.{key}', None, float)
        if value is not None:
          rope[name] = value
      # llama.cpp: the ramp's weight, all of it by default.
      self._expect('rope.scaling.yarn_ext_factor', 1.0)
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
    else:
      # LongRoPE's amplitude and divisors come together.
      self._expect('rope.scaling.attn_factor', 1.0)
      if kind == 'longrope':
        self._expect('rope.scaling.type', 'none')
    if self.arch == 'gemma3':
      theta = self.take('rope.freq_base_swa', _GEMMA3_LOCAL_THETA, float)
      local = {'rope_type': 'default', 'rope_theta': theta}
      return {'full_attention': rope, 'sliding_attention': local}
    return rope

  def _kind(self) -> str:
    """How positions are stretched."""
    name = f'{self.arch}.rope.scaling.type'
    self.used.add(name)
    if name in self.fields:
      return str(self.fields[name])
    # llama.cpp's llama_model::load_hparams: a factor of no type is linear's.
    factor = f'{self.arch}.rope.scaling.factor'
    said = factor in self.fields and self.fields[factor] != 0
    return 'linear' if said else 'none'

  def _expect(self, key: str, value: Any) -> None:
    """Refuses what the config has no words for."""
    name = f'{self.arch}.{key}'
    self.used.add(name)
    if name in self.fields and self.fields[name] != value:
      raise ValueError(
        f'{self.path}: {name} is {self.fields[name]!r}, expected {value!r}. '
        "Load the model's Hugging Face directory instead"
      )

  def _check_rest(self) -> None:
    """Every field of the architecture's is read, harmless, or says nothing."""
    for name, value in self.fields.items():
      known = name in self.used or not name.startswith(f'{self.arch}.')
      empty = value is False or value in (0, '', [])
      if known or empty or HARMLESS.fullmatch(name.split('.', 1)[1]):
        continue
      raise ValueError(
        f'{self.path}: {name} is {str(value)[:60]!r}, which is not understood '
        f"for architecture {self.arch!r} and may change the model's "
        "mathematics. Load the model's Hugging Face directory instead"
      )

  def _token_id(self, role: str) -> int | None:
    """The id of a special token; None, as in config.json, if it has none."""
    key = f'tokenizer.ggml.{role}_token_id'
    return self.fields[key] if key in self.fields else None


def _shortest(value: float) -> float:
  """A float32 of the file as config.json spells it: 9.9999997e-06 -> 1e-05."""
  return float(str(np.float32(value)))
