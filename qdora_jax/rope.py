"""Rotary positions: frequencies of every kind, angles, and the turn itself.

Each pair of numbers (x[i], x[i + n/2]) of a query or key is turned by position
times a frequency (RoFormer, arXiv 2104.09864). Models that were stretched to
longer texts have other frequencies; each way of stretching is one function
here, and what it gives is only numbers: the decoder never asks which it was.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax.sight import NOWHERE


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary frequencies of a layer.

  Attributes:
    frequencies: radians a position, one for each pair that turns; pairs beyond
      them are left as they are.
    amplitude: factor on queries and keys that turn.
    beyond: texts (of a packed row, each by itself) longer than this take `long`
      instead; 0 for none.
    long: their frequencies.
  """

  frequencies: tuple[float, ...]
  amplitude: float = 1.0
  beyond: int = 0
  long: tuple[float, ...] = ()


def plain(theta: float, width: int) -> Rope:
  """theta^(-2i / width) for the pairs i of `width` numbers."""
  return Rope(_numbers(1 / _wavelengths(theta, width)))


def linear(theta: float, width: int, factor: float) -> Rope:
  """Positions divided by a factor (arXiv 2306.15595)."""
  return Rope(_numbers(1 / _wavelengths(theta, width) / np.float32(factor)))


def llama3(
  theta: float,
  width: int,
  factor: float,
  low: float,
  high: float,
  original: int,
) -> Rope:
  """Llama 3.1's: slow frequencies divided, fast ones kept, some in between.

  Args:
    theta: base of the frequencies.
    width: numbers of a head that turn.
    factor: slow frequencies are divided by it.
    low, high: turns within the original length that make a frequency slow or
      fast (low_freq_factor, high_freq_factor).
    original: length of the texts of pretraining.
  """
  frequency = 1 / _wavelengths(theta, width)
  turns = np.float32(original) / (2 * np.float32(math.pi) / frequency)
  share = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
  mixed = (1 - share) * frequency / np.float32(factor) + share * frequency
  return Rope(_numbers(mixed))


def still(width: int) -> Rope:
  """Turns nothing (NoPE, arXiv 2305.19466): cosines of 0, sines of 0."""
  return Rope((0.0,) * (width // 2))


def yarn(
  theta: float,
  width: int,
  factor: float,
  original: int,
  *,
  amplitude: float | None = None,
  fast: float = 32.0,
  slow: float = 1.0,
  truncate: bool = True,
) -> Rope:
  """YaRN (arXiv 2309.00071): a ramp from kept to divided frequencies.

  Args:
    theta: base of the frequencies.
    width: numbers of a head that turn.
    factor: by which the context is stretched.
    original: length of the texts of pretraining.
    amplitude: of what turns; None takes the paper's .1 ln(factor) + 1.
    fast, slow: turns within the original length at the ramp's ends.
    truncate: ends of the ramp are whole pairs.
  """

  def pair(turns: float) -> float:
    # The pair that turns so often within the original length.
    length = math.log(original / (turns * 2 * math.pi))
    return width * length / (2 * math.log(theta))

  first, last = pair(fast), pair(slow)
  if truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, width - 1)
  if first == last:
    last += 0.001
  ramp = (np.arange(width // 2, dtype=np.float32) - first) / (last - first)
  ramp = np.clip(ramp, 0, 1).astype(np.float32)
  waves = _wavelengths(theta, width)
  divided = 1 / (np.float32(factor) * waves)
  mixed = divided * ramp + 1 / waves * (1 - ramp)
  if amplitude is None:
    amplitude = stretch(factor)
  return Rope(_numbers(mixed), float(amplitude))


def stretch(factor: float, weight: float = 1.0) -> float:
  """YaRN's amplitude for a factor: .1 weight ln(factor) + 1."""
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope(
  theta: float,
  width: int,
  factor: float,
  original: int,
  short: Sequence[float],
  long: Sequence[float],
  *,
  amplitude: float | None = None,
) -> Rope:
  """LongRoPE (arXiv 2402.13753): a divisor for each pair, found by search.

  Args:
    theta: base of the frequencies.
    width: numbers of a head that turn.
    factor: by which the context is stretched.
    original: texts up to this length take `short`, others `long`.
    short, long: divisors, one a pair.
    amplitude: of what turns; None derives it from factor and original.
  """
  waves = _wavelengths(theta, width)
  near, far = (1 / (np.float32(list(f)) * waves) for f in (short, long))
  if amplitude is None:
    stretched = 1 + math.log(max(factor, 1)) / math.log(original)
    amplitude = math.sqrt(stretched)
  return Rope(_numbers(near), float(amplitude), original, _numbers(far))


def _wavelengths(theta: float, width: int) -> np.ndarray:
  """theta^(2i / width), f32 [width / 2], rounded as transformers does."""
  exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  return (theta ** exponent.astype(np.float64)).astype(np.float32)


def _numbers(frequencies: np.ndarray) -> tuple[float, ...]:
  return tuple(frequencies.astype(np.float32).tolist())


def angles(
  rope: Rope,
  positions_BxL: jax.Array,
  length: int | None = None,
  segments_BxL: jax.Array | None = None,
) -> jax.Array:
  """(cos, sin) of every position, times the amplitude: f32 [2, B, L, 1, Dh/2].

  Args:
    rope: frequencies.
    positions_BxL: of the tokens.
    length: of the text as far as it may grow (a cache's); None takes each
      example's own last position.
    segments_BxL: which packed example each token belongs to; None: one a row.
  """
  frequency = jnp.asarray(rope.frequencies, jnp.float32)[None, None]
  if rope.beyond:
    far = jnp.asarray(rope.long, jnp.float32)[None, None]
    if length is None:
      real = jnp.where(positions_BxL < NOWHERE, positions_BxL, 0)
      if segments_BxL is None:
        last = jnp.max(real, axis=1, keepdims=True)
      else:
        last = jax.vmap(_last)(real, segments_BxL)
      is_long = last[..., None] >= rope.beyond
    else:
      is_long = length > rope.beyond
    frequency = jnp.where(is_long, far, frequency)
  angle = positions_BxL[..., None].astype(jnp.float32) * frequency
  cos_sin = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
  return rope.amplitude * cos_sin[..., None, :]


def _last(positions_L: jax.Array, segments_L: jax.Array) -> jax.Array:
  """The largest position of each token's own segment, [L]."""
  # Any numbers may name segments: a segment's place among them all is below L.
  own_L = jnp.searchsorted(jnp.sort(segments_L), segments_L)
  size = len(own_L)
  return jax.ops.segment_max(positions_L, own_L, num_segments=size)[own_L]


def rotate(x_BxLxHxDh: jax.Array, angles: jax.Array) -> jax.Array:
  """Turns the pairs (x[i], x[i + n/2]) of the first n numbers, in float32."""
  cos, sin = angles
  n = 2 * cos.shape[-1]
  x = x_BxLxHxDh.astype(jnp.float32)
  a, b = jnp.split(x[..., :n], 2, axis=-1)
  turned = [a * cos - b * sin, b * cos + a * sin, x[..., n:]]
  return jnp.concatenate(turned, axis=-1).astype(x_BxLxHxDh.dtype)
