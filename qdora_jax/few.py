"""A few tokens times an NF4 weight, by kernels of an NVIDIA GPU.

The idea. Decoding reads every weight for a token or a few: what counts is that
four bits travel, and nothing else. XLA writes the dequantized weight to memory
and reads it again or, for one token, takes longer to look levels up than to
read (experiments/LOG.md). Here many programs take a tile of codes each, look
levels up in registers and sum up what they weigh: few_kernels.py, nibbles.py.

Of one token a weight and its adapter are two kernels: one makes what has to be
summed to be x W and x A, the other sums up and brings B and the gain in. Around
a kernel for x W alone XLA made three or four more, one of which wrote x times A
whole for another to sum on one of the GPU's 132 processors.

All layers of a model are one array, and a kernel that is given a slice of it
has XLA copy the slice. So it is given the whole, and a layer's number
(`NF4Array.layer`) - or the slice after all, beyond 2^31 bytes: offsets have 32
bits with a sign (64, which Pallas takes beyond 2^32 bytes, are not measured).

It is written in Pallas and compiled by Triton (compute capability 8.0 or more).
JAX means to remove that back end. Where it is gone, where the GPU is older or
one of several, and where the environment says QDORA_KERNELS=0, XLA does it all,
as it does on other devices.
"""

import functools
import os

import jax
import jax.numpy as jnp

from qdora_jax import nf4, nibbles
from qdora_jax.few_kernels import FINISHED, MOST, Tile, finish, multiply
from qdora_jax.nf4 import NF4Array

try:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
except ImportError:  # pragma: no cover
  pl = triton = None

# For one token and for several: columns of a tile, warps of a program, and
# steps of its part of the in axis, at most (experiments/LOG.md). For one token
# four columns of a row have to meet in a thread: 128 of a warp's do.
ONE, SEVERAL = (128, 1), (64, 1, 4)
# Of an adapter that goes through the kernels, at most: for more, registers and
# caches are too few (16 is measured).
RANK = 128
# Inputs of a step, at most.
STEP = 64
# Bytes that an offset reaches.
FARTHEST = 2**31 - 1


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
    and q.shape[1] % 128 == 0
    and half >= 16
    and half & (half - 1) == 0
  )


def here() -> bool:
  """Whether the devices here run the kernel: one GPU, and nobody against it."""
  return nibbles.INTERPRET or capable()


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
  parts = _parts(x.reshape(-1, i), q)[0]
  return jnp.sum(parts, axis=0).reshape(*x.shape[:-1], o)


def adapted(
  x: jax.Array,
  q: NF4Array,
  a: jax.Array,
  thin: dict[str, jax.Array],
) -> jax.Array:
  """g (x W + s (x A) B) of one token in x's dtype, [..., I] -> [..., O].

  Two kernels: one reads W and A, the other adds up what it left, and B.

  Args:
    x: [..., I], one token that `fits` q.
    q: NF4Array [I, O]; where it has a `layer`, the other arrays, too, are those
      of many layers.
    a: A [I, R].
    thin: lora_b [R, O], scale [], and for DoRA magnitude [O] and norm [O].
  """
  n, (i, o), rank = q.layer, q.shape, a.shape[-1]
  if n is None:
    n, a = jnp.int32(0), a[None]
    thin = {name: jnp.asarray(array)[None] for name, array in thin.items()}
  parts, lows = _parts(x.reshape(1, i), q, (n, a))
  y = pl.pallas_call(
    functools.partial(finish, tuple(thin), rank),
    out_shape=jax.ShapeDtypeStruct((o,), x.dtype),
    grid=(o // FINISHED,),
    compiler_params=triton.CompilerParams(num_warps=4),
    interpret=nibbles.INTERPRET,
    name='nf4_finish',
  )(n.reshape(1), parts[:, 0], lows, *thin.values())
  return y.reshape(*x.shape[:-1], o)


def _parts(
  x_MxI: jax.Array,
  q: NF4Array,
  low: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
  """What has to be summed to be x W, f32 [parts, M, O].

  Of one token levels times x are summed, in fixed point, and scaled by blocks;
  of several with levels rounded to x's dtype. (`x @ dequantize(q)` rounds W.)

  Args:
    x_MxI: M tokens.
    q: NF4Array [I, O].
    low: (a layer's number, A of all layers [N, I, R]); then also what has to be
      summed to be x A, f32 [parts, R], of one token.
  """
  (tokens, i), (_, o) = x_MxI.shape, q.shape
  if q.layer is not None and q.codes.size > FARTHEST:
    q = nf4.own(q)
  if q.layer is None:
    q = jax.tree.map(lambda a: a[None], q).replace(layer=jnp.int32(0))
  table = jnp.asarray(nf4.DYNAMIC_MAP)
  if q.nested is None:
    table = jnp.zeros(1, jnp.float32)
    q = q.replace(nested=table[None], offset=table)
  columns, warps, most = SEVERAL if tokens > 1 else (*ONE, 1)
  shape, dtype, x = (o,), None, x_MxI[0]
  if tokens > 1:
    shape, dtype = (tokens, o), x.dtype
    x = jnp.pad(x_MxI, ((0, MOST - tokens), (0, 0)))
    x = jnp.moveaxis(x.reshape(MOST, i // 2, 2), -1, 0)
  step = min(q.block_size, STEP)
  steps, block = i // step, q.block_size // step
  each = max(n for n in range(1, most + 1) if steps % n == 0)
  splits = steps // each
  out = [jax.ShapeDtypeStruct((splits, *shape), jnp.float32)]
  rank, more = 0, ()
  if low is not None:
    rank = low[1].shape[-1]
    more = low[0].reshape(1), low[1]
    room = splits, pl.next_power_of_2(rank)
    out.append(jax.ShapeDtypeStruct(room, jnp.float32))
  tile = Tile(
    tokens, step // 2, columns, o // columns, steps, each, block, rank
  )
  y, *lows = pl.pallas_call(
    functools.partial(multiply, tile),
    out_shape=out,
    grid=(o // columns + bool(rank), splits),
    compiler_params=triton.CompilerParams(num_warps=warps),
    interpret=nibbles.INTERPRET,
    name='nf4_few',
  )(
    *(q.layer.reshape(1), x, q.codes, q.absmax, q.nested, q.offset),
    *(table, jnp.asarray(nibbles.words(dtype)), *more),
  )
  return y.reshape(splits, tokens, o), *lows
