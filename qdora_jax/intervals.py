"""Figures with their 95% intervals."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import scipy.special

# Standard errors to either side of the normal distribution's 95%.
Z = 1.959964


@dataclasses.dataclass(frozen=True)
class Measure:
  """A figure with its 95% interval, None where none is known, as of one row."""

  value: float
  low: float | None
  high: float | None

  def __str__(self) -> str:
    if self.low is None:
      return f'{self.value:.4g} (no interval)'
    digits = 4 if abs(self.value) < 1 else 3 if abs(self.value) < 10 else 2
    return (
      f'{self.value:.{digits}f} ({self.low:.{digits}f} to '
      f'{self.high:.{digits}f})'
    )


def bootstrap(
  statistic: Callable[[np.ndarray], float],
  count: int,
  seed: int = 0,
  resamples: int = 1000,
) -> Measure:
  """A statistic with its interval by resampling (Efron's percentiles).

  Args:
    statistic: of the examples of some indices, int [count].
    count: of examples.
    seed: of the draws.
    resamples: how many are drawn.
  """
  whole = float(statistic(np.arange(count)))
  if count < 2:
    return Measure(whole, None, None)
  draw = np.random.default_rng(seed)
  drawn = [statistic(draw.integers(0, count, count)) for _ in range(resamples)]
  low, high = np.percentile(drawn, [2.5, 97.5])
  return Measure(whole, float(low), float(high))


def wilson(right: int, total: int, z: float = Z) -> tuple[float, float]:
  """Wilson's score interval of a proportion, 95% by default (Wilson 1927)."""
  if not total:
    return 0.0, 1.0
  p = right / total
  middle = (p + z**2 / (2 * total)) / (1 + z**2 / total)
  spread = math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
  spread *= z / (1 + z**2 / total)
  return max(0.0, middle - spread), min(1.0, middle + spread)


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean over seeds, with half of its 95% interval.

  None of one seed, and where one of them is not finite.
  """

  value: float
  half: float | None
  count: int

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Mean':
    value, n = statistics.fmean(values), len(values)
    if n < 2 or not math.isfinite(value):
      return cls(value, None, n)
    t = scipy.special.stdtrit(n - 1, 0.975)
    return cls(value, t * statistics.stdev(values) / math.sqrt(n), n)

  def __str__(self) -> str:
    if self.value.is_integer() and not self.half:
      return f'{int(self.value):,}'
    text = f'{self.value:.4g}'
    return text if self.half is None else f'{text} ± {self.half:.2g}'
