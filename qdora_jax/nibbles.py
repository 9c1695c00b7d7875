"""What packed bytes weigh, in a GPU's registers: look-ups and dot products.

The idea. A level of NF4 is one of 16 numbers. `prmt`, an instruction of
NVIDIA's GPUs, takes four bytes of eight by four selectors, which two packed
bytes are; two of them, and a choice by the fourth bit, are a table of 16 bytes:
four nibbles are looked up at once, without memory. Two such tables, of lower
and of upper bytes, hold numbers of 16 bits.

For several tokens these are the levels in the tokens' dtype, and go to tensor
cores. For one token they are fixed-point numbers, and another instruction,
`dp4a`, sums up four products of signed bytes. With h and l for upper and lower
bytes, inputs x in the unit of the largest among them,

  w x = (256 wh + wl) (256 xh + xl)
      = 256 (256 wh xh + wh xl + wl xh) + wl xl

of which the last is left out: that and the rounding are some 5e-5 of a
product's norm for normal inputs, 1.5e-4 where one dwarfs those beside it.
Levels in half precision cost 1.5e-4, in bfloat16 1e-3.

Functions here take part in the programs of few_kernels.py. Tests run them by
JAX, `INTERPRET`, without those instructions, and these by themselves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import nf4

try:
  from jax.experimental.pallas import triton
except ImportError:  # pragma: no cover
  triton = None

# For tests without a GPU: programs run as JAX, without its instructions.
INTERPRET = False
# The largest level, or input, in fixed point: bytes of 127 and 127.
UNIT = 127 * 256 + 127
# Where inputs go in a word: nibbles of bytes one below the other count from the
# low end, and a byte's high one comes first.
_PLACES = 1, 0, 3, 2
# 1.5 * 2^23 as f32: of a sum with it the last bit is 1.
_WHOLE, _WHOLE_BITS = 12582912.0, 0x4B400000


def words(dtype: jnp.dtype | None) -> np.ndarray:
  """A table of the levels, i32 [8]: 16 lower bytes, then 16 upper ones.

  Args:
    dtype: of 16 bits; None: in fixed point, where both bytes are signed.
  """
  if dtype is None:
    whole = np.round(nf4.LEVELS.astype(np.float64) * UNIT).astype(np.int32)
    bits = ((whole + 128 >> 8 & 255) << 8 | whole & 255).astype('<u2')
  else:
    bits = nf4.LEVELS.astype(dtype)
  pairs = bits.view(np.uint8).reshape(16, 2)
  return np.ascontiguousarray(pairs.T).view('<i4').reshape(8)


def levels(
  packed: jax.Array, table: list[jax.Array], dtype: jnp.dtype
) -> list[jax.Array]:
  """Levels of bytes in 16 bits: those of high nibbles, those of low ones.

  Args:
    packed: u8 [n, C].
    table: `words(dtype)`, each as an array [n, C].
    dtype: of the table and the results.
  """
  if INTERPRET:
    codes = packed.astype(jnp.int32)
    return [_looked_up(half, table, dtype) for half in (codes >> 4, codes & 15)]
  # (Pallas hands on one result: what the two share, ptxas does once.)
  return [
    _assembly(look_up(high), 2, (packed, *table), dtype)
    for high in (True, False)
  ]


def split(
  fours: list[jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Some inputs in fixed point: (their unit, (upper bytes, lower bytes)).

  What `dot` makes of the bytes, times the unit, is a sum of levels times
  inputs; NaN if one of these is not finite.

  Args:
    fours: four f32 [n], inputs 4 k, 4 k + 1, 4 k + 2 and 4 k + 3.
  """
  most = jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, fours)), axis=0)
  inverse = jnp.where(most > 0, UNIT / jnp.where(most > 0, most, 1), 0)
  upper = lower = jnp.zeros(fours[0].shape, jnp.int32)
  for x, place in zip(fours, _PLACES, strict=True):
    bits = jax.lax.bitcast_convert_type(x * inverse + _WHOLE, jnp.int32)
    whole = bits - _WHOLE_BITS
    lower |= (whole & 255) << 8 * place
    upper |= (whole + 128 >> 8 & 255) << 8 * place
  # (A GPU's maximum passes NaN over.)
  lost = jnp.sum(functools.reduce(jnp.add, (0 * x for x in fours)), axis=0)
  return (most + lost) * (256 / UNIT**2), (upper, lower)


def dot(
  packed: list[jax.Array],
  table: list[jax.Array],
  inputs: tuple[jax.Array, jax.Array],
) -> jax.Array:
  """Levels times four inputs, in fixed point, i32 [n, C].

  The sum of 128 of them fits 32 bits.

  Args:
    packed: two u8 [n, C], bytes of rows 2 k and of rows 2 k + 1.
    table: `words(None)`, each as an array [n, C].
    inputs: bytes of `split`, likewise, the same in all columns: where four of a
      row meet in a thread, those of the first are read.
  """
  if not INTERPRET:
    arrays = *packed, *table, *inputs
    return _assembly(dot_product(), 4, arrays, jnp.dtype(jnp.int32))
  upper, lower = inputs
  whole = 0
  nibbles = (nibble for p in packed for nibble in (p & 15, p >> 4))
  for k, code in enumerate(nibbles):
    low, high = (
      _entry(half, code.astype(jnp.int32)) for half in (table[:4], table[4:])
    )
    whole += 256 * high * _byte(upper, k)
    whole += high * _byte(lower, k) + low * _byte(upper, k)
  return whole


def _byte(word: jax.Array, k: jax.Array | int) -> jax.Array:
  """Byte k of words, signed."""
  return word << 24 - 8 * k >> 24


def _entry(table: list[jax.Array], codes: jax.Array) -> jax.Array:
  """Signed bytes of a table of four words."""
  word = jnp.select([codes >> 2 == k for k in range(4)], table)
  return _byte(word, codes & 3)


def _looked_up(
  codes: jax.Array, table: list[jax.Array], dtype: jnp.dtype
) -> jax.Array:
  """Numbers of 16 bits."""
  low, high = (_entry(half, codes) & 255 for half in (table[:4], table[4:]))
  bits = (high << 8 | low).astype(jnp.uint16)
  return jax.lax.bitcast_convert_type(bits, dtype)


def _assembly(
  lines: str, results: int, arrays: tuple[jax.Array, ...], dtype: jnp.dtype
) -> jax.Array:
  """PTX on four numbers of each array at a time; a word holds four bytes."""
  registers = sum(max(1, array.dtype.itemsize) for array in arrays)
  (made,) = triton.elementwise_inline_asm(
    lines,
    args=arrays,
    constraints=','.join(['=&r'] * results + ['r'] * registers),
    pack=4,
    result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, dtype)],
  )
  return made


_REGISTERS = '.reg .b32 r, s, t, u, v, x, y;'


def _table(first: int) -> list[str]:
  """Registers of a table: of a word's four, which are equal, the first."""
  return [f'${first + 4 * k}' for k in range(8)]


def _selectors(word: str) -> list[str]:
  """Of each nibble s, its place in half a table, and t, which of the halves."""
  return [
    f'and.b32 s, {word}, 0x77777777;',
    f'shr.u32 t, {word}, 1;',
    'and.b32 t, t, 0x44444444;',
    'or.b32 t, t, 0x32103210;',
  ]


def _four(table: list[str]) -> list[str]:
  """Lower bytes x and upper bytes y of four nibbles; then the next four."""
  lines = []
  for to, (a, b, c, d) in (('x', table[:4]), ('y', table[4:])):
    lines += [
      f'prmt.b32 u, {a}, {b}, s;',
      f'prmt.b32 v, {c}, {d}, s;',
      f'prmt.b32 {to}, u, v, t;',
    ]
  return [*lines, 'shr.u32 s, s, 16;', 'shr.u32 t, t, 16;']


@functools.cache
def look_up(high: bool) -> str:
  """PTX: of four bytes $2 four levels, by the words from $3 on.

  Two in $0 and two in $1, the first one below.

  Args:
    high: of the bytes' high nibbles; or of the low ones.
  """
  lines = ['{', _REGISTERS, *_selectors('$2')]
  for n in (0, 1):
    lines += _four(_table(3))
    lines.append(f'prmt.b32 ${n}, x, y, {"0x7351" if high else "0x6240"};')
  return '\n'.join([*lines, '}'])


@functools.cache
def dot_product() -> str:
  """PTX: `dot` of four bytes $4 and the four below them, $5: $0 to $3.

  Words of the table from $6 on, upper bytes of the inputs $38, lower ones $42.
  """
  lines = ['{', _REGISTERS]
  for n, pair in ((0, '0x5140'), (2, '0x7362')):
    # Of two columns the byte above, then the one below.
    lines += [f'prmt.b32 r, $4, $5, {pair};', *_selectors('r')]
    for k in (n, n + 1):
      lines += [
        *_four(_table(6)),
        f'dp4a.s32.s32 ${k}, y, $38, 0;',
        f'shl.b32 ${k}, ${k}, 8;',
        f'dp4a.s32.s32 ${k}, y, $42, ${k};',
        f'dp4a.s32.s32 ${k}, x, $38, ${k};',
      ]
  return '\n'.join([*lines, '}'])
