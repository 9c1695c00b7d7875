"""DoRA: train a weight's direction with LoRA and its magnitude apart.

The idea. Full fine-tuning changes the length and the direction of a weight's
columns almost independently; LoRA couples them. DoRA (Liu et al. 2024, arXiv
2402.09353) gives every output feature a trained magnitude m and lets LoRA turn
the direction only:

  V = W + s A B        g = m / ||V||        y = g * (x W + s (x A) B) + bias

||.|| is the norm over the in axis of a Flax kernel, one number per output
feature, and is treated as a constant in differentiation (section 4.3 of the
paper: a quarter of the memory saved, no loss of quality). m starts as ||W||,
so adapting changes nothing at first. The bias is not scaled. With dropout,
the base product keeps its undropped input (PEFT's rule):

  y = x W + (g - 1) * (d W) + g s (d A) B + bias        d = drop(x)

The norm, factored. V need not be formed. Per output feature

  ||V||^2 = ||W||^2 + 2 s sum_r B * (A^T W) + s^2 sum_r B * (A^T A B)

||W||^2 never changes and is computed once (`transforms.norms`), A^T W is R more
rows for the product with W that is made anyway (where g is needed first, in
16 bits on a GPU, a thin product of its own), the rest is thin. Nothing of
size I x O appears. Float32 error 1.3e-7; the dense form has 2.5e-7.

Zero output features. Real models have outputs whose weights are all zero
(Llama-3.1-8B's o_proj: 511). Public codes divide by that norm and give NaN;
here g = 0 and its gradient is zero.

What the alternatives do. PEFT forms V densely at each step; fsdp_qlora drops
alpha/R and scales the bias; torchtune scales the bias. PEFT is matched. This
file never hears how W is stored.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qdora_jax import lora

# Name of ||V||, for rematerialization policies: O numbers that cost a product
# with W to find again.
NORM = 'norm'


class DoraWeight(flax.struct.PyTreeNode):
  """m * V / ||V|| with V = W + scale * A B, as a leaf of a parameter tree.

  A layer of a stack whose scale is 0 is not adapted: there g = 1. A base may be
  told its layer, see LoraWeight.

  Attributes:
    base: W [..., I, O], frozen; any leaf that `linear` takes.
    lora_a: A [..., I, R]; None to train the magnitude alone.
    lora_b: B [..., R, O]; None to train the magnitude alone.
    magnitude: m [..., O].
    scale: s, f32 [...].
    squared_norm: ||W||^2, f32 [..., O]; None computes it at every use.
    norm: ||V||, f32 [..., O], held constant; None computes it at every use.
    dropout_key: PRNG key [...] for adapter dropout; None switches it off.
    dropout: probability of zeroing an entry of the adapter's input.
    factored: use the factored norm; False forms V densely.
    detach: hold the norm constant in differentiation.
  """

  base: Any
  lora_a: jax.Array | None
  lora_b: jax.Array | None
  magnitude: jax.Array
  scale: jax.Array | float
  squared_norm: jax.Array | None = None
  norm: jax.Array | None = None
  dropout_key: jax.Array | None = None
  dropout: float = flax.struct.field(pytree_node=False, default=0.0)
  factored: bool = flax.struct.field(pytree_node=False, default=True)
  detach: bool = flax.struct.field(pytree_node=False, default=True)

  @property
  def ndim(self) -> int:
    return self.base.ndim

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape


def root(squared_norm: jax.Array) -> jax.Array:
  """sqrt whose derivative is 0, not infinite, where the norm is zero."""
  alive = squared_norm > 0
  return jnp.where(alive, jnp.sqrt(jnp.where(alive, squared_norm, 1)), 0)


def squared_norm(w_IxO: jax.Array) -> jax.Array:
  """||W||^2 over the in axis in float32, [..., I, O] -> [..., O]."""
  return jnp.sum(jnp.square(w_IxO.astype(jnp.float32)), axis=-2)


def factored_squared_norm(
  squared_norm_O: jax.Array,
  a_IxR: jax.Array,
  b_RxO: jax.Array,
  atw_RxO: jax.Array,
  scale: jax.Array | float,
) -> jax.Array:
  """||W + s A B||^2 per output feature from thin products, f32 [O].

  Args:
    squared_norm_O: ||W||^2.
    a_IxR: A.
    b_RxO: B.
    atw_RxO: A^T W.
    scale: s.
  """
  cross = jnp.sum(b_RxO * atw_RxO, axis=-2)
  update = jnp.sum(b_RxO * ((a_IxR.T @ a_IxR) @ b_RxO), axis=-2)
  return squared_norm_O + 2 * scale * cross + scale**2 * update


def norm(
  w: DoraWeight, atw_RxO: jax.Array | None, dense: Callable[[], jax.Array]
) -> jax.Array:
  """||V|| per output feature, f32 [O]; a constant if w.detach.

  Args:
    w: one layer's leaf.
    atw_RxO: A^T W for the factored form; None forms V densely.
    dense: gives W in float32; called only where a dense W is asked for.
  """
  hold = jax.lax.stop_gradient if w.detach else lambda a: a
  if w.lora_a is not None and atw_RxO is None:
    return root(hold(squared_norm(dense() + lora.delta(w))))
  squared = w.squared_norm
  if squared is None:
    squared = jax.lax.stop_gradient(squared_norm(dense()))
  if w.lora_a is not None:
    squared = factored_squared_norm(
      squared, w.lora_a, w.lora_b, atw_RxO, w.scale
    )
  return root(hold(squared))


def gain(
  magnitude: jax.Array, norm: jax.Array, scale: jax.Array | float
) -> jax.Array:
  """g = m / ||V||, [..., O]; 0 where V is zero, 1 where scale is 0.

  Args:
    magnitude: m [..., O].
    norm: ||V|| [..., O].
    scale: s [...].
  """
  adapted = jnp.asarray(scale)[..., None] != 0
  alive = norm > 0
  # The division comes last: XLA's CPU makes that once, and what else there is
  # anew for every token.
  above = jnp.where(adapted, jnp.where(alive, magnitude, 0), 1)
  return above / jnp.where(adapted & alive, norm, 1)


def norm_rows(w: DoraWeight) -> tuple[jax.Array, ...]:
  """What the norm asks of the product with W: (A^T,) or nothing."""
  if w.norm is not None or w.lora_a is None or not w.factored:
    return ()
  return (jax.lax.stop_gradient(w.lora_a.T) if w.detach else w.lora_a.T,)


def apply(
  x: jax.Array,
  w: DoraWeight,
  products: Callable[..., tuple[jax.Array, ...]],
  dense: Callable[[], jax.Array],
  joined: Callable[..., jax.Array] | None = None,
  name: str = lora.PRODUCT,
) -> jax.Array:
  """g * (x W + s (x A) B) in x's dtype, by PEFT's dropout rule.

  Args:
    x: inputs [..., I].
    w: one layer's leaf: base [I, O], no leading axes.
    products: `products(x1, x2, ...)` gives (x1 W, x2 W, ...) in float32 and
      reads W once.
    dense: gives W in float32; called only where a dense W is asked for.
    joined: `joined(x, d, a, b, gain)` gives gain (x W + d a b) in x's dtype in
      one go. None: to be put together here, as with dropout.
    name: of what the gain's gradient asks for, for rematerialization policies.
  """
  dropped = lora.drop(x, w)
  if joined is not None and dropped is x:
    rows = norm_rows(w)
    atw = products(*rows)[0] if rows else None
    b = None if w.lora_b is None else w.scale * w.lora_b
    return joined(x, x, w.lora_a, b, _own_gain(w, atw, dense))
  rows = (x,) if dropped is x else (x, dropped)
  outs = products(*rows, *norm_rows(w))
  turned = outs[len(rows) - 1]
  atw = outs[-1] if norm_rows(w) else None
  g = _own_gain(w, atw, dense)
  if w.lora_a is not None:
    turned += lora.correction(dropped, w)
  turned = checkpoint_name(turned, name)
  if dropped is x:
    return _times(g, turned).astype(x.dtype)
  left_out = checkpoint_name(outs[0] - outs[1], lora.PRODUCT)
  return (left_out + _wide(g, turned) * turned).astype(x.dtype)


def _own_gain(
  w: DoraWeight, atw_RxO: jax.Array | None, dense: Callable[[], jax.Array]
) -> jax.Array:
  """`gain`, but too small to be seen where m is 0: see `_times`."""
  stand_in = jax.lax.stop_gradient(jnp.where(w.magnitude == 0, 2.0**-60, 0))
  return gain(w.magnitude + stand_in, _length(w, atw_RxO, dense), w.scale)


@jax.custom_vjp
def _times(g_O: jax.Array, turned: jax.Array) -> jax.Array:
  """g turned, f32 [..., O].

  Its derivative multiplies what comes back by g, as the products that it goes
  to want it, and finds g's own gradient of that: sum(g d_y turned) / g. So d_y
  itself, which automatic differentiation sums, need never be in memory. A g of
  0 would get none: there V has no length, `_own_gain` sees to that.
  """
  return _wide(g_O, turned) * turned


def _wide(g_O: jax.Array, like: jax.Array) -> jax.Array:
  return jnp.broadcast_to(g_O, like.shape)


def _times_forward(g_O, turned):
  return _times(g_O, turned), (g_O, turned)


def _times_backward(kept, d_y):
  g_O, turned = kept
  d_turned = _wide(g_O, d_y) * d_y
  along = jnp.sum(d_turned * turned, axis=tuple(range(d_y.ndim - 1)))
  alive = g_O != 0
  d_g = jnp.where(alive, along / jnp.where(alive, g_O, 1), 0)
  return d_g, d_turned


_times.defvjp(_times_forward, _times_backward)


def _length(
  w: DoraWeight, atw_RxO: jax.Array | None, dense: Callable[[], jax.Array]
) -> jax.Array:
  """`norm`, if w does not know it; kept for the backward pass."""
  if w.norm is not None:
    return w.norm
  if atw_RxO is not None:
    # Read again on the way back only where the norm is not held constant.
    atw_RxO = checkpoint_name(atw_RxO, lora.PRODUCT)
  return checkpoint_name(norm(w, atw_RxO, dense), NORM)


def merge(w: DoraWeight, base_IxO: jax.Array) -> jax.Array:
  """The plain weight m * V / ||V|| in the dtype of the given dense base."""
  v = base_IxO.astype(jnp.float32)
  if w.lora_a is not None:
    v += lora.delta(w)
  g = gain(w.magnitude, root(squared_norm(v)), w.scale)
  return (g[..., None, :] * v).astype(base_IxO.dtype)
