"""Several adapters on one weight: every row of a batch goes through its own.

  y[n] = g[e] * (x[n] W + s[e] (x[n] A[e]) B[e]) + bias      e = rows[n]

g is DoRA's gain m / ||V||, computed beforehand, and 1 for LoRA; an adapter that
leaves this weight alone has s = 0 and g = 1. The product with W, which may be
packed, is one for all rows: the adapters cost what they cost alone. For
inference: nothing here is trained.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp


class SeveralWeight(flax.struct.PyTreeNode):
  """A base and E adapters, as a leaf of a parameter tree.

  Attributes:
    base: W [..., I, O]; any leaf that `linear` takes.
    lora_a: A [..., E, I, R]; smaller ranks are padded with zeros.
    lora_b: B [..., E, R, O].
    scale: s, f32 [..., E].
    gain: g, f32 [..., E, O].
    rows: int32 [..., B], the adapter of each row of the batch.
  """

  base: Any
  lora_a: jax.Array
  lora_b: jax.Array
  scale: jax.Array
  gain: jax.Array
  rows: jax.Array

  @property
  def ndim(self) -> int:
    return self.base.ndim

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape


def apply(
  x_BxLxI: jax.Array,
  w: SeveralWeight,
  products: Callable[..., tuple[jax.Array, ...]],
) -> jax.Array:
  """Each row through its adapter, in x's dtype.

  Args:
    x_BxLxI: inputs; B as many as w.rows.
    w: one layer's leaf.
    products: `products(x)` gives (x W,) in float32.
  """
  if x_BxLxI.shape[0] != w.rows.shape[-1]:
    raise ValueError(
      f'a batch of {x_BxLxI.shape[0]} rows meets adapters for '
      f'{w.rows.shape[-1]}: expected one for each'
    )
  dtype = x_BxLxI.dtype
  (y_BxLxO,) = products(x_BxLxI)
  a_BxIxR, b_BxRxO = w.lora_a[w.rows], w.lora_b[w.rows]
  low = jnp.einsum('bli,bir->blr', x_BxLxI, a_BxIxR.astype(dtype))
  high = jnp.einsum(
    'blr,bro->blo',
    low,
    b_BxRxO.astype(dtype),
    preferred_element_type=jnp.float32,
  )
  y_BxLxO += w.scale[w.rows][:, None, None] * high
  return (w.gain[w.rows][:, None] * y_BxLxO).astype(dtype)
