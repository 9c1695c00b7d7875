"""The programs of few.py: what one of many does on a GPU, in Pallas.

`multiply` weighs a tile of codes, a step of 64 inputs at a time (of a block's,
if that has fewer). The in axis is split, too: what programs leave has to be
summed. Beside the tiles stands one more column of programs, for x A, if there
is an A. `finish` then adds up, in some columns, what is there, brings B and
DoRA's gain in and rounds once.

Names: n is a layer's number; `place` and `part` say which program this is: of
the tiles, and of the in axis.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qdora_jax import dora, nf4, nibbles

try:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
except ImportError:  # pragma: no cover
  pl = triton = None

# Tokens at most: rows of a product on tensor cores.
MOST = 16
# Columns that a program finishes, and parts that it reads at once.
FINISHED, AT_ONCE = 64, 64
# Numbers of A that a program reads at once.
LOWERED = 1024


class Tile(NamedTuple):
  """What a program works on.

  Attributes:
    tokens: how many.
    half: bytes of a step, of one column.
    columns: of a tile.
    tiles: beside each other.
    steps: of the whole in axis.
    each: of a program's part of it; one for one token.
    block: steps of a block.
    rank: of A; 0: none.
  """

  tokens: int
  half: int
  columns: int
  tiles: int
  steps: int
  each: int
  block: int
  rank: int


def multiply(tile, layer, x, codes, *rest):
  """A program's part of x W, or of x A.

  Refs: layer [1], x, arrays of an NF4Array of all layers, DYNAMIC_MAP, the
  words of nibbles.py, for x A its layer [1] and A, the results. x is [I] for
  one token, and [2, MOST, I/2] for several: even inputs, and odd ones.
  """
  place, part = pl.program_id(0), pl.program_id(1)
  weigh = functools.partial(_one if tile.tokens == 1 else _several, tile)
  if not tile.rank:
    weigh(place, part, layer, x, codes, *rest)
    return
  *given, number, a, out, low = rest

  @pl.when(place < tile.tiles)
  def _():
    weigh(place, part, layer, x, codes, *given, out)

  @pl.when(place == tile.tiles)
  def _():
    _lower(tile, part, number, x, a, low)


def _one(tile, place, part, layer, x, codes, *rest):
  """One step of one token, in fixed point."""
  *scales, words, out = rest
  n, columns = layer[0], place * tile.columns + jnp.arange(tile.columns)
  first = part * tile.half + 2 * jnp.arange(tile.half // 2)
  shape = len(first), tile.columns
  table = [jnp.broadcast_to(words[k], shape) for k in range(8)]
  packed = [
    triton.load(codes.at[n, rows[:, None], columns[None]])
    for rows in (first, first + 1)
  ]
  scale = _scale(tile, n, part, columns, *scales)
  fours = [triton.load(x.at[2 * first + k]) for k in range(4)]
  unit, inputs = nibbles.split([four.astype(jnp.float32) for four in fours])
  inputs = [jnp.broadcast_to(word[:, None], shape) for word in inputs]
  whole = jnp.sum(nibbles.dot(packed, table, inputs), axis=0)
  triton.store(
    out.at[part, columns], whole.astype(jnp.float32) * (scale * unit)
  )


def _several(tile, place, part, layer, x, codes, *rest):
  """Of several: levels in x's dtype go to tensor cores, scales to sums."""
  *scales, words, out = rest
  n, columns = layer[0], place * tile.columns + jnp.arange(tile.columns)
  shape = tile.half, tile.columns
  table = [jnp.broadcast_to(words[k], shape) for k in range(8)]
  tokens = jnp.arange(MOST)[:, None]

  def step(k, sums):
    at = part * tile.each + k
    rows = pl.ds(at * tile.half, tile.half)
    packed = triton.load(
      codes.at[n, rows, pl.ds(place * tile.columns, tile.columns)]
    )
    scale = _scale(tile, n, at, columns, *scales)
    within = jnp.zeros(sums.shape, jnp.float32)
    for odd, level in enumerate(nibbles.levels(packed, table, x.dtype)):
      left = triton.load(x.at[pl.ds(odd, 1), pl.ds(0, MOST), rows])[0]
      within += jnp.dot(left, level, preferred_element_type=jnp.float32)
    return sums + within * scale[None]

  sums = jnp.zeros((MOST, tile.columns), jnp.float32)
  sums = jax.lax.fori_loop(0, tile.each, step, sums)
  asked = jnp.broadcast_to(tokens < tile.tokens, sums.shape)
  triton.store(out.at[part, tokens, columns[None]], sums, mask=asked)


def _scale(tile, n, at, columns, absmax, nested, offset, table):
  """`nf4.absmax` of one step in some columns, f32 [columns]."""
  block = at // tile.block
  scale = triton.load(absmax.at[n, block, columns])
  if absmax.dtype == jnp.float32:
    return scale
  unit = triton.load(table.at[scale.astype(jnp.int32)])
  # (A shift, where dividing each would ask for signs.)
  outer = columns * (tile.steps // tile.block) + block
  outer = triton.load(nested.at[n, outer >> nf4.NESTED_BLOCK.bit_length() - 1])
  return jnp.minimum(unit * outer, outer) + triton.load(offset.at[n])


def _lower(tile, part, number, x, a, low):
  """x A of one token, in the same step."""
  n, ranks = number[0], _numbers(tile.rank)
  known = jnp.minimum(ranks, tile.rank - 1)[None]
  # As many rows at once as registers are for.
  count = min(2 * tile.half, max(1, LOWERED // len(ranks)))

  def rows(k, sums):
    at = part * 2 * tile.half + k * count + jnp.arange(count)
    thin = triton.load(a.at[n, at[:, None], known]).astype(jnp.float32)
    inputs = triton.load(x.at[at]).astype(jnp.float32)
    return sums + jnp.sum(inputs[:, None] * thin, axis=0)

  sums = jnp.zeros(ranks.shape, jnp.float32)
  sums = jax.lax.fori_loop(0, 2 * tile.half // count, rows, sums)
  triton.store(low.at[part, ranks], sums)


def finish(names, rank, layer, parts, lows, *rest):
  """g (sum of parts + s (sum of lows) B), in some columns.

  Refs: layer [1], parts [P, O], lows [P, R], arrays of all layers by their
  names (`few.adapted`), the result [O].
  """
  *thin, out = rest
  thin, n = dict(zip(names, thin, strict=True)), layer[0]
  columns = pl.program_id(0) * FINISHED + jnp.arange(FINISHED)
  ranks = _numbers(rank)

  def total(ref, columns):
    count = ref.shape[0]
    rows, sums = _numbers(min(AT_ONCE, count))[:, None], 0
    for first in range(0, count, AT_ONCE):
      at = jnp.minimum(first + rows, count - 1), columns[None]
      sums += jnp.where(first + rows < count, triton.load(ref.at[at]), 0)
    return jnp.sum(sums, axis=0)

  scale = thin['scale'][n].astype(jnp.float32)
  low = jnp.where(ranks < rank, scale * total(lows, ranks), 0)
  rows = jnp.minimum(ranks, rank - 1)[:, None]
  b = triton.load(thin['lora_b'].at[n, rows, columns[None]])
  y = total(parts, columns) + jnp.sum(low[:, None] * b, axis=0)
  if 'norm' in thin:
    m, norm = (
      triton.load(thin[name].at[n, columns]) for name in ('magnitude', 'norm')
    )
    y *= dora.gain(m, norm, scale)
  triton.store(out.at[columns], y.astype(out.dtype))


def _numbers(count):
  """0, 1, ... to the next power of two, which Triton's arrays have to be."""
  return jnp.arange(pl.next_power_of_2(count))
