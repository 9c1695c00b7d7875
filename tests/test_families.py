"""Every model family against transformers, and every field of its config."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import transformers
from golden import cases, families, ours, weights
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  init_adapter,
  load_pretrained,
  merge,
  norms,
  paths,
  train,
)
from qdora_jax.interop import hf
from qdora_jax.interop.families import model_config
from qdora_jax.interop.fields import HARMLESS
from qdora_jax.model import init_cache

GOLDEN = json.loads((cases.HERE / 'families.json').read_text())
LOGITS = np.load(cases.HERE / 'families.npz')


@pytest.mark.parametrize('name', families.CONFIGS)
def test_logits_and_gradients(name, tmp_path):
  folder = weights.write_hf(tmp_path, *families.make(name))
  model, params, _ = load_pretrained(folder, remat='none')
  tokens = families.prompt()

  @jax.jit
  def value_and_grad(params):
    def loss(params):
      logits = model.apply({'params': params}, tokens)
      each = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
      )
      return jnp.mean(each), logits

    return jax.grad(loss, has_aux=True)(params)

  grads, logits = value_and_grad(params)
  assert ours.relative(np.asarray(logits), LOGITS[name]) <= 1e-5
  got = {}
  for path, leaf in paths.flatten(grads).items():
    for n, parameter in enumerate(paths.names(path, leaf)):
      part = leaf[n] if path.startswith('layers') else leaf
      got[hf.tensor_name(parameter)] = float(jnp.linalg.norm(part))
  want = GOLDEN['gradient_norms'][name]
  assert got.keys() == want.keys()
  for tensor, norm in want.items():
    assert got[tensor] == pytest.approx(norm, rel=2e-4, abs=1e-7), tensor


def whole_text(tokens):
  """A batch, as `data` lays it out, in which every next token is learned."""
  rows, length = tokens.shape
  at = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  return {
    'tokens': tokens,
    'positions': at,
    'segments': np.zeros_like(tokens),
    'loss_at': at[:, :-1],
    'labels': tokens[:, 1:],
    'weights': np.ones((rows, length - 1), np.float32),
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    # Fused kernels; two kinds of layers.
    pytest.param(
      name,
      marks=[pytest.mark.exhaustive] * (name not in ('phi3', 'gemma3')),
    )
    for name in families.CONFIGS
  ],
)
def test_qdora_learns_and_merges(name, tmp_path):
  folder = weights.write_hf(tmp_path, *families.make(name))
  quant = QuantSpec(block_size=32)
  model, base, _ = load_pretrained(folder, quant, remat='block')
  packed = [
    p for p, leaf in paths.flatten(base).items() if hasattr(leaf, 'codes')
  ]
  adapter = init_adapter(jax.random.key(0), base, AdapterSpec('dora', rank=4))
  assert set(packed) == set(paths.flatten(adapter))
  start = jax.tree.map(np.array, adapter)
  optimizer = optax.adamw(5e-3)
  step = train.make_step(model, optimizer)
  state, fixed = (adapter, optimizer.init(adapter)), norms(base, adapter)
  batch, losses = whole_text(families.prompt()), []
  for n in range(4):
    *state, seen = step(*state, base, fixed, batch, jax.random.key(n))
    losses.append(float(seen['loss']))
    assert np.isfinite(losses[-1]) and np.isfinite(float(seen['grad_norm']))
  assert losses[-1] < 0.95 * losses[0], losses
  for new, old in zip(*map(jax.tree.leaves, (state[0], start)), strict=True):
    assert np.isfinite(new).all() and not np.array_equal(new, old)
  tokens = families.prompt()
  attached = ours.logits(model, attach(base, state[0]), tokens)
  merged = ours.logits(model, merge(base, state[0]), tokens)
  assert ours.relative(merged, attached) <= 1e-5


# Read, and without effect on these models: their texts are not stretched, their
# windows are off, or another field says the same for every layer.
INERT = {
  'max_position_embeddings',
  'sliding_window',
  'use_sliding_window',
  'max_window_layers',
  'no_rope_layer_interval',
}


def other(value):
  """A value of the same type, as far as it has one, that is another."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int | float):
    return 2 * value + 1
  return {str: 'another', list: ['another'], dict: {'another': 1}}.get(
    type(value), 3
  )


def fields():
  """Every field that transformers' config class of a family has."""
  seen = set()
  for name, config in families.CONFIGS.items():
    model_type = config['model_type']
    if model_type in seen:
      continue
    seen.add(model_type)
    known = transformers.AutoConfig.for_model(model_type).to_dict()
    for field in sorted(known):
      yield name, field, known[field]


@pytest.mark.parametrize(
  'name, field, default', list(fields()), ids=lambda v: str(v)[:24]
)
def test_every_field_is_handled_refused_or_harmless(name, field, default):
  config, _ = families.make(name)
  before = model_config(config, 'here')
  value = config[field] if field in config else default
  try:
    after = model_config({**config, field: other(value)}, 'here')
  except ValueError:
    return
  if after == before:
    assert field in INERT or HARMLESS.fullmatch(field)
  else:
    assert not HARMLESS.fullmatch(field)


def config_of(name, **changes):
  config, _ = families.make(name)
  config |= changes
  return {k: v for k, v in config.items() if v is not ...}


@pytest.mark.parametrize(
  'name, changes, words',
  [
    ('qwen2', {'model_type': 'qwen2_moe'}, r"the nearest that is: 'qwen2'"),
    ('gemma3', {'model_type': 'gemma3'}, r"the nearest that is: 'gemma3_text'"),
    ('llama2', {'some_new_scale': 2.0}, r"some_new_scale='2.0', which is not"),
    ('llama2', {'hidden_act': 'relu2'}, r"hidden_act='relu2'.*'silu'"),
    ('llama2', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ('llama2', {'num_key_value_heads': 3}, 'expected a divisor of'),
    ('llama3', {'rope_parameters': {'rope_type': 'dynamic'}}, "'dynamic'"),
    (
      'llama3',
      {'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0}},
      'rope_parameters: low_freq_factor is missing',
    ),
    (
      'llama_linear',
      {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'odd': 1}},
      r"rope_parameters: \{'odd': 1\}",
    ),
    ('phi3', {'rope_parameters': {'rope_type': 'llama3'}}, 'missing'),
    ('qwen2', {'layer_types': ['full_attention']}, 'lists 1 layers'),
    ('qwen2', {'layer_types': ['chunked'] * 4}, "layer_types: 'chunked'"),
    ('gemma3', {'use_bidirectional_attention': True}, 'bidirectional'),
    ('gemma3', {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping'),
    (
      'gemma3',
      {'original_max_position_embeddings': 16},
      '=16 is not supported',
    ),
    ('smollm3', {'no_rope_layers': [1, 0]}, r'no_rope_layers=\[1, 0\]'),
    (
      'smollm3',
      {
        'use_sliding_window': False,
        'sliding_window': 5,
        'layer_types': ['sliding_attention', 'full_attention'] * 2,
      },
      "layer_types with 'sliding_attention' and use_sliding_window=False",
    ),
    (
      'qwen2',
      {
        'use_sliding_window': False,
        'layer_types': ['sliding_attention', 'full_attention'] * 2,
      },
      'sliding_window says no size',
    ),
    (
      'phi3_long',
      {
        'original_max_position_embeddings': ...,
        'rope_parameters': {
          **families.CONFIGS['phi3_long']['rope_parameters'],
          'original_max_position_embeddings': 16,
        },
      },
      'original_max_position_embeddings=16, of which .* 4096 where that',
    ),
    ('llama_yarn', {'max_position_embeddings': ...}, 'no .max_position_emb'),
    ('granite', {'embedding_multiplier': 'x'}, 'expected a number'),
    ('granite', {'logits_scaling': 0}, 'logits_scaling=0: .* above 0'),
    ('gemma2', {'query_pre_attn_scalar': -4}, 'above 0'),
    ('gemma2', {'final_logit_softcapping': 0.0}, 'above 0'),
    ('granite', {'logits_scaling': float('nan')}, 'expected a number'),
  ],
)
def test_what_is_not_understood_is_refused(name, changes, words):
  with pytest.raises(ValueError, match=words) as error:
    model_config(config_of(name, **changes), 'here')
  assert 'here' in str(error.value)


def test_fields_that_say_nothing_are_passed_over():
  more = {'new_switch': False, 'new_list': [], 'new_number': 0, 'new': None}
  more |= {'unsloth_version': '2026.1', '_note': 'mine', 'torch_dtype': 'x'}
  config = config_of('llama2')
  assert model_config({**config, **more}, 'x') == model_config(config, 'x')


@pytest.mark.parametrize(
  'name, fields',
  [
    ('llama2', {'pretraining_tp': 2, 'max_sequence_length': 2048}),
    ('llama3', {'_name_or_path': 'x', 'rope_interleaved': True}),
    ('gemma2', {'sliding_window_size': 4096, 'cache_implementation': 'hybrid'}),
    ('gemma3', {'hidden_act': 'gelu', 'torch_dtype': 'bfloat16'}),
    (
      'phi3',
      {'full_attn_mod': 1, 'interpolate_factor': 1, 'auto_map': {'a': 1}},
    ),
    ('qwen3', {'temperature': 0.6, 'do_sample': True, 'top_k': 20}),
    ('smollm3', {'max_window_layers': 28, 'pretraining_tp': 2}),
    ('granite', {'attention_dropout': 0.1, 'unsloth_fixed': True}),
  ],
)
def test_what_published_files_carry_along(name, fields):
  config = config_of(name)
  assert model_config({**config, **fields}, 'x') == model_config(config, 'x')


def test_windows_are_read_as_transformers_reads_them():
  windows = {
    'mistral': [6] * 4,
    'qwen2': [None, None, 6, 6],
    'gemma2': [6, None, 6, None],
    'gemma3': [6, None, 6, None],
    'phi3': [6] * 4,
    'llama2': [None] * 4,
  }
  for name, want in windows.items():
    kinds = model_config(config_of(name), 'here').kinds
    assert [kind.window for kind in kinds] == want, name
  # Absent, Mistral's class has a window; null, it has none.
  absent = model_config(config_of('mistral', sliding_window=...), 'here')
  null = model_config(config_of('mistral', sliding_window=None), 'here')
  assert {kind.window for kind in absent.kinds} == {4096}
  assert {kind.window for kind in null.kinds} == {None}


@pytest.mark.parametrize(
  'name, changes, want',
  [
    ('qwen2', {'max_window_layers': 0}, [6] * 4),
    ('qwen2', {'max_window_layers': 3}, [None, None, None, 6]),
    ('qwen2', {'max_window_layers': ...}, [None] * 4),
    ('qwen2', {'use_sliding_window': False}, [None] * 4),
    ('qwen2', {'sliding_window': None}, [None] * 4),
    (
      'qwen2',
      {'layer_types': ['sliding_attention', 'full_attention'] * 2},
      [6, None, 6, None],
    ),
    ('qwen3', {'sliding_window': 5, 'max_window_layers': 1}, [None] * 4),
    (
      'qwen3',
      {
        'use_sliding_window': True,
        'sliding_window': 5,
        'max_window_layers': 1,
      },
      [None, 5, 5, 5],
    ),
    ('smollm3', {'sliding_window': 5}, [None] * 4),
    (
      'smollm3',
      {'use_sliding_window': True, 'sliding_window': 5, 'layer_types': None},
      [None, 5, None, 5],
    ),
    (
      'smollm3',
      {
        'use_sliding_window': True,
        'sliding_window': 5,
        'layer_types': ['sliding_attention', 'full_attention'] * 2,
      },
      [5, None, 5, None],
    ),
  ],
)
def test_which_layers_have_a_window(name, changes, want):
  """As tests/parity/test_families.py has it from transformers."""
  kinds = model_config(config_of(name, **changes), 'here').kinds
  assert [kind.window for kind in kinds] == want


@pytest.mark.parametrize(
  'name, beside, inside, want',
  [
    ('phi3_long', 16, None, 16),
    ('phi3_long', 32, 16, 32),
    ('phi3_long', ..., None, 4096),
    ('phi3_long', ..., 4096, 4096),
    ('phi3_long', 16, 16, 16),
  ],
)
def test_the_length_of_pretraining(name, beside, inside, want):
  """transformers' Phi3Config: beside rope_parameters, or else 4096."""
  changes = {'original_max_position_embeddings': beside}
  if inside is not None:
    rope = families.CONFIGS[name]['rope_parameters']
    rope = {**rope, 'original_max_position_embeddings': inside}
    changes['rope_parameters'] = rope
  turn = model_config(config_of(name, **changes), 'here').kinds[0].rope
  assert turn.beyond == want
  # transformers' _compute_longrope_parameters, of 64 / want.
  stretched = 1 + np.log(max(64 / want, 1)) / np.log(want)
  assert turn.amplitude == pytest.approx(np.sqrt(stretched), rel=1e-6)


@pytest.mark.slow
def test_a_window_hides_what_lies_before_it(tmp_path):
  """Decoding from a cache is the full pass, beyond windows and LongRoPE too."""
  for name in ('gemma2', 'phi3'):
    folder = weights.write_hf(tmp_path / name, *families.make(name))
    model, params, _ = load_pretrained(folder, remat='none')
    tokens = jnp.asarray(families.prompt())
    step = jax.jit(
      lambda t, c, m=model, p=params: m.apply({'params': p}, t, cache=c)
    )
    cache, parts = init_cache(model.config, 2, 20), []
    for begin, end in ((0, 9), (9, 10), (10, 20)):
      part, cache = step(tokens[:, begin:end], cache)
      parts.append(part)
    got = np.concatenate(parts, axis=1)
    assert ours.relative(got, LOGITS[name]) <= 1e-5, name


@pytest.mark.parametrize(
  'name',
  [
    pytest.param('phi3_long', marks=pytest.mark.slow),
    pytest.param('phi3', marks=tiny.AGAIN),
    pytest.param('gemma3', marks=pytest.mark.slow),
  ],
)
def test_packed_examples_are_as_they_are_alone(name, tmp_path):
  """Beside examples longer than LongRoPE's short factors are for, too."""
  folder = weights.write_hf(tmp_path, *families.make(name))
  model, params, _ = load_pretrained(folder, remat='none')
  long = jnp.asarray(families.prompt()[:1])
  short = jnp.asarray(families.prompt()[1:, :8])
  row = jnp.concatenate([short, long, jnp.zeros((1, 4), jnp.int32)], axis=1)
  positions = jnp.concatenate([jnp.arange(n) for n in (8, 20, 4)])[None]
  segments = jnp.repeat(jnp.asarray([1, 2, 0]), jnp.asarray([8, 20, 4]))[None]

  def of(params, *inputs):
    return model.apply({'params': params}, *inputs)

  def loss(logits, tokens):
    return jnp.sum(
      optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
      )
    )

  @jax.jit
  def packed(params):
    def both(params):
      logits = of(params, row, positions, segments)
      parts = logits[:, :8], logits[:, 8:28]
      return loss(parts[0], short) + loss(parts[1], long), parts

    return jax.grad(both, has_aux=True)(params)

  @jax.jit
  def alone(params):
    def both(params):
      parts = of(params, short), of(params, long)
      return loss(parts[0], short) + loss(parts[1], long), parts

    return jax.grad(both, has_aux=True)(params)

  (got, (few, many)), (want, (mine, _)) = packed(params), alone(params)
  assert ours.relative(np.asarray(few), np.asarray(mine)) <= 1e-5
  assert ours.relative(np.asarray(many), LOGITS[name][:1]) <= 1e-5
  for path, leaf in paths.flatten(want).items():
    other = paths.flatten(got)[path]
    assert ours.relative(np.asarray(other), np.asarray(leaf)) <= 1e-4, path
