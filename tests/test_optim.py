"""Schedules, AdamW and rules by name, against numbers worked out by hand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import AdapterSpec, init_adapter, paths
from qdora_jax.optim import from_config, make_optimizer, schedule


def section(**overrides):
  return tiny.run_config(
    'none', **{f'optim.{k}': v for k, v in overrides.items()}
  ).optim


HALF = 2**-0.5
RATES = {
  'constant': ({'schedule': 'constant'}, [1, 1, 1, 1]),
  'linear': ({'schedule': 'linear'}, [1, 0.75, 0.5, 0.25]),
  # (1 + cos(pi n / 4)) / 2.
  'cosine': (
    {'schedule': 'cosine'},
    [1, (1 + HALF) / 2, 0.5, (1 - HALF) / 2],
  ),
  'warm constant': (
    {'schedule': 'constant', 'warmup_steps': 4},
    [0.25, 0.5, 0.75, 1, 1, 1],
  ),
  'warm linear': (
    {'schedule': 'linear', 'warmup_steps': 2},
    [0.5, 1, 1, 0.75, 0.5, 0.25],
  ),
  'warm cosine': (
    {'schedule': 'cosine', 'warmup_steps': 2},
    [0.5, 1, 1, (1 + HALF) / 2, 0.5, (1 - HALF) / 2],
  ),
  'one step of warm-up': (
    {'schedule': 'linear', 'warmup_steps': 1},
    [1, 1, 0.75, 0.5, 0.25],
  ),
  'warm-up alone': (
    {'schedule': 'linear', 'warmup_steps': 4},
    [0.25, 0.5, 0.75, 1],
  ),
}


@pytest.mark.parametrize('options, rates', RATES.values(), ids=RATES)
def test_rates(options, rates):
  rate = schedule(section(lr=3e-4, **options), len(rates))
  got = [float(rate(n)) for n in range(len(rates))]
  np.testing.assert_allclose(got, 3e-4 * np.array(rates), rtol=1e-6)


def test_rates_beyond_the_last_step_are_zero():
  for name in ('linear', 'cosine'):
    rate = schedule(section(schedule=name, warmup_steps=2), 6)
    np.testing.assert_allclose(float(rate(6)), 0, atol=1e-9)
    np.testing.assert_allclose(float(rate(9)), 0, atol=1e-9)


def adamw(p, grads, o, rates):
  """Loshchilov and Hutter's algorithm 2, in float64."""
  b1, b2, eps = (o.options[key] for key in ('b1', 'b2', 'eps'))
  m = v = np.zeros_like(p)
  for n, g in enumerate(grads, 1):
    if o.clip:
      g = g * min(1, o.clip / np.linalg.norm(g))
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    step = (m / (1 - b1**n)) / (np.sqrt(v / (1 - b2**n)) + eps)
    p = p - rates[n - 1] * (step + o.weight_decay * p)
  return p


def moved(optimizer, params, grads):
  """params after an update by each gradient; and the last state."""
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


@pytest.mark.parametrize('clip', [0.0, 0.5, 100.0])
@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_adamw(clip, decay):
  o = section(
    lr=0.1,
    schedule='linear',
    options={'b1': 0.8, 'b2': 0.95, 'eps': 1e-3},
    weight_decay=decay,
    clip=clip,
  )
  draw = np.random.RandomState(0)
  start, grads = draw.standard_normal(5), draw.standard_normal((3, 5))
  want = adamw(start, grads, o, [0.1, 0.2 / 3, 0.1 / 3])
  got, _ = moved(
    from_config(o, schedule(o, 3)),
    {'a': jnp.asarray(start, jnp.float32)},
    [{'a': jnp.asarray(g, jnp.float32)} for g in grads],
  )
  np.testing.assert_allclose(got['a'], want, rtol=1e-4, atol=1e-6)


def test_the_norm_that_is_clipped_is_the_whole_trees():
  params = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
  big = {'a': jnp.full(2, 3.0), 'b': jnp.full(2, 4.0)}
  # A norm of sqrt(50), to 1.
  got, _ = moved(make_optimizer(1.0, 'sgd', clip=1.0), params, [big])
  for key in params:
    np.testing.assert_allclose(got[key], -big[key] / 50**0.5, rtol=1e-5)


def trained_tree():
  """A DoRA adapter of two layers, norms and a bias beside it; all ones."""
  base = {
    'layers': {
      'attn': {'q': {'kernel': jnp.ones((2, 16, 8)), 'bias': jnp.ones((2, 8))}},
      'norm': {'scale': jnp.ones((2, 16))},
    },
    'lm_head': {'kernel': jnp.ones((16, 8))},
  }
  spec = AdapterSpec(
    rank=4,
    targets='.*/q/kernel',
    trainable='.*/scale|.*/bias|lm_head/kernel',
  )
  adapter = init_adapter(jax.random.key(0), base, spec)
  return jax.tree.map(jnp.ones_like, adapter)


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {paths.of(path): np.asarray(leaf) for path, leaf in leaves}


ONE_STEP = 0.125
# Names of trained_tree's arrays.
A, B, M = (
  f'layers/attn/q/kernel/{part}' for part in ('lora_a', 'lora_b', 'magnitude')
)


def change(optimizer, grads=None):
  """What one update adds to ones, by name."""
  tree = trained_tree()
  grads = jax.tree.map(jnp.ones_like, tree) if grads is None else grads
  after, state = moved(optimizer, tree, [grads])
  return {k: v - 1 for k, v in flat(after).items()}, state


def test_magnitudes_norms_and_biases_are_not_decayed():
  for name in ('adamw', 'lion', 'lamb'):
    zero = jax.tree.map(jnp.zeros_like, trained_tree())
    optimizer = make_optimizer(ONE_STEP, name, weight_decay=0.5)
    got, _ = change(optimizer, zero)
    for path in (A, B, 'lm_head/kernel'):
      assert (got[path] < -1e-3).all(), (name, path)
    for path in (M, 'layers/attn/q/bias', 'layers/norm/scale'):
      assert (got[path] == 0).all(), (name, path)


def test_lora_plus_and_rates_by_layer():
  rules = {'.*/lora_b': 16.0, 'layers/1/norm/scale': 0.5}
  got, _ = change(make_optimizer(ONE_STEP, 'sgd', lr_scale=rules))
  assert (got[B] == -16 * ONE_STEP).all()
  assert (got[A] == -ONE_STEP).all()
  assert (got['layers/norm/scale'][0] == -ONE_STEP).all()
  assert (got['layers/norm/scale'][1] == -ONE_STEP / 2).all()
  # The first match wins.
  rules = {'.*/lora_b': 2.0, '.*': 4.0}
  got, _ = change(make_optimizer(ONE_STEP, 'sgd', lr_scale=rules))
  assert (got[B] == -2 * ONE_STEP).all()
  assert (got[A] == -4 * ONE_STEP).all()


def test_lora_plus_is_adamw_with_another_rate():
  """PEFT's LoRA+ gives B its own learning rate; so is its decay scaled."""
  draw = np.random.RandomState(0)
  grads = jax.tree.map(
    lambda a: jnp.asarray(draw.standard_normal(a.shape), jnp.float32),
    trained_tree(),
  )
  options = {'weight_decay': 0.1}
  plus, _ = change(
    make_optimizer(1e-2, lr_scale={'.*/lora_b': 8.0}, **options), grads
  )
  slow, _ = change(make_optimizer(1e-2, **options), grads)
  fast, _ = change(make_optimizer(8e-2, **options), grads)
  np.testing.assert_allclose(plus[B], fast[B], rtol=1e-4)
  np.testing.assert_allclose(plus[A], slow[A], rtol=1e-4)


def test_what_is_frozen_stands_still_and_has_no_state():
  options = {'weight_decay': 0.1, 'clip': 1.0}
  got, state = change(
    make_optimizer(ONE_STEP, lr_scale={'.*/lora_a': 0.0}, **options)
  )
  assert (got[A] == 0).all()
  assert (got[B] < 0).all()
  moments = [a.shape for a in jax.tree.leaves(state) if a.ndim]
  assert (2, 16, 4) not in moments
  assert moments.count((2, 4, 8)) == 2


def test_a_frozen_gradient_is_no_part_of_the_norm_that_is_clipped():
  grads = jax.tree.map(jnp.zeros_like, trained_tree())
  node = grads['layers']['attn']['q']['kernel']
  grads['layers']['attn']['q']['kernel'] = node.replace(
    lora_a=node.lora_a + 1e6, lora_b=node.lora_b.at[0, 0, 0].set(0.5)
  )
  got, _ = change(
    make_optimizer(1.0, 'sgd', clip=1.0, lr_scale={'.*/lora_a': 0.0}), grads
  )
  assert got[B][0, 0, 0] == -0.5


def known():
  """Every optimizer of optax that takes a learning rate first."""
  return sorted(
    name
    for module in (optax, optax.contrib)
    for name, value in vars(module).items()
    if inspect.isfunction(value)
    and not name.startswith(('_', 'scale_by'))
    and [*inspect.signature(value).parameters][:1] == ['learning_rate']
  )


REFUSED = {'lbfgs', 'sophia', 'dpsgd', 'schedule_free_adamw'}
REFUSED |= {'schedule_free_sgd'}
# The others, two dozen of them, are slow tests.
USUAL = ('adam', 'adamw', 'adafactor', 'lion', 'muon', 'rmsprop', 'sgd')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in USUAL))
    for name in known()
    if name not in REFUSED
  ],
)
@pytest.mark.filterwarnings('ignore:Specifying a key', 'ignore:.*deprecated')
def test_any_optimizer_by_name(name):
  """It takes a step and keeps its state's shape, so that it can be resumed."""
  optimizer = make_optimizer(
    1e-2, name, clip=1.0, lr_scale={'.*/lora_b': 2.0, '.*/lora_a': 0.0}
  )
  tree = trained_tree()
  state = optimizer.init(tree)
  update = jax.jit(optimizer.update)
  # The first step of some only looks.
  _, after = update(tree, state, tree, value=jnp.float32(1))
  updates, after = update(tree, after, tree, value=jnp.float32(1))
  got = flat(updates)
  assert (got[A] == 0).all()
  assert np.isfinite(got[B]).all()
  assert np.abs(got[B]).max() > 0
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert [a.shape for a in jax.tree.leaves(after)] == [
    a.shape for a in jax.tree.leaves(state)
  ]


@pytest.mark.parametrize(
  'name, options, words',
  [
    ('adamv', {}, r"name='adamv': optax has no such .* near: .*adamw"),
    ('qqqq', {}, r'near: adamw, adam, lion'),
    *((name, {}, 'has no such optimizer') for name in sorted(REFUSED)),
    ('adamw', {'b3': 1}, r'options\.b3: optax.adamw takes b[12]'),
    ('adamw', {'weight_decay': 0.1}, r'options\.weight_decay: '),
  ],
)
def test_what_optax_does_not_know_is_refused(name, options, words):
  with pytest.raises(ValueError, match=words):
    make_optimizer(1e-3, name, options=options)


def test_decay_that_cannot_leave_magnitudes_alone_is_refused():
  with pytest.raises(ValueError, match=r'weight_decay=0.1: optax.sgd has no'):
    make_optimizer(1e-3, 'sgd', weight_decay=0.1)


def test_a_rule_that_matches_nothing_is_refused():
  optimizer = make_optimizer(1e-3, lr_scale={'.*/lora_c': 2.0})
  with pytest.raises(ValueError, match=r"'\.\*/lora_c' matches no parameter"):
    optimizer.init(trained_tree())
