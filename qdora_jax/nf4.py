"""NF4: four bits a weight, the same four bits as bitsandbytes.

The idea. Trained weights are close to normal within a small block. Divide each
block by its largest magnitude and they lie in [-1, 1]; round each to the
nearest of 16 levels placed at quantiles of the normal distribution, and every
level is used about equally often: the least information is lost per bit
(QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3).

The equation, for a block of `block_size` consecutive weights w along the in
axis, in float32:

  absmax = max |w|           code = nearest level of w * (1 / absmax)
  w'     = LEVELS[code] * absmax

The layout. A Flax kernel is w_IxO, PyTorch's weight is its transpose, and
bitsandbytes blocks and packs the row-major PyTorch weight. So blocks and pairs
run along I here, and codes keep the kernel's rank and axis order:

  codes    u8  [..., I/2, O]          two a byte, even i in the high nibble
  absmax   f32 [..., I/block_size, O]

Transposed, these are bitsandbytes' bytes bit for bit (whenever block_size
divides I; we refuse the other case, where its blocks straddle outputs). Leading
axes - layers of a scan, experts - are carried along untouched.

Double quantization stores absmax itself in 8 bits: its mean is subtracted and
blocks of 256 are coded with a signed dynamic map, `absmax = MAP[code] *
nested + offset`. A weight then costs 4 + 8/64 + 32/(64*256) = 4.127 bits
instead of 4.5.

What the alternatives do. Int4 spaces levels evenly and FP4 wastes codes near
zero; both lose more on real weights. bitsandbytes looks codes up with a CUDA
kernel. Here one gather from a table of 256 pairs turns a byte into two weights:
it vectorizes on CPU, and XLA fuses it on GPU. (One vector has a way of its own,
`vector_product`; few tokens on a GPU a kernel, few.py.)
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import flax
import jax
import jax.numpy as jnp
import numpy as np

# bitsandbytes functional.py, get_4bit_type("nf4"); QLoRA paper, appendix E.
LEVELS = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)
# A value on a midpoint takes the lower code (bitsandbytes' comparison is >).
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)
# bitsandbytes compresses absmax in blocks of 256 (QLoRA section 3).
NESTED_BLOCK = 256
# bitsandbytes: scale by 1 / max(absmax, 1e-38).
_MOST = np.float32(1e38)
# High and low nibble of each of the 256 bytes as the pair of its levels.
_PAIRS = np.stack([np.repeat(LEVELS, 16), np.tile(LEVELS, 16)], axis=1)


def _dynamic_map(signed: bool = True) -> np.ndarray:
  """bitsandbytes' create_dynamic_map(signed): 256 sorted f32 levels."""
  levels = [0.0, 1.0]
  for i in range(7):
    # torch.linspace(0.1, 1, n) in float32: from both ends, one rounding each.
    n = (2**i if signed else 2 ** (i + 1)) + 1
    low, high = np.float32(0.1), np.float32(1)
    step = np.float64((high - low) / np.float32(n - 1))
    k = np.arange(n)
    bounds = np.where(k < n // 2, low + step * k, high - step * (n - 1 - k))
    bounds = bounds.astype(np.float32)
    means = (bounds[:-1] + bounds[1:]) / np.float32(2)
    means *= np.float32(10.0 ** (i - 6))
    levels += [*means, *-means] if signed else [*means]
  return np.sort(np.array(levels, np.float32))


DYNAMIC_MAP = _dynamic_map()
# For what is never negative: Adam's second moment.
UNSIGNED_MAP = _dynamic_map(signed=False)
_DYNAMIC_MIDPOINTS = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / np.float32(2)


class NF4Array(flax.struct.PyTreeNode):
  """A kernel [..., I, O] in 4-bit NormalFloat; a pytree, an opaque leaf to us.

  Invariants: block_size divides I; if `nested` is None, absmax is float32 and
  used as it stands; else absmax holds 8-bit codes, see the essay above.

  Attributes:
    codes: u8 [..., I/2, O], packed along I, even i in the high nibble.
    absmax: f32 (or u8 if double-quantized) [..., I/block_size, O].
    nested: f32 [..., ceil(O * I/block_size / 256)], scales of absmax's codes,
      whose blocks run over (out, in) order; None without double quantization.
    offset: f32 [...], the mean absmax; None without double quantization.
    block_size: weights that share one absmax.
    dtype: what `dequantize` returns when not told otherwise.
    gathered: sharding that `linear` brings the packed arrays of one layer to
      before it dequantizes them (FSDP's gather); None leaves it to XLA.
    layer: i32 []: the arrays are those of many layers, with a leading axis that
      shape does not show, and this one's number in it; None: its own alone.
      Functions here want the latter: `own` gives it.
  """

  codes: jax.Array
  absmax: jax.Array
  nested: jax.Array | None = None
  offset: jax.Array | None = None
  block_size: int = flax.struct.field(pytree_node=False, default=64)
  dtype: np.dtype = flax.struct.field(
    pytree_node=False, default=np.dtype(np.float32)
  )
  gathered: jax.sharding.NamedSharding | None = flax.struct.field(
    pytree_node=False, default=None
  )
  layer: jax.Array | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    *lead, half, o = self.codes.shape
    return (*lead[self.layer is not None :], half * 2, o)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    """Bytes of all stored arrays, absmax and its nested scales included."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


def own(q: NF4Array) -> NF4Array:
  """q with its own layer's arrays alone."""
  if q.layer is None:
    return q
  whole = q.replace(layer=None)
  return jax.tree.map(lambda a: a[q.layer], whole)


def check(shape: tuple[int, ...], dtype: np.dtype, block_size: int) -> None:
  """Raises ValueError if a kernel [..., I, O] cannot be quantized."""
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'NF4 quantizes floating-point weights, got {dtype}')
  if len(shape) < 2:
    raise ValueError(f'NF4 quantizes kernels [..., I, O], got shape {shape}')
  if block_size < 2 or block_size % 2:
    raise ValueError(f'block_size={block_size}: expected an even number >= 2')
  if shape[-2] % block_size:
    usual = (4096, 2048, 1024, 512, 256, 128, 64, 32)
    fits = [b for b in usual if shape[-2] % b == 0]
    hint = f'; these do: {fits}' if fits else '; no usual block size does'
    raise ValueError(
      f'block_size={block_size} does not divide the in axis of shape {shape}'
      f' (I={shape[-2]}){hint}'
    )


def quantize(
  w_IxO: jax.Array, block_size: int = 64, double_quant: bool = False
) -> NF4Array:
  """Quantizes a kernel to NF4; pure, works under jit, vmap and eval_shape.

  Codes and absmax equal bitsandbytes 0.50.2's `quantize_4bit(w.T)` bit for bit.
  With double_quant, absmax's codes are the exact nearest ones (bitsandbytes'
  CPU writer rounds through a coarser table; stored tensors are read exactly).

  Args:
    w_IxO: float array [..., I, O].
    block_size: weights along I that share one absmax; must divide I.
    double_quant: store absmax in 8 bits.

  Returns:
    NF4Array of the same shape, whose dtype remembers that of w.

  Raises:
    ValueError: if block_size does not divide I, or w is not a float kernel.

  Example:
    >>> q = quantize(jnp.ones((128, 32)), double_quant=True)
    >>> q.shape, q.codes.shape, q.absmax.shape
    ((128, 32), (64, 32), (2, 32))
  """
  check(w_IxO.shape, w_IxO.dtype, block_size)
  *lead, i, o = w_IxO.shape
  blocks = w_IxO.astype(jnp.float32).reshape(*lead, -1, block_size, o)
  absmax = jnp.max(jnp.abs(blocks), axis=-2)
  inverse = jnp.where(absmax < jnp.finfo(jnp.float32).tiny, _MOST, 1 / absmax)
  unit = jnp.clip(blocks * inverse[..., None, :], -1, 1)
  codes = sum((unit > m).astype(jnp.uint8) for m in MIDPOINTS)
  codes = codes.reshape(*lead, i, o)
  packed = codes[..., 0::2, :] << 4 | codes[..., 1::2, :]
  q = NF4Array(packed, absmax, None, None, block_size, np.dtype(w_IxO.dtype))
  return _compress(q) if double_quant else q


def _compress(q: NF4Array) -> NF4Array:
  """Stores absmax in 8 bits: minus its mean, coded in blocks of 256."""
  *lead, ib, o = q.absmax.shape
  offset = jnp.mean(q.absmax, axis=(-2, -1))
  flat = jnp.swapaxes(q.absmax - offset[..., None, None], -1, -2)
  flat = flat.reshape(*lead, o * ib)
  pad = -(o * ib) % NESTED_BLOCK
  flat = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, pad)])
  blocks = flat.reshape(*lead, -1, NESTED_BLOCK)
  nested = jnp.max(jnp.abs(blocks), axis=-1)
  tiny = jnp.finfo(jnp.float32).tiny
  unit = blocks / jnp.maximum(nested, tiny)[..., None]
  codes = jnp.searchsorted(jnp.asarray(_DYNAMIC_MIDPOINTS), unit)
  codes = codes.astype(jnp.uint8).reshape(*lead, -1)[..., : o * ib]
  absmax = jnp.swapaxes(codes.reshape(*lead, o, ib), -1, -2)
  return q.replace(absmax=absmax, nested=nested, offset=offset)


@functools.partial(jax.jit, inline=True)
def absmax(q: NF4Array) -> jax.Array:
  """The scales of q's blocks, f32 [..., I/block_size, O], decompressed."""
  if q.nested is None:
    return q.absmax
  units = jnp.asarray(DYNAMIC_MAP)[q.absmax]
  shape = q.absmax.shape[-2:]
  # XLA spreads them within its loop over weights. A GPU is spared a kernel by
  # it; a CPU is faster with scales that are there, as a gather's are.
  nested = jax.lax.platform_dependent(
    q.nested,
    cpu=functools.partial(_looked_up, shape),
    default=functools.partial(_spread, shape),
  )
  # Rounded twice, as bitsandbytes does. A plain sum would be contracted to one
  # multiply-add (XLA drops barriers and reduce_precision first); the minimum
  # changes no value, since units <= 1, and stands between the two.
  return jnp.minimum(units * nested, nested) + q.offset[..., None, None]


def _spread(shape: tuple[int, int], nested: jax.Array) -> jax.Array:
  """The nested scale of each of absmax's codes, f32 [..., I/block_size, O]."""
  *lead, _ = nested.shape
  each = jnp.repeat(nested, NESTED_BLOCK, axis=-1)[..., : np.prod(shape)]
  return jnp.swapaxes(each.reshape(*lead, *shape[::-1]), -1, -2)


def _looked_up(shape: tuple[int, int], nested: jax.Array) -> jax.Array:
  """`_spread` by a gather."""
  ib, o = shape
  number = jnp.arange(o)[None] * ib + jnp.arange(ib)[:, None]
  return nested.at[..., number // NESTED_BLOCK].get(mode='promise_in_bounds')


@functools.partial(jax.jit, static_argnames='dtype', inline=True)
def dequantize(q: NF4Array, dtype: jnp.dtype | None = None) -> jax.Array:
  """Levels times absmax in float32, then cast: the kernel [..., I, O].

  Bit for bit bitsandbytes' `dequantize_4bit(...).T`.

  Args:
    q: NF4Array [..., I, O].
    dtype: of the result; q.dtype if None.
  """
  scale = absmax(q)
  *lead, ib, o = scale.shape
  pairs = jnp.asarray(_PAIRS).at[q.codes].get(mode='promise_in_bounds')
  pairs = pairs.reshape(*lead, ib, q.block_size // 2, o, 2)
  w = pairs * scale[..., :, None, :, None]
  w = jnp.moveaxis(w.astype(dtype or q.dtype), -1, -2)
  return w.reshape(q.shape)


def vector_product(x_I: jax.Array, q: NF4Array) -> jax.Array:
  """x W of one vector, f32 [O]: what decoding one text multiplies.

  Levels times x are summed in each block, then the blocks' sums times their
  scales, all in float32: W is neither scaled nor brought into order, as it is
  for `x @ dequantize(q)`, which takes half as long again on a CPU.

  Args:
    x_I: [I].
    q: NF4Array [I, O], no leading axes.
  """
  i, o = q.shape
  scale = absmax(q)
  levels = jnp.asarray(LEVELS)
  codes = q.codes.reshape(i // q.block_size, q.block_size // 2, o)
  pairs = x_I.astype(jnp.float32).reshape(*codes.shape[:2], 2)
  even = levels.at[codes >> 4].get(mode='promise_in_bounds')
  odd = levels.at[codes & 15].get(mode='promise_in_bounds')
  within = jnp.sum(even * pairs[..., :1] + odd * pairs[..., 1:], axis=1)
  return jnp.sum(within * scale, axis=0)


def quantize_host(
  w_IxO: np.ndarray, block_size: int = 64, double_quant: bool = False
) -> NF4Array:
  """`quantize` for loading: numpy in, numpy out, threads, the same codes.

  Plain absmax is equal bit for bit; with double_quant its mean, and what
  follows from it, may differ in the last bit by the order of summation.

  Fastest on the transpose of a row-major (O, I) array, which is how checkpoints
  store weights. Never holds more than a small chunk in float32.

  Raises:
    ValueError: as `quantize`, and if w holds NaN or infinity.
  """
  check(w_IxO.shape, w_IxO.dtype, block_size)
  *lead, i, o = w_IxO.shape
  rows = np.ascontiguousarray(np.swapaxes(w_IxO, -1, -2))
  blocks = rows.reshape(-1, block_size)
  packed = np.empty((len(blocks), block_size // 2), np.uint8)
  scales = np.empty(len(blocks), np.float32)

  def chunk(part: slice) -> None:
    unit = blocks[part].astype(np.float32)
    top = np.abs(unit).max(axis=1)
    tiny = top < np.finfo(np.float32).tiny
    unit *= np.where(tiny, _MOST, 1 / np.where(tiny, 1, top))[:, None]
    # No clip: only w on a block's own absmax can leave [-1, 1], and it lies
    # beyond the last midpoint either way.
    codes = (unit > MIDPOINTS[0]).view(np.uint8)
    for m in MIDPOINTS[1:]:
      codes += (unit > m).view(np.uint8)
    packed[part] = codes[:, 0::2] << 4 | codes[:, 1::2]
    scales[part] = top

  # 64 Ki weights: chunk and scratch stay in a core's cache.
  step = max(1, 65536 // block_size)
  parts = [slice(n, n + step) for n in range(0, len(blocks), step)]
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(chunk, parts))
  if not np.isfinite(scales).all():
    raise ValueError(f'NF4: the weight of shape {w_IxO.shape} is not finite')
  codes = np.swapaxes(packed.reshape(*lead, o, i // 2), -1, -2)
  absmax = np.swapaxes(scales.reshape(*lead, o, i // block_size), -1, -2)
  codes, absmax = np.ascontiguousarray(codes), np.ascontiguousarray(absmax)
  q = NF4Array(codes, absmax, None, None, block_size, np.dtype(w_IxO.dtype))
  return compress_host(q) if double_quant else q


def compress_host(q: NF4Array) -> NF4Array:
  """A host NF4Array with plain absmax, its absmax in 8 bits."""
  only = q.replace(codes=np.zeros((), np.uint8))
  only = jax.device_put(only, jax.local_devices(backend='cpu')[0])
  small = jax.tree.map(np.asarray, _compress_jit(only))
  return small.replace(codes=q.codes)


_compress_jit = jax.jit(_compress)
