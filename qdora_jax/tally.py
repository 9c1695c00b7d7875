"""What is told of each step: computed with it, fetched later, counted.

Devices work through what they are given in its order, and reading a number
waits for all before it. So nothing is read of a step that was only just begun,
and nothing is computed for the log but inside of programs: an innocent
`float(schedule(n))` would stand in line behind the step.
"""

import collections
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import scaling
from qdora_jax.metrics import peak_memory
from qdora_jax.sharding import shard

Row = dict[str, Any]


class Tally:
  """The rows of the log, some steps after these have begun.

  Attributes:
    skipped: steps that moved nothing, for not being finite,
    overflowed: and those that moved nothing but the loss scale.
    in_a_row: the last ones that were skipped, with none between them.
    waiting: steps that were begun and have no row yet.
  """

  def __init__(
    self,
    rate: Callable[[Any], Any],
    mesh: jax.sharding.Mesh | None = None,
    skipped: int = 0,
    overflowed: int = 0,
    peak: float = 1.0,
  ):
    """Begins to count, and the clock.

    Args:
      rate: learning rate by steps that moved something.
      mesh: that steps run on.
      skipped: before,
      overflowed: and before.
      peak: the rate is so many times as high; not part of a program.
    """
    self._peak = np.float32(peak)
    self.skipped, self.overflowed, self.in_a_row = skipped, overflowed, 0
    self.waiting: collections.deque[Any] = collections.deque()
    still = jnp.int32(skipped + overflowed)
    self._still = still if mesh is None else shard(still, mesh)
    self.rest()

    def noted(seen: Any, n: Any, still: Any) -> Any:
      # A step that was skipped did not move the schedule on.
      lr = jnp.float32(rate(n - 1 - still))
      return {**seen, 'lr': lr}, still + ~seen['finite']

    self._noted = jax.jit(noted)

  def rest(self) -> None:
    """What was done since the last row is no step's time."""
    self._clock = time.perf_counter()

  def begin(self, n: int, tokens: Any, seen: Any) -> None:
    """Step n has begun, on so many tokens; seen is what it will give."""
    seen, self._still = self._noted(seen, n, self._still)
    self.waiting.append((n, tokens, seen))

  def rows(self, late: int) -> Iterator[Row]:
    """Waits for the steps begun, but for so many of the last."""
    while len(self.waiting) > late:
      n, tokens, seen = self.waiting.popleft()
      yield self._row(n, int(tokens), jax.device_get(seen))

  def _row(self, n: int, tokens: int, seen: dict[str, Any]) -> Row:
    finite, scaled = bool(seen['finite']), 'loss_scale' in seen
    # Then the scale was too large, which is nothing to be alarmed at.
    over = scaled and not finite and seen['loss_scale'] > scaling.FLOOR
    if over:
      self.overflowed += 1
    else:
      self.skipped += not finite
      self.in_a_row = 0 if finite else self.in_a_row + 1
    known = finite or (over and np.isfinite(seen['loss']))
    began, self._clock = self._clock, time.perf_counter()
    row = {
      'step': n,
      'loss': float(seen['loss']) if known else None,
      'lr': _shortest(seen['lr'] * self._peak),
      'grad_norm': float(seen['grad_norm']) if finite else None,
      'tokens': tokens,
      'skipped': self.skipped,
      'seconds': self._clock - began,
      'tokens_per_second': tokens / (self._clock - began),
      'memory_bytes': peak_memory(),
    }
    if scaled:
      row['loss_scale'] = float(seen['loss_scale'])
      row['overflowed'] = self.overflowed
    return row


def _shortest(number: Any) -> float:
  """A float32 as it is written: .0002, not .00019999999494757503."""
  return float(str(np.float32(number)))
