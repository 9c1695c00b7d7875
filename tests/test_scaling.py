"""float16: the loss's scale, its rule, and training by it on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_train import ONE, poisoned, sums
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  init_adapter,
  norms,
  scaling,
  train,
)

RATE = optax.linear_schedule(1e-2, 0.0, 8)
OPTIMIZER = optax.adamw(RATE)
OPTIONS = {'steps': 6, 'lr': RATE, 'optimizer': lambda _: OPTIMIZER}
# What a clock and a machine's load decide.
LOOSE = {'seconds', 'tokens_per_second', 'memory_bytes'}


@pytest.fixture(scope='module')
def half():
  """(model, base, adapter) that compute in float16."""
  model, base, _ = tiny.loaded(quant=QuantSpec())
  adapter = init_adapter(
    jax.random.key(0), base, AdapterSpec('dora', 4, 8.0, targets=ONE)
  )
  return model.clone(dtype=jnp.float16), base, tiny.perturbed(adapter)


@pytest.fixture(scope='module')
def steps(half):
  """{dtype: its step}, each compiled once."""
  return {
    dtype: train.make_step(half[0].clone(dtype=dtype), OPTIMIZER)
    for dtype in (jnp.float16, jnp.float32)
  }


@pytest.fixture(scope='module')
def fit(half, steps):
  """fit(data, start=the first scale, **options); it doubles every 3 steps."""

  def run(data=None, dtype=jnp.float16, start=scaling.START, **options):
    model, base, adapter = half
    model = model.clone(dtype=dtype)
    data = sums(batch_size=4) if data is None else data
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(scaling, 'INTERVAL', 3)
      patch.setattr(scaling, 'START', start)
      patch.setattr(train, 'make_step', lambda *_: steps[dtype])
      return train.fit(model, base, adapter, data, **(OPTIONS | options))

  return run


def test_the_scale_is_halved_and_doubled(monkeypatch):
  monkeypatch.setattr(scaling, 'INTERVAL', 3)
  scale, seen = scaling.LossScale(jnp.float32(4), jnp.int32(0)), []
  for finite in map(int, '1110110111000011'):
    scale = scaling.after(scale, jnp.bool_(finite))
    seen.append(float(scale.value))
  assert seen == [4, 4, 8, 4, 4, 4, 2, 2, 2, 4, 2, 1, 1, 1, 1, 1]
  # What cannot be doubled stays.
  most = scaling.LossScale(jnp.float32(2.0**127), jnp.int32(2))
  assert scaling.after(most, jnp.bool_(True)) == (2.0**127, 0)


@pytest.mark.slow
def test_a_scale_changes_no_bit_where_nothing_overflows(half, steps):
  """In float32."""
  _, base, adapter = half
  rest = (base, norms(base, adapter), sums(batch_size=4)[0], jax.random.key(0))
  results = []
  for scale in (None, scaling.start()):
    trained = jax.tree.map(lambda a: jnp.array(a, copy=True), adapter)
    state = (trained, OPTIMIZER.init(trained))
    *moved, seen = steps[jnp.float32](*state, *rest, scale)
    results.append((moved, [seen[k] for k in ('loss', 'grad_norm', 'finite')]))
  assert float(seen['loss_scale']) == 65536
  tiny.assert_same(results[1], results[0])


@pytest.mark.slow
def test_float16_follows_float32_and_an_overflow_only_lowers_the_scale(
  half, fit
):
  # Of this batch gradients are finite from 2^16 on.
  batch = sums(batch_size=4)[0]
  got, rows = fit(6 * [batch], start=2.0**19)
  assert [row['loss_scale'] for row in rows] == [
    2.0**n for n in (19, 18, 17, 16, 16, 16)
  ]
  assert [row['overflowed'] for row in rows] == [1, 2, 3, 3, 3, 3]
  # Nothing moved, the schedule included, and it is no skipped step.
  assert {row['skipped'] for row in rows} == {0}
  assert {row['lr'] for row in rows[:4]} == {1e-2}
  assert [row['grad_norm'] is None for row in rows] == 3 * [True] + 3 * [False]
  exact, want = fit(3 * [batch], jnp.float32, steps=3)
  for a, b in zip(rows[3:], want, strict=True):
    assert a['lr'] == b['lr'] and 'loss_scale' not in b
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=2e-3)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=2e-2)
  # Adam's first steps are as long as the rate whatever the gradient is, and its
  # small ones are less exact in 11 bits: not number by number.
  apart = optax.tree.norm(optax.tree.sub(got, exact))
  assert apart <= 0.1 * optax.tree.norm(optax.tree.sub(exact, half[2]))
  assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype('float32')}


@pytest.mark.slow
def test_a_run_in_float16_continues_bit_for_bit(fit, tmp_path):
  """Its scale, and how long that has lasted, included."""
  options = {'start': 2.0**17, 'save_every': 1}
  want, rows = fit(**options)
  assert [row['loss_scale'] / 2**16 for row in rows] == [2, 1, 1, 1, 2, 1]
  fit(**options, steps=3, workdir=tmp_path)
  got, more = fit(**options, workdir=tmp_path)
  tiny.assert_same(got, want)
  assert [row['step'] for row in more] == [4, 5, 6]
  for a, b in zip(more, rows[3:], strict=True):
    assert {k: a[k] for k in a.keys() - LOOSE} == {
      k: b[k] for k in b.keys() - LOOSE
    }


def test_at_the_lowest_scale_a_step_is_skipped_as_any_other(fit):
  """And where that persists, it says what else it may be in float16."""
  with pytest.raises(train.NotFiniteError) as error:
    fit(poisoned(range(20)), start=4.0, max_skipped=3)
  words = str(error.value)
  assert 'in 3 steps in a row, up to step 5' in words
  assert "config.model.dtype='float32'" in words
