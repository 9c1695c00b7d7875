"""Schedules and AdamW against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from qdora_jax.optim import make_optimizer, schedule


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
  m = v = np.zeros_like(p)
  for n, g in enumerate(grads, 1):
    if o.clip:
      g = g * min(1, o.clip / np.linalg.norm(g))
    m = o.b1 * m + (1 - o.b1) * g
    v = o.b2 * v + (1 - o.b2) * g**2
    step = (m / (1 - o.b1**n)) / (np.sqrt(v / (1 - o.b2**n)) + o.eps)
    p = p - rates[n - 1] * (step + o.weight_decay * p)
  return p


@pytest.mark.parametrize('clip', [0.0, 0.5, 100.0])
@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_adamw(clip, decay):
  o = section(
    lr=0.1,
    schedule='linear',
    b1=0.8,
    b2=0.95,
    eps=1e-3,
    weight_decay=decay,
    clip=clip,
  )
  draw = np.random.RandomState(0)
  start, grads = draw.standard_normal(5), draw.standard_normal((3, 5))
  want = adamw(start, grads, o, [0.1, 0.2 / 3, 0.1 / 3])
  optimizer = make_optimizer(o, 3)
  params = {'a': jnp.asarray(start, jnp.float32)}
  state = optimizer.init(params)
  for g in grads:
    g = {'a': jnp.asarray(g, jnp.float32)}
    updates, state = optimizer.update(g, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params['a'], want, rtol=1e-4, atol=1e-6)


def test_the_norm_that_is_clipped_is_the_whole_trees():
  optimizer = make_optimizer(section(clip=1.0, b1=0.0), 3)
  plain = make_optimizer(section(clip=0.0, b1=0.0), 3)
  params = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
  big = {'a': jnp.full(2, 3.0), 'b': jnp.full(2, 4.0)}
  # A norm of sqrt(50), to 1.
  small = {k: g / 50**0.5 for k, g in big.items()}
  (_, (moments, *_)) = optimizer.update(big, optimizer.init(params), params)[1]
  (want, *_) = plain.update(small, plain.init(params), params)[1]
  for key in params:
    np.testing.assert_allclose(moments.nu[key], want.nu[key], rtol=1e-5)
