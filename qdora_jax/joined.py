"""A base and its adapter as one product, in 16 bits on a GPU.

The idea. y = g (x W + s (x A) B) as it stands is two products of every token
with O outputs, added and scaled. Sums and gains have to be float32 - a gain of
1.001 is less than half of bfloat16's last bit - so both products are written in
float32 and read again: on an H100 2.1 ms, where x W alone takes 1.3 (4096 x
14336, 8,192 tokens). In 1.5 ms, as one product,

  y = [x, x A] [g W; g s B]

sums stay float32 in the hardware's registers and are rounded once. A packed W
takes g up in its blocks' scales, before it is rounded, and B is thin. A W that
is stored in 16 bits would round g away: there the product comes in float32, and
is scaled as it is rounded.

The derivative is written out. A packed weight is all that is kept of W; what
comes back is rounded to 16 bits once; and g's gradient is found of the output,
sum(dy y) / g, where automatic differentiation would keep the unscaled product.
(Where g is 0 that says nothing, and nothing is to be said: dora.py gives 0 only
where W has no length, and no gradient either. What stands in for a magnitude of
0 is 0 in float16, so that there it does not move.)

On a CPU XLA multiplies 16 bits as float32 anyway, and laying factors side by
side made a step 1.2 times as long: it keeps the two products.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qdora_jax.lora import PRODUCT

_backend: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  'backend', default=None
)


@contextlib.contextmanager
def on(backend: str) -> Iterator[None]:
  """Within, what is traced is for 'cpu' or 'gpu', whatever is here."""
  token = _backend.set(backend)
  try:
    yield
  finally:
    _backend.reset(token)


def pays() -> bool:
  """Whether one product is faster than two, here or `on` another backend."""
  return (_backend.get() or jax.default_backend()) != 'cpu'


class Reader(NamedTuple):
  """How a base is read.

  Attributes:
    dense: (base, gain or None, dtype, rows or None) -> g W [I, O] in dtype,
      with the rows [R, O] below it.
    folds: whether g may be multiplied into W before W is rounded.
    packed: whether W is no array, and has no gradient.
    name: of the result, for rematerialization policies.
  """

  dense: Callable[..., jax.Array]
  folds: bool
  packed: bool
  name: str = PRODUCT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
  reader: Reader,
  x: jax.Array,
  low: jax.Array | None,
  b_RxO: jax.Array | None,
  gain_O: jax.Array | None,
  base: Any,
) -> jax.Array:
  """g (x W + low B) in x's dtype.

  Args:
    reader: of the base.
    x: [..., I], 16 bits.
    low: x A, [..., R]; None: without an adapter's product.
    b_RxO: s B, float32.
    gain_O: g, float32; None: 1.
    base: W [I, O], as the reader knows it.
  """
  return _forward(reader, x, low, b_RxO, gain_O, base)[0]


def _forward(reader, x, low, b_RxO, gain_O, base):
  inner, outer = _gains(reader, gain_O)
  left, below = x, None
  if low is not None:
    left = jnp.concatenate([x, low], axis=-1)
    below = _scaled(b_RxO, inner, x.dtype)
  right = reader.dense(base, inner, x.dtype, below)
  if outer is None:
    y = left @ right
  else:
    y = jnp.matmul(left, right, preferred_element_type=jnp.float32)
    y = (jnp.broadcast_to(outer, y.shape) * y).astype(x.dtype)
  y = checkpoint_name(y, reader.name)
  seen = None if gain_O is None else y
  own = None if reader.packed else x
  return y, (own, low, b_RxO, gain_O, base, seen)


def _backward(reader, kept, d_y):
  # The barrier keeps XLA from finding the forward pass's dense weight again,
  # and with it alive in between.
  kept, d_y = jax.lax.optimization_barrier((kept, d_y))
  x, low, b_RxO, gain_O, base, y = kept
  inner, outer = _gains(reader, gain_O)
  tokens = tuple(range(d_y.ndim - 1))
  d_gain = d_low = d_b = d_base = None
  if gain_O is not None:
    along = jnp.sum(d_y.astype(jnp.float32) * y.astype(jnp.float32), tokens)
    alive = gain_O != 0
    d_gain = jnp.where(alive, along / jnp.where(alive, gain_O, 1), 0)
  if outer is not None:
    d_y = (jnp.broadcast_to(outer, d_y.shape) * d_y).astype(d_y.dtype)
  right = reader.dense(base, inner, d_y.dtype, None)
  d_x = jnp.einsum('...o,io->...i', d_y, right)
  sums = functools.partial(
    jnp.tensordot, axes=(tokens, tokens), preferred_element_type=jnp.float32
  )
  if low is not None:
    d_low = d_y @ _scaled(b_RxO, inner, d_y.dtype).T
    d_b = _scaled(sums(low, d_y), inner, b_RxO.dtype)
  if x is not None:
    d_base = _scaled(sums(x, d_y), inner, base.dtype)
  return d_x, d_low, d_b, d_gain, d_base


product.defvjp(_forward, _backward)


def _gains(
  reader: Reader, gain_O: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
  """(what W is scaled by, what the product is scaled by)."""
  return (gain_O, None) if reader.folds else (None, gain_O)


def _scaled(
  array: jax.Array, gain_O: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
  """A matrix of O columns, times the gain."""
  return (array if gain_O is None else gain_O[None] * array).astype(dtype)
