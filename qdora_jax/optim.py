"""Schedules and the optimizer, from optax."""

import optax

from qdora_jax.config import OptimSection


def schedule(optim: OptimSection, steps: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then constant or down to zero."""
  rest = max(1, steps - optim.warmup_steps)
  after = {
    'constant': optax.constant_schedule(optim.lr),
    'linear': optax.linear_schedule(optim.lr, 0.0, rest),
    'cosine': optax.cosine_decay_schedule(optim.lr, rest),
  }[optim.schedule]
  if not optim.warmup_steps:
    return after
  # Step 0 moves already: rates lr/w, 2 lr/w, ... lr.
  first = optim.lr / optim.warmup_steps
  warm = optax.linear_schedule(first, optim.lr, max(1, optim.warmup_steps - 1))
  return optax.join_schedules([warm, after], [optim.warmup_steps])


def make_optimizer(
  optim: OptimSection, steps: int
) -> optax.GradientTransformation:
  """AdamW with a schedule, and clipping of the global norm if asked for."""
  adamw = optax.adamw(
    schedule(optim, steps),
    b1=optim.b1,
    b2=optim.b2,
    eps=optim.eps,
    weight_decay=optim.weight_decay,
  )
  if not optim.clip:
    return adamw
  return optax.chain(optax.clip_by_global_norm(optim.clip), adamw)
