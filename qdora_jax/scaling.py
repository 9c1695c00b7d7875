"""Loss scaling: training in float16, on GPUs that know no bfloat16.

float16 ends at 65504, and what is below 6e-8 is zero: small gradients vanish on
their way through the layers. So the loss is multiplied by a scale before it is
differentiated, and the gradients are divided by it (Micikevicius et al., arXiv
1710.03740). The scale is a power of two: where nothing overflows or vanishes
the result is the same, bit for bit.

How large it may be shows itself. When gradients overflow, the step moves
nothing and the scale is halved; after so many steps without that it is doubled.
This is PyTorch's GradScaler, constants included, but for its end: ours stays at
one, where what is not finite is no fault of the scale, and counts as any other
step that had to be skipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# torch.amp.GradScaler: init_scale, growth_factor, backoff_factor,
# growth_interval.
START, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000
FLOOR = 1.0


class LossScale(NamedTuple):
  """The factor, f32 []; and how many steps it has lasted, i32 []."""

  value: jax.Array
  lasted: jax.Array


def start() -> LossScale:
  """Before the first step."""
  return LossScale(jnp.float32(START), jnp.int32(0))


def after(scale: LossScale, finite: jax.Array) -> LossScale:
  """The next step's, after one whose gradients were finite or not."""
  lasted = scale.lasted + 1
  grown = scale.value * GROWTH
  grows = finite & (lasted >= INTERVAL)
  value = jnp.where(grows & jnp.isfinite(grown), grown, scale.value)
  lower = jnp.maximum(scale.value * BACKOFF, FLOOR)
  return LossScale(
    jnp.where(finite, value, lower), jnp.where(finite & ~grows, lasted, 0)
  )
