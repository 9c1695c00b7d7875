"""One step and many of 8-bit AdamW against bitsandbytes itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('bitsandbytes')
pytest.importorskip('peft')
pytest.importorskip('transformers')

from golden import strangers, weights  # noqa: E402

from qdora_jax import adam8bit, nf4  # noqa: E402

# Its CPU kernel looks a number in [-1, 1] up in a table of 2^16 places.
PLACE = 2 / 2**16


@pytest.mark.parametrize('shape', [(64, 256), (61, 77), (4096,), (3, 5000)])
@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_steps(shape, decay):
  start = weights.matrix(1, shape, 1.0)
  grads = [weights.matrix(2 + n, shape, 0.1) for n in range(5)]
  optimizer = adam8bit.adamw8bit(1e-2, weight_decay=decay)
  update = jax.jit(optimizer.update)
  params = {'kernel': jnp.asarray(start)}
  state = optimizer.init(params)
  for n, grad in enumerate(grads):
    updates, state = update({'kernel': jnp.asarray(grad)}, state, params)
    params = optax.apply_updates(params, updates)
    theirs, exact = (
      strangers.adamw(
        start, np.stack(grads[: n + 1]), bits, lr=1e-2, weight_decay=decay
      )
      for bits in (8, 32)
    )
    error = np.abs(params['kernel'] - exact['parameter'])
    bound = np.abs(theirs['parameter'] - exact['parameter'])
    assert error.mean() <= bound.mean() + 1e-7
    if n:
      continue
    # The first step is from states of zero: exact, and rounded once.
    np.testing.assert_allclose(params['kernel'], theirs['parameter'], atol=1e-6)
    moments = (state[0].mu['kernel'], state[0].nu['kernel'])
    maps = (nf4.DYNAMIC_MAP, nf4.UNSIGNED_MAP)
    for k, moment, levels in zip('12', moments, maps, strict=True):
      absmax = np.asarray(moment.absmax8).reshape(-1)
      np.testing.assert_allclose(absmax, theirs[f'absmax{k}'], rtol=1e-6)
      mine, other = levels[moment.codes8], levels[theirs[f'state{k}']]
      exact_units = np.abs(mine - other)
      gap = np.abs(
        levels[np.minimum(np.asarray(moment.codes8, int) + 1, 255)] - mine
      )
      assert (exact_units <= np.maximum(1.01 * gap, 1.01 * PLACE)).all()
      assert (mine != other).mean() < (0.02 if k == '1' else 0.1)
