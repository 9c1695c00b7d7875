"""config.json of each model family -> ModelConfig.

Defaults are those of transformers' config classes, which apply where a field
is absent; `Fields` sees to it that none is overlooked.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from qdora_jax import rope
from qdora_jax.interop.fields import Fields, rope_from, rope_of, rope_settings
from qdora_jax.model import Activation, LayerKind, ModelConfig
from qdora_jax.rope import Rope

_ACTIVATIONS: dict[str, Activation] = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
  """What a config.json stands for.

  Args:
    config: its fields, as transformers writes them or older versions did.
    where: the checkpoint's name, for messages.

  Raises:
    ValueError: for a model_type, a field or a value that is not supported,
      naming the nearest that is.
  """
  fields = Fields(config, where)
  model_type = fields.need('model_type', str)
  if model_type not in FAMILIES:
    alike = [name for name in FAMILIES if name.startswith(model_type)]
    near = difflib.get_close_matches(model_type, alike or FAMILIES, 1, 0.0)[0]
    raise ValueError(
      f'{where}: model_type {model_type!r} is not supported; the nearest that '
      f'is: {near!r}, of {", ".join(map(repr, FAMILIES))}'
    )
  made = FAMILIES[model_type](fields)
  fields.check_rest(model_type)
  return made


def _shapes(
  f: Fields,
  *,
  kv_heads: int | None = None,
  head_dim: int | None = None,
  tied: bool = False,
  activation: tuple[str, str] = ('hidden_act', 'silu'),
  eps: float = 1e-6,
) -> dict[str, Any]:
  """What all families have; arguments are defaults of absent fields.

  activation is the name of its field, too.
  """
  heads, width = f.need('num_attention_heads'), f.need('hidden_size')
  kv = f.take('num_key_value_heads', int, kv_heads or heads, heads)
  if heads % kv:
    raise ValueError(
      f'{f.where}: config.json: num_key_value_heads={kv}: expected a divisor '
      f'of num_attention_heads={heads}'
    )
  layers = f.need('num_hidden_layers')
  natural = width // heads
  size = f.take('head_dim', int, head_dim or natural, natural)
  for name, value, most in (
    ('num_hidden_layers', layers, 10_000),
    ('head_dim', size, 65_536),
  ):
    if not 1 <= value <= most:
      raise ValueError(
        f'{f.where}: config.json: {name}={value}: expected 1 to {most:,}'
      )
  key, usual = activation
  name = f.take(key, str, usual, usual)
  if name not in _ACTIVATIONS:
    f.refuse(f'{key}={name!r}', usual)
  return {
    'vocab': f.need('vocab_size'),
    'width': width,
    'ff': f.need('intermediate_size'),
    'layers': layers,
    'heads': heads,
    'kv_heads': kv,
    'head_dim': size,
    'eps': f.take('rms_norm_eps', float, eps),
    'tied': f.take('tie_word_embeddings', bool, tied, tied),
    'activation': _ACTIVATIONS[name],
  }


def _biases(f: Fields, mlp: bool = False) -> dict[str, bool]:
  """attention_bias, and mlp_bias where the family knows it."""
  attn = f.take('attention_bias', bool, False, False)
  biases = {'qkv_bias': attn, 'o_bias': attn}
  if mlp:
    biases['mlp_bias'] = f.take('mlp_bias', bool, False, False)
  return biases


def _uniform(
  shapes: Mapping[str, Any], turn: Rope, window: int | None = None
) -> dict[str, Any]:
  """All layers of one kind."""
  return {'kinds': (LayerKind(turn, window),) * shapes['layers']}


def _windows(
  f: Fields, layers: int, default: list[str], window: int | None
) -> list[int | None]:
  """Each layer's window: layer_types says which layers have one."""
  types = f.take('layer_types', list, default, default)
  known = ('full_attention', 'sliding_attention')
  for kind in types:
    if kind not in known:
      f.refuse(f'layer_types: {kind!r}', known)
  if len(types) != layers:
    raise ValueError(
      f'{f.where}: config.json: layer_types lists {len(types)} layers, '
      f'num_hidden_layers={layers}'
    )
  if window is None and 'sliding_attention' in types:
    raise ValueError(
      f'{f.where}: config.json: layer_types has sliding_attention, and '
      'sliding_window says no size: expected a whole number above 0'
    )
  return [window if kind == 'sliding_attention' else None for kind in types]


def _llama(f: Fields) -> ModelConfig:
  shapes = _shapes(f)
  turn = rope_of(f, shapes['head_dim'])
  return ModelConfig(**shapes, **_uniform(shapes, turn), **_biases(f, True))


def _mistral(f: Fields) -> ModelConfig:
  shapes = _shapes(f, kv_heads=8)
  window = f.take('sliding_window', int, 4096)
  turn = rope_of(f, shapes['head_dim'])
  return ModelConfig(**shapes, **_uniform(shapes, turn, window))


def _qwen(f: Fields, shapes: dict[str, Any]) -> dict[str, Any]:
  """Qwen's windows: in the upper layers, if use_sliding_window."""
  layers = shapes['layers']
  on = f.take('use_sliding_window', bool, False, False)
  window = f.take('sliding_window', int, 4096)
  first = f.take('max_window_layers', float, 28)
  window = window if on else None
  types = [
    'sliding_attention' if window and n >= first else 'full_attention'
    for n in range(layers)
  ]
  turn = rope_of(f, shapes['head_dim'])
  windows = _windows(f, layers, types, window)
  return {'kinds': tuple(LayerKind(turn, w) for w in windows)}


def _qwen2(f: Fields) -> ModelConfig:
  shapes = _shapes(f, kv_heads=32)
  return ModelConfig(**shapes, **_qwen(f, shapes), qkv_bias=True)


def _qwen3(f: Fields) -> ModelConfig:
  shapes = _shapes(f, kv_heads=32, head_dim=128)
  kinds = _qwen(f, shapes)
  return ModelConfig(**shapes, **kinds, **_biases(f), qk_norm='head')


def _gemma(f: Fields) -> dict[str, Any]:
  """What Gemma 2 and 3 share."""
  shapes = _shapes(
    f,
    kv_heads=4,
    head_dim=256,
    tied=True,
    activation=('hidden_activation', 'gelu_pytorch_tanh'),
  )
  # An older name, which transformers passes over.
  f.read.add('hidden_act')
  scalar = f.above_zero('query_pre_attn_scalar', 256)
  f.must('use_bidirectional_attention', None, False)
  return {
    **shapes,
    **_biases(f),
    'norms': 'both',
    'unit_scale': True,
    'embed_scale': shapes['width'] ** 0.5,
    'attn_scale': scalar**-0.5,
  }


def _gemma2(f: Fields) -> ModelConfig:
  shared = _gemma(f)
  turn = rope_of(f, shared['head_dim'])
  types = ['sliding_attention', 'full_attention'] * shared['layers']
  windows = _windows(
    f,
    shared['layers'],
    types[: shared['layers']],
    f.take('sliding_window', int, 4096),
  )
  return ModelConfig(
    **shared,
    kinds=tuple(LayerKind(turn, w) for w in windows),
    attn_softcap=f.above_zero('attn_logit_softcapping', 50.0),
    logits_softcap=f.above_zero('final_logit_softcapping', 30.0),
  )


def _gemma3(f: Fields) -> ModelConfig:
  shared = _gemma(f)
  layers = shared['layers']
  every = f.take('sliding_window_pattern', int, 6, 6)
  f.read.add('_sliding_window_pattern')
  types = [
    'full_attention' if (n + 1) % every == 0 else 'sliding_attention'
    for n in range(layers)
  ]
  window = f.take('sliding_window', int, 4096)
  windows = _windows(f, layers, types, window)
  # Two sets of settings; older files have rope_theta and rope_scaling for the
  # layers that see all, rope_local_base_freq for the others.
  both = f.take('rope_parameters', dict, {}, {})
  settings = {}
  for kind, key, theta in (
    ('full_attention', 'rope_theta', 1e6),
    ('sliding_attention', 'rope_local_base_freq', 1e4),
  ):
    theta = f.take(key, float, theta, theta)
    inner = both[kind] if kind in both else {}
    settings[kind] = {'rope_theta': theta, **inner}
  settings['full_attention'] |= f.take('rope_scaling', dict, {}, {})
  unknown = set(both) - set(settings)
  if unknown:
    f.refuse(f'rope_parameters: {sorted(unknown)}', sorted(settings))
  # transformers passes over it where each kind has its own settings.
  f.must('original_max_position_embeddings', None)
  far, near = (rope_from(f, s, shared['head_dim']) for s in settings.values())
  # transformers reads attn_logit_softcapping here, and then does not apply it.
  f.must('attn_logit_softcapping', None)
  return ModelConfig(
    **shared,
    kinds=tuple(LayerKind(near if w else far, w) for w in windows),
    qk_norm='head',
    logits_softcap=f.above_zero('final_logit_softcapping', None),
  )


def _phi3(f: Fields) -> ModelConfig:
  shapes = _shapes(f, eps=1e-5)
  settings = rope_settings(f, 1e4)
  for key in ('rope_type', 'type'):
    # transformers: earlier names of the same.
    if key in settings and settings[key] in ('su', 'yarn'):
      settings[key] = 'longrope'
  turn = rope_from(
    f, settings, shapes['head_dim'], partial=True, pretrained=4096
  )
  window = f.take('sliding_window', int, None)
  return ModelConfig(**shapes, **_uniform(shapes, turn, window), fused=True)


def _olmo2(f: Fields) -> ModelConfig:
  shapes = _shapes(f, eps=1e-5)
  turn = rope_of(f, shapes['head_dim'])
  return ModelConfig(
    **shapes,
    **_uniform(shapes, turn),
    **_biases(f),
    norms='post',
    qk_norm='whole',
  )


def _smollm3(f: Fields) -> ModelConfig:
  shapes = _shapes(f, kv_heads=4, tied=True)
  f.read.add('max_window_layers')  # In its files; transformers' class has none.
  layers = shapes['layers']
  every = f.take('no_rope_layer_interval', int, 4, 4)
  turning = [int((n + 1) % every != 0) for n in range(layers)]
  turning = f.take('no_rope_layers', list, turning, turning)
  if len(turning) != layers or not set(turning) <= {0, 1}:
    f.refuse(f'no_rope_layers={turning}', f'{layers} of 0 and 1')
  on = f.take('use_sliding_window', bool, False, False)
  window = f.take('sliding_window', int, None)
  types = [
    'sliding_attention' if on and window and not turns else 'full_attention'
    for turns in turning
  ]
  windows = _windows(f, layers, types, window)
  if not on and any(windows):
    # transformers masks by layer_types, and tells flash attention of no window.
    f.refuse(
      "layer_types with 'sliding_attention' and use_sliding_window=False",
      "use_sliding_window=True, or 'full_attention' alone",
    )
  turn = rope_of(f, shapes['head_dim'], 2e6)
  still = rope.still(shapes['head_dim'])
  kinds = zip(turning, windows, strict=True)
  return ModelConfig(
    **shapes,
    **_biases(f, True),
    kinds=tuple(LayerKind(turn if turns else still, w) for turns, w in kinds),
  )


def _granite(f: Fields) -> ModelConfig:
  shapes = _shapes(f)
  turn = rope_of(f, shapes['head_dim'])
  return ModelConfig(
    **shapes,
    **_uniform(shapes, turn),
    **_biases(f, True),
    embed_scale=f.take('embedding_multiplier', float, 1.0),
    attn_scale=f.take('attention_multiplier', float, 1.0),
    residual_scale=f.take('residual_multiplier', float, 1.0),
    logits_scale=1 / f.above_zero('logits_scaling', 1.0),
  )


FAMILIES: dict[str, Callable[[Fields], ModelConfig]] = {
  'llama': _llama,
  'mistral': _mistral,
  'qwen2': _qwen2,
  'qwen3': _qwen3,
  'gemma2': _gemma2,
  'gemma3_text': _gemma3,
  'phi3': _phi3,
  'olmo2': _olmo2,
  'smollm3': _smollm3,
  'granite': _granite,
}
