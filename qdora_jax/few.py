"""A few tokens times an NF4 weight, as one kernel of an NVIDIA GPU.

The idea. Decoding reads every weight for a token or a few: what counts is that
four bits travel, and nothing else. XLA writes the dequantized weight to memory
and reads it again or, for one token, takes longer to look levels up than to
read (experiments/LOG.md). Here a program takes a tile of codes, block_size / 2
bytes of each of its columns at a time, turns them into levels in registers and
sums up what they weigh. Programs split the in axis, too; what they leave, f32
[parts, tokens, O], is summed by whoever reads it.

Levels are looked up without memory. `prmt` takes four bytes of eight by four
selectors, which two packed bytes are; two of them, and a choice by the fourth
bit, are a table of 16 bytes, and two such tables one of 16 numbers in half
precision. Their relative error is at most 2^-11, a quarter of what rounding the
weight to bfloat16 costs, which here is not done for a single token.

All layers of a model are one array, and a kernel that is given a slice of it
has XLA copy the slice. So it is given the whole, and a layer's number
(`NF4Array.layer`) - or the slice after all, where Triton's offsets, of 32 bits
with a sign, do not reach.

It is written in Pallas and compiled by Triton (compute capability 8.0 or more).
JAX means to remove that back end. Where it is gone, where the GPU is older or
one of several, and where the environment says QDORA_KERNELS=0, XLA does it all,
as it does on other devices.
"""

import functools
import itertools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import nf4
from qdora_jax.nf4 import NF4Array

try:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
except ImportError:  # pragma: no cover
  pl = triton = None

# Tokens at most.
MOST = 16
# Columns of a tile and warps of a program, for one token and for several;
# blocks of a program's part of the in axis, at most (experiments/LOG.md).
ONE, SEVERAL, BLOCKS = (64, 2), (128, 4), 4
# Bytes that an offset reaches.
FARTHEST = 2**31 - 1
# For tests without a GPU: the kernel's steps run as JAX, all but the look-up.
INTERPRET = False


def fits(x: jax.Array, q: NF4Array) -> bool:
  """Whether the kernel takes this product, here.

  Args:
    x: [..., I].
    q: NF4Array of one layer.
  """
  half, tokens = q.block_size // 2, x.size // x.shape[-1]
  return (
    here()
    and q.ndim == 2
    and q.gathered is None
    and x.dtype.itemsize == 2
    and 0 < tokens <= MOST
    and q.shape[1] % SEVERAL[0] == 0
    and half >= 16
    and half & (half - 1) == 0
  )


def here() -> bool:
  """Whether the devices here run the kernel: one GPU, and nobody against it."""
  return INTERPRET or capable()


@functools.cache
def capable() -> bool:
  """The same, asked of the devices alone."""
  if os.environ.get('QDORA_KERNELS') == '0' or triton is None:
    return False
  if jax.default_backend() != 'gpu' or jax.device_count() > 1:
    return False
  capability = str(getattr(jax.devices()[0], 'compute_capability', ''))
  major = capability.partition('.')[0]
  return major.isdigit() and int(major) >= 8


def product(x: jax.Array, q: NF4Array) -> jax.Array:
  """x W in float32, [..., I] -> [..., O].

  Args:
    x: [..., I] that `fits`.
    q: NF4Array [I, O]; with a `layer` nothing of the others is read.
  """
  i, o = q.shape
  return jnp.sum(parts(x.reshape(-1, i), q), axis=0).reshape(*x.shape[:-1], o)


def parts(x_MxI: jax.Array, q: NF4Array) -> jax.Array:
  """What has to be summed to be x W, f32 [parts, M, O].

  Of one token levels times x are summed in float32, and scaled by blocks; of
  several W is rounded to x's dtype first, as `x @ dequantize(q)` has it.
  """
  (tokens, i), (_, o) = x_MxI.shape, q.shape
  blocks = i // q.block_size
  each = max(n for n in range(1, BLOCKS + 1) if blocks % n == 0)
  splits = blocks // each
  if q.layer is not None and q.codes.size > FARTHEST:
    q = nf4.own(q)
  if q.layer is None:
    q = jax.tree.map(lambda a: a[None], q).replace(layer=jnp.int32(0))
  table = jnp.asarray(nf4.DYNAMIC_MAP)
  if q.nested is None:
    table = jnp.zeros(1, jnp.float32)
    q = q.replace(nested=table[None], offset=table)
  body, inputs, shape = _one, (x_MxI[0],), (splits, o)
  columns, warps = ONE
  if tokens > 1:
    columns, warps = SEVERAL
    body, shape = _several, (splits, MOST, o)
    x = jnp.pad(x_MxI, ((0, MOST - tokens), (0, 0)))
    inputs = x[:, 0::2], x[:, 1::2]
  tile = Tile(q.block_size // 2, columns, blocks, each)
  y = pl.pallas_call(
    functools.partial(body, tile),
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    grid=(o // columns, splits),
    compiler_params=triton.CompilerParams(num_warps=warps),
    interpret=INTERPRET,
    name='nf4_few',
  )(
    *(q.layer.reshape(1), *inputs, q.codes, q.absmax),
    *(q.nested, q.offset, table, jnp.asarray(_HALVES)),
  )
  return y.reshape(splits, -1, o)[:, :tokens]


class Tile(NamedTuple):
  """What a program works on.

  Attributes:
    half: bytes of a block, block_size / 2.
    columns: of a tile.
    blocks: of the whole in axis.
    each: of a program's part of it.
  """

  half: int
  columns: int
  blocks: int
  each: int

  def here(self):
    """This program's columns, as a slice and as numbers."""
    start = pl.program_id(0) * self.columns
    return pl.ds(start, self.columns), start + jnp.arange(self.columns)


def _one(tile, layer, x, codes, *rest):
  """A program's part of one token's product: x [I]."""
  *scales, halves, out = rest
  n, (columns, numbers), part = layer[0], tile.here(), pl.program_id(1)

  def step(k, sums):
    block = part * tile.each + k
    place = pl.ds(block * tile.half, tile.half)
    high, low = _levels(triton.load(codes.at[n, place, columns]), halves)
    scale = _scale(n, block, numbers, tile, *scales)
    even = 2 * (block * tile.half + jnp.arange(tile.half))
    first, second = (triton.load(x.at[at])[:, None] for at in (even, even + 1))
    return sums + (high * first + low * second) * scale[None]

  sums = jnp.zeros((tile.half, tile.columns), jnp.float32)
  sums = jax.lax.fori_loop(0, tile.each, step, sums)
  triton.store(out.at[part, columns], jnp.sum(sums, axis=0))


def _several(tile, layer, even, odd, codes, *rest):
  """The same of several, on tensor cores: even and odd inputs, [M, I/2]."""
  *scales, halves, out = rest
  n, (columns, numbers), part = layer[0], tile.here(), pl.program_id(1)
  everyone = pl.ds(0, MOST)

  def step(k, sums):
    block = part * tile.each + k
    place = pl.ds(block * tile.half, tile.half)
    levels = _levels(triton.load(codes.at[n, place, columns]), halves)
    scale = _scale(n, block, numbers, tile, *scales)
    for rows, level in zip((even, odd), levels, strict=True):
      w = (level * scale[None]).astype(rows.dtype)
      x = triton.load(rows.at[everyone, place])
      sums += jnp.dot(x, w, preferred_element_type=jnp.float32)
    return sums

  sums = jnp.zeros((MOST, tile.columns), jnp.float32)
  sums = jax.lax.fori_loop(0, tile.each, step, sums)
  triton.store(out.at[part, everyone, columns], sums)


def _scale(n, block, numbers, tile, absmax, nested, offset, table):
  """`nf4.absmax` of one block in some columns, f32 [columns]."""
  scale = triton.load(absmax.at[n, block, numbers])
  if absmax.dtype == jnp.float32:
    return scale
  unit = triton.load(table.at[scale.astype(jnp.int32)])
  outer = (numbers * tile.blocks + block) // nf4.NESTED_BLOCK
  outer = triton.load(nested.at[n, outer])
  return jnp.minimum(unit * outer, outer) + triton.load(offset.at[n])


_HALVES = nf4.LEVELS.astype(np.float16)


def _levels(packed, halves):
  """f32 levels of bytes: those of high nibbles, those of low ones."""
  if INTERPRET:
    codes = packed.astype(jnp.int32)
    pair = halves[codes >> 4], halves[codes & 15]
  else:
    (words,) = triton.elementwise_inline_asm(
      look_up(),
      args=[packed],
      constraints='=r,=r,=r,=r,r',
      pack=4,
      result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.int32)],
    )
    pair = (
      jax.lax.bitcast_convert_type(part.astype(jnp.uint16), jnp.float16)
      for part in (words >> 16, words & 0xFFFF)
    )
  return tuple(part.astype(jnp.float32) for part in pair)


@functools.cache
def look_up() -> str:
  """PTX: of four bytes $4, words $0 to $3 of two half-precision levels each.

  A level's lower byte comes from the table l0..l3, its upper one from h0..h3.
  """
  tables = _HALVES.view(np.uint8).reshape(4, 4, 2)
  lines = ['.reg .b32 s, t, u, v, x, y, l0, l1, l2, l3, h0, h1, h2, h3;']
  for n, name in itertools.product(range(4), 'lh'):
    word = int.from_bytes(tables[n, :, 'lh'.index(name)].tobytes(), 'little')
    lines.append(f'mov.b32 {name}{n}, {word:#010x};')
  lines += [
    # Of each nibble: its place in half a table; which of the halves.
    'and.b32 s, $4, 0x77777777;',
    'shr.u32 t, $4, 1;',
    'and.b32 t, t, 0x44444444;',
    'or.b32 t, t, 0x32103210;',
  ]
  for n in (0, 2):
    for name, to in ('lx', 'hy'):
      lines += [
        f'prmt.b32 u, {name}0, {name}1, s;',
        f'prmt.b32 v, {name}2, {name}3, s;',
        f'prmt.b32 {to}, u, v, t;',
      ]
    lines += [
      f'prmt.b32 ${n}, x, y, 0x5140;',
      f'prmt.b32 ${n + 1}, x, y, 0x7362;',
      'shr.u32 s, s, 16;',
      'shr.u32 t, t, 16;',
    ]
  return '\n'.join(('{', *lines, '}'))
