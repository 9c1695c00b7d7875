"""The loss scale's rule beside torch's own GradScaler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')

from qdora_jax import scaling  # noqa: E402


@pytest.mark.parametrize('share', [0.001, 0.3])
def test_scales_are_those_of_grad_scaler(share):
  """Of 6000 steps with so many overflows, as long as both are above ours."""
  finite = np.random.default_rng(0).random(6000) > share
  theirs = []
  scaler = torch.amp.GradScaler('cpu')
  weight = torch.nn.Parameter(torch.zeros(1))
  optimizer = torch.optim.SGD([weight], lr=0.0)
  for good in finite:
    # It makes its scale when it first scales something.
    scaler.scale(torch.zeros(1))
    theirs.append(scaler.get_scale())
    weight.grad = torch.full((1,), 1.0 if good else float('inf'))
    scaler.step(optimizer)
    scaler.update()

  def step(scale, good):
    return scaling.after(scale, good), scale.value

  _, ours = jax.lax.scan(step, scaling.start(), jnp.asarray(finite))
  theirs = np.array(theirs, np.float32)
  above = np.minimum.accumulate(theirs) >= scaling.FLOOR
  assert len(set(theirs[above])) >= 3
  np.testing.assert_array_equal(ours[above], theirs[above])
  assert ours.min() >= scaling.FLOOR
