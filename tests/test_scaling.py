"""float16: the loss's scale, its rule, and training by it on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_train import TARGETS, sums
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  init_adapter,
  scaling,
  train,
)

RATE = optax.linear_schedule(1e-2, 0.0, 12)
OPTIMIZER = optax.adamw(RATE)


@pytest.fixture(scope='module')
def half():
  """(model, base, adapter) that compute in float16."""
  model, base, _ = tiny.loaded(quant=QuantSpec())
  spec = AdapterSpec('dora', 4, 8.0, targets=TARGETS)
  adapter = init_adapter(jax.random.key(0), base, spec)
  return model.clone(dtype=jnp.float16), base, tiny.perturbed(adapter)


@pytest.fixture(scope='module')
def compiled(half):
  """The step of `half`, compiled once for all tests."""
  return train.make_step(half[0], OPTIMIZER)


@pytest.fixture
def fit(half, compiled, monkeypatch):
  """fit of `half`: f(data, start=the first scale, **options)."""

  def run(data=None, start=scaling.START, **options):
    monkeypatch.setattr(scaling, 'START', start)
    monkeypatch.setattr(train, 'make_step', lambda *_: compiled)
    data = sums(batch_size=4) if data is None else data
    options = {
      'steps': 8,
      'lr': RATE,
      'optimizer': lambda _: OPTIMIZER,
    } | options
    return train.fit(*half, data, **options)

  return run


def test_the_scale_is_halved_and_doubled(monkeypatch):
  monkeypatch.setattr(scaling, 'INTERVAL', 3)
  scale, seen = scaling.LossScale(jnp.float32(4), jnp.int32(0)), []
  for finite in map(int, '1110110111000011'):
    scale = scaling.after(scale, jnp.bool_(finite))
    seen.append(float(scale.value))
  expected = [4, 4, 8, 4, 4, 4, 2, 2, 2, 4, 2, 1, 1, 1, 1, 1]
  assert seen == expected


def test_float16_follows_float32(half, fit):
  model, base, adapter = half
  _, rows = fit()
  _, want = train.fit(
    *(model.clone(dtype=jnp.float32), base, adapter, sums(batch_size=4)),
    **{'steps': 8, 'lr': RATE, 'optimizer': lambda _: OPTIMIZER},
  )
  assert want[-1]['loss'] < 0.8 * want[0]['loss']
  for a, b in zip(rows, want, strict=True):
    assert a['loss_scale'] == 65536 and a['overflowed'] == 0
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=5e-3)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=2e-2)
    assert 'loss_scale' not in b
