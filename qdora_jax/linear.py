"""The seam: the only code that asks what a weight leaf is.

A weight may be a plain array, an NF4Array, a LoraWeight, a DoraWeight or a
SeveralWeight, the latter three over either of the former two. Models call
`linear(x, w)` and never know.

Training over a 4-bit base must not keep the dense weight alive between forward
and backward. Automatic differentiation would (the product's derivative needs
it), so the product with an NF4Array has its own derivative: its residual is the
packed weight, which is dequantized once in the forward pass, once in the
backward pass and dropped in between. All products that one use needs - the
tokens', the dropped tokens', the norm's A^T - share that dequantization. (In 16
bits on a GPU DoRA's gain is part of W, and the norm that it takes is found
before: by a dequantization of its own, or by the kernel of few.py.)
Under FSDP the packed arrays are gathered at the same two places, so that four
bits travel and the residual stays sharded.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qdora_jax import dora, few, joined, lora, nf4, several
from qdora_jax.dora import DoraWeight
from qdora_jax.lora import LoraWeight
from qdora_jax.nf4 import NF4Array
from qdora_jax.several import SeveralWeight


def linear(
  x: jax.Array,
  w: Any,
  bias: jax.Array | None = None,
  name: str = lora.PRODUCT,
) -> jax.Array:
  """x @ w + bias for any weight leaf, in x's dtype.

  Args:
    x: inputs [..., I]; their dtype is the compute dtype.
    w: array, NF4Array, LoraWeight, DoraWeight or SeveralWeight of shape [I, O].
    bias: [O]; never scaled by DoRA.
    name: of the product, for rematerialization policies.

  Returns:
    [..., O] in x's dtype.

  Example:
    >>> w = nf4.quantize(jax.random.normal(key, (64, 32)))
    >>> linear(jnp.ones((5, 64)), w).shape
    (5, 32)
  """
  if isinstance(w, LoraWeight | DoraWeight):
    y = _adapted(x, w, name)
  elif isinstance(w, SeveralWeight):
    y = several.apply(x, w, _readers(w.base, x.dtype)[0])
  else:
    (y,) = _products((x,), w, x.dtype)
    y = checkpoint_name(y, name)
  if bias is None:
    return y
  return y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)


def _adapted(x: jax.Array, w: LoraWeight | DoraWeight, name: str) -> jax.Array:
  if _all_at_once(x, w):
    return _one_token(x, w)
  w = lora.own(w)
  products, dense = _readers(w.base, x.dtype)
  both = _joined(x, w.base, name)
  # All that is made of tokens has one shape: what comes back as [B, L, O] and
  # goes to products as [B L, O] is made twice by XLA's CPU.
  plain = both or w.dropout_key is not None
  rows = x if plain else x.reshape(-1, x.shape[-1])
  if isinstance(w, LoraWeight):
    y = lora.apply(rows, w, products, both, name)
  else:
    y = dora.apply(rows, w, products, dense, both, name)
  return y.reshape(*x.shape[:-1], -1)


def norm(w: DoraWeight) -> jax.Array:
  """||V|| of one layer's DoraWeight at its present A and B, f32 [O]."""
  w = lora.own(w)
  products, dense = _readers(w.base, jnp.float32)
  rows = dora.norm_rows(w)
  return dora.norm(w, products(*rows)[0] if rows else None, dense)


def squared_norm(w: Any) -> jax.Array:
  """||w||^2 of a kernel per output feature, f32 [O]."""
  return dora.squared_norm(materialize(w, jnp.float32))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def per_layer(f: Callable[[Any], Any], w: Any) -> Any:
  """f of each layer of a leaf in turn: one dense kernel in memory at a time.

  Traced once for each f and shape, also where nothing else is compiled.
  """
  return f(w) if w.ndim == 2 else jax.lax.map(f, w)


def in_place(params: Any, layer: jax.Array) -> Any:
  """One layer of stacked parameters, its packed kernels not cut out.

  Nor what is adapted on them: `linear` takes it as it is.

  Args:
    params: a tree whose arrays have a leading axis of layers.
    layer: i32 [], its number.
  """

  def base(leaf: Any) -> Any:
    return leaf.base if isinstance(leaf, LoraWeight | DoraWeight) else leaf

  def packed(leaf: Any) -> bool:
    return isinstance(base(leaf), NF4Array)

  def of(leaf: Any) -> Any:
    if not packed(leaf):
      return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    told = base(leaf).replace(layer=layer)
    return told if isinstance(leaf, NF4Array) else leaf.replace(base=told)

  return jax.tree.map(of, params, is_leaf=packed)


def by_row(params: Any) -> bool:
  """Whether rows of a batch go through different weights of this tree."""

  def several_here(leaf: Any) -> bool:
    return isinstance(leaf, SeveralWeight)

  leaves = jax.tree.leaves(params, is_leaf=several_here)
  return any(map(several_here, leaves))


def materialize(w: Any, dtype: jnp.dtype | None = None) -> jax.Array:
  """The plain array [..., I, O] that a leaf stands for.

  Args:
    w: any weight leaf; leading axes allowed.
    dtype: of the result; the base's own if None.
  """
  if isinstance(w, LoraWeight | DoraWeight):
    w = lora.own(w)
    room = dora if isinstance(w, DoraWeight) else lora
    whole = room.merge(w, materialize(w.base, jnp.float32))
    return whole.astype(dtype or w.base.dtype)
  if isinstance(w, NF4Array):
    return _together(nf4.dequantize(_gather(nf4.own(w)), dtype), w)
  return jnp.asarray(w, dtype)


def scaled(w: Any, gain: jax.Array) -> Any:
  """An array or NF4Array whose outputs are gain times w's, codes unchanged.

  Args:
    w: kernel [..., I, O].
    gain: f32 [..., O]; absmax, then without double quantization, takes it up.
  """
  if isinstance(w, NF4Array):
    w = nf4.own(w)
    absmax = nf4.absmax(w) * gain[..., None, :]
    return w.replace(absmax=absmax, nested=None, offset=None)
  return (w.astype(jnp.float32) * gain[..., None, :]).astype(w.dtype)


def kind(w: Any) -> str:
  """What a leaf is, in words: 'float32', 'nf4/64 double', 'dora on nf4/64'."""
  if isinstance(w, DoraWeight):
    return f'dora on {kind(w.base)}'
  if isinstance(w, LoraWeight):
    return f'lora on {kind(w.base)}'
  if isinstance(w, NF4Array):
    return f'nf4/{w.block_size}' + (' double' if w.nested is not None else '')
  return str(w.dtype)


def _readers(base: Any, dtype: jnp.dtype) -> tuple[Callable, Callable]:
  """The two ways lora.py and dora.py read a base: products, and densely.

  Products are multiplied in dtype and come in float32, so that what is added to
  them or scales them is rounded once, at the end. (A trained gain lies within
  .0015 of 1, half a bfloat16's last bit: applied to a rounded product it would
  round away.)
  """

  def products(*rows: jax.Array) -> tuple[jax.Array, ...]:
    rows = tuple(row.astype(dtype) for row in rows)
    return _products(rows, base, jnp.float32)

  return products, functools.partial(materialize, base, jnp.float32)


def _joined(
  x: jax.Array, base: Any, name: str
) -> Callable[..., jax.Array] | None:
  """What multiplies with a base and its adapter in one go, in 16 bits, or None.

  See joined.py.
  """
  packed, one = isinstance(base, NF4Array), x.size == x.shape[-1]
  if x.dtype.itemsize != 2 or one or not joined.pays():
    return None
  if packed and few.fits(x, base):
    return None
  if packed and base.gathered is not None and base.gathered.spec[0]:
    return None  # What is split along I would be moved to be joined.
  # (A dense one that is, over `tensor`, is: then XLA moves parts of it.)
  folds = packed or base.dtype.itemsize > 2
  reader = joined.Reader(_dense, folds, packed, name)
  return functools.partial(_both, reader, base)


def _both(
  reader: joined.Reader,
  base: Any,
  x: jax.Array,
  dropped: jax.Array,
  a: jax.Array | None,
  b: jax.Array | None,
  gain: jax.Array | None,
) -> jax.Array:
  """gain (x W + dropped a b) in x's dtype."""
  low = None if a is None else lora.low(dropped, a)
  return joined.product(reader, x, low, b, gain, base)


def _all_at_once(x: jax.Array, w: LoraWeight | DoraWeight) -> bool:
  """Whether few.py takes x through w: one token, and all is known of w."""
  return (
    x.size == x.shape[-1]
    and isinstance(w.base, NF4Array)
    and few.fits(x, w.base)
    and w.lora_a is not None
    and 0 < w.lora_a.shape[-1] <= few.RANK
    and w.dropout_key is None
    and not (isinstance(w, DoraWeight) and w.norm is None)
  )


@jax.custom_vjp
def _one_token(x: jax.Array, w: LoraWeight | DoraWeight) -> jax.Array:
  """`_adapted` of one token, by the kernels of few.py."""
  thin = {'lora_b': w.lora_b, 'scale': w.scale}
  if isinstance(w, DoraWeight):
    thin |= {'magnitude': w.magnitude, 'norm': w.norm}
  return few.adapted(x, w.base, w.lora_a, thin)


def _one_token_forward(x, w):
  return _one_token(x, w), (x, w)


def _one_token_backward(kept, d_y):
  x, w = kept

  def dense(x, w):
    base = jax.lax.stop_gradient(materialize(w.base, x.dtype))
    return linear(x, lora.own(w).replace(base=base))

  return jax.vjp(dense, x, w)[1](d_y)


_one_token.defvjp(_one_token_forward, _one_token_backward)


def _dense(
  base: Any,
  gain: jax.Array | None,
  dtype: jnp.dtype,
  below: jax.Array | None = None,
) -> jax.Array:
  """gain * base with the rows `below` under it, [I (+ R), O] in dtype."""
  packed = isinstance(base, NF4Array)
  if packed:
    # Scales travel as they are stored.
    base = _gather(nf4.own(base))
    gain = None if gain is None else _together(gain, base)
  w = materialize(base if gain is None else scaled(base, gain), dtype)
  if below is None:
    return w
  return jnp.concatenate([w, _together(below, base) if packed else below])


def _products(
  rows: tuple[jax.Array, ...], base: Any, out: jnp.dtype
) -> tuple[jax.Array, ...]:
  """Each row's product with one reading of the base, in dtype `out`."""
  dtype = rows[0].dtype
  if isinstance(base, NF4Array):
    return _nf4_products((dtype, jnp.dtype(out)), rows, base)
  return _multiply(rows, materialize(base, dtype), out)


def _multiply(
  rows: tuple[jax.Array, ...], w: jax.Array, out: jnp.dtype
) -> tuple[jax.Array, ...]:
  """row @ w for each, multiplied in w's dtype."""
  return tuple(product(row.astype(w.dtype), w, out) for row in rows)


def product(x: jax.Array, w_IxO: jax.Array, out: jnp.dtype) -> jax.Array:
  """x @ w in dtype `out`; forward and backward multiplied in their own dtype.

  Automatic differentiation would multiply what comes back as it comes, in
  `out`: for float32 sums of 16-bit products in float32, and w with it.

  Args:
    x: [..., I].
    w_IxO: in x's dtype.
    out: of the result [..., O].
  """
  return _product(jnp.dtype(out), x, w_IxO)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(out: jnp.dtype, x: jax.Array, w_IxO: jax.Array) -> jax.Array:
  return jnp.matmul(x, w_IxO, preferred_element_type=out)


def _product_forward(out, x, w_IxO):
  return _product(out, x, w_IxO), (x, w_IxO)


def _product_backward(out, kept, d_y):
  x, w_IxO = kept
  d_y = d_y.astype(w_IxO.dtype)
  tokens = tuple(range(x.ndim - 1))
  # w.T would be another array: under FSDP gathered once more.
  d_x = jnp.einsum('...o,io->...i', d_y, w_IxO)
  # Automatic differentiation would find this one transposed, by a transposed
  # copy of d_y, which XLA's CPU makes anew from all that d_y is made of.
  return d_x, jnp.tensordot(x, d_y, (tokens, tokens))


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nf4_products(
  dtypes: tuple[jnp.dtype, jnp.dtype], rows: tuple[jax.Array, ...], q: NF4Array
) -> tuple[jax.Array, ...]:
  """`_multiply` by a frozen packed weight, which is all that is kept.

  Few rows, as in decoding, are spared dequantization.
  """
  dtype, out = dtypes
  if all(few.fits(row, q) for row in rows):
    return tuple(few.product(row, q).astype(out) for row in rows)
  if all(row.size == q.shape[0] for row in rows):
    q = _gather(nf4.own(q))
    sums = (nf4.vector_product(row.reshape(-1), q) for row in rows)
    return tuple(
      y.reshape(*row.shape[:-1], -1).astype(out)
      for y, row in zip(sums, rows, strict=True)
    )
  return _multiply(rows, materialize(q, dtype), out)


def _nf4_products_forward(dtypes, rows, q):
  return _nf4_products(dtypes, rows, q), q


def _nf4_products_backward(dtypes, q, cotangents):
  # The barrier keeps XLA from finding the forward pass's dense weight again,
  # and with it alive in between.
  q, cotangents = jax.lax.optimization_barrier((q, cotangents))
  dtype, _ = dtypes
  return _multiply(cotangents, materialize(q, dtype).T, dtype), None


_nf4_products.defvjp(_nf4_products_forward, _nf4_products_backward)


def _gather(q: NF4Array) -> NF4Array:
  """One layer's packed arrays, brought together over FSDP's axis if told to."""
  return q.replace(codes=_together(q.codes, q), absmax=_together(q.absmax, q))


def _together(array: jax.Array, q: NF4Array) -> jax.Array:
  """An array of a layer's kernel where q says that it is to be gathered.

  The dense weight, too: XLA would split it again as the arrays are split that
  it meets, and gather it once more.
  """
  if q.gathered is None or array.ndim > 2:
    return array
  # Where a device has its own rows alone (`sharding.by_rows`), spec is of what
  # is left of the mesh.
  manual = jax.sharding.get_abstract_mesh().manual_axes
  where = P(*q.gathered.spec[-array.ndim :])
  where = where if manual else NamedSharding(q.gathered.mesh, where)
  return jax.lax.with_sharding_constraint(array, where)
