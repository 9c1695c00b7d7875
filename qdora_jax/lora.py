"""LoRA: a frozen weight plus a trained product of two thin matrices.

The idea. Fine-tuning moves a weight along few directions. Freeze W and train
only a rank-R correction (Hu et al. 2021, arXiv 2106.09685):

  y = x W + s (x A) B        s = alpha / R   (rsLoRA: alpha / sqrt(R))

A starts random and B zero, so adapting changes nothing at first. Adapter
dropout acts on the input of A alone.

The layout. W_IxO is a Flax kernel, A_IxR `lora_a`, B_RxO `lora_b`; PEFT stores
the transposes. In a stack of layers all three have a leading layer axis and
`scale` is one number per layer; ranks that differ by layer are padded with
zeros, which stay zero under any update proportional to the gradient.

What the alternative does. PEFT wraps modules; here the weight itself is a leaf
that knows its correction, and W may be anything `linear` can multiply with.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Names for rematerialization policies: of x A; of a whole product, x W with
# what an adapter adds to it; and of a block's last product, which in the
# backward pass only DoRA's gain asks for, or a norm behind it.
LOW, PRODUCT, LAST = 'low', 'product', 'last'


class LoraWeight(flax.struct.PyTreeNode):
  """W + scale * A B, as a leaf of a parameter tree.

  Where the base is told its layer, all other arrays, too, are those of many
  layers, with a leading axis that shape does not show; `own` cuts its own out.

  Attributes:
    base: W [..., I, O], frozen; any leaf that `linear` takes.
    lora_a: A [..., I, R].
    lora_b: B [..., R, O].
    scale: s, f32 [...].
    dropout_key: PRNG key [...] for adapter dropout; None switches it off.
    dropout: probability of zeroing an entry of A's input.
  """

  base: Any
  lora_a: jax.Array
  lora_b: jax.Array
  scale: jax.Array | float
  dropout_key: jax.Array | None = None
  dropout: float = flax.struct.field(pytree_node=False, default=0.0)

  @property
  def ndim(self) -> int:
    return self.base.ndim

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape


def init(
  key: jax.Array, init: str, i: int, rank: int, o: int
) -> tuple[jax.Array, jax.Array]:
  """A [I, R] and B [R, O] whose product is zero, float32, as PEFT draws them.

  Args:
    key: PRNG key.
    init: 'kaiming', A uniform in +-1/sqrt(I) (torch's initialization of a
      Linear) and B zero; 'gaussian', A normal of deviation 1/R and B zero; or
      'orthogonal', both random and small, A in directions that B does not read.
    i, rank, o: I, R (even for 'orthogonal'), O.
  """
  if init == 'kaiming':
    bound = i**-0.5
    a = jax.random.uniform(key, (i, rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((rank, o))
  if init == 'gaussian':
    a = jax.random.normal(key, (i, rank), jnp.float32) / max(rank, 1)
    return a, jnp.zeros((rank, o))
  # PEFT's orthogonal_init: alternate rows of a rotation span A and B.
  keys = jax.random.split(key, 3)
  turn, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank)))
  a = jax.random.normal(keys[1], (i, rank // 2)) @ turn[0::2] / 10
  b = turn[1::2].T @ jax.random.normal(keys[2], (rank // 2, o)) / 10
  return a, b


def own(w: Any) -> Any:
  """w with its own layer's arrays alone; the base stays as it is."""
  n = getattr(w.base, 'layer', None)
  if n is None:
    return w
  thin = jax.tree.map(lambda array: array[n], w.replace(base=None))
  return thin.replace(base=w.base)


def delta(w: Any) -> jax.Array:
  """scale * A B in float32, [..., I, O]: what adapting adds to the base."""
  scale = jnp.asarray(w.scale, jnp.float32)[..., None, None]
  return scale * (w.lora_a @ w.lora_b)


def drop(x: jax.Array, w: Any) -> jax.Array:
  """Adapter dropout of x, scaled to keep its mean; x itself when off."""
  if w.dropout_key is None or not w.dropout:
    return x
  keep = jax.random.bernoulli(w.dropout_key, 1 - w.dropout, x.shape)
  return jnp.where(keep, x / (1 - w.dropout), 0)


def correction(x: jax.Array, w: Any) -> jax.Array:
  """s (x A) B, [..., I] -> float32 [..., O]; products in x's dtype."""
  return _thin(x, w.lora_a, w.lora_b, jnp.asarray(w.scale, jnp.float32))


@jax.custom_vjp
def _thin(
  x: jax.Array, a_IxR: jax.Array, b_RxO: jax.Array, scale: jax.Array
) -> jax.Array:
  """s (x A) B.

  Its derivative is written out for what automatic differentiation leaves to
  chance. The gradients of A and B are summed in float32, and copy R numbers a
  token and no more: XLA's CPU copies the left one of two factors transposed, so
  A's is found transposed, and a barrier keeps XLA from turning it back. What
  came back meets s behind the thin products, so that it stays the array that
  the product with the base is given, too. s is constant.
  """
  return _thin_forward(x, a_IxR, b_RxO, scale)[0]


def _thin_forward(x, a_IxR, b_RxO, scale):
  low = checkpoint_name(x @ a_IxR.astype(x.dtype), LOW)
  high = jnp.matmul(
    low, b_RxO.astype(x.dtype), preferred_element_type=jnp.float32
  )
  return scale * high, (x, low, a_IxR, b_RxO, scale)


def _thin_backward(kept, d_y):
  x, low, a_IxR, b_RxO, scale = kept
  d_y = d_y.astype(x.dtype)
  d_low = (scale * (d_y @ b_RxO.astype(x.dtype).T)).astype(x.dtype)
  tokens = tuple(range(x.ndim - 1))

  def gradient(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.tensordot(
      left, right, (tokens, tokens), preferred_element_type=jnp.float32
    )

  d_x = d_low @ a_IxR.astype(x.dtype).T
  d_a = jax.lax.optimization_barrier(gradient(d_low, x)).T
  d_b = scale * gradient(low, d_y)
  return d_x, d_a.astype(a_IxR.dtype), d_b.astype(b_RxO.dtype), None


_thin.defvjp(_thin_forward, _thin_backward)


@jax.custom_vjp
def low(x: jax.Array, a_IxR: jax.Array) -> jax.Array:
  """x A, [..., R] in x's dtype; the gradient of A is summed in float32."""
  return checkpoint_name(x @ a_IxR.astype(x.dtype), LOW)


def _low_forward(x, a_IxR):
  return low(x, a_IxR), (x, a_IxR)


def _low_backward(kept, d_low):
  x, a_IxR = kept
  tokens = tuple(range(x.ndim - 1))
  d_a = jnp.tensordot(
    x, d_low, (tokens, tokens), preferred_element_type=jnp.float32
  )
  return d_low @ a_IxR.astype(x.dtype).T, d_a.astype(a_IxR.dtype)


low.defvjp(_low_forward, _low_backward)


def apply(
  x: jax.Array,
  w: LoraWeight,
  products: Callable[..., tuple[jax.Array, ...]],
  joined: Callable[..., jax.Array] | None = None,
  name: str = PRODUCT,
) -> jax.Array:
  """x W + s (drop(x) A) B in x's dtype.

  Args:
    x: inputs [..., I].
    w: one layer's leaf: base [I, O], no leading axes.
    products: `products(x1, x2, ...)` gives (x1 W, x2 W, ...) in float32.
    joined: `joined(x, d, a, b, gain)` gives gain (x W + d a b) in x's dtype in
      one go. None: to be put together here.
    name: of the result, for rematerialization policies.
  """
  if joined is not None:
    return joined(x, drop(x, w), w.lora_a, w.scale * w.lora_b, None)
  (y,) = products(x)
  y += correction(drop(x, w), w)
  return checkpoint_name(y.astype(x.dtype), name)


def merge(w: LoraWeight, base_IxO: jax.Array) -> jax.Array:
  """The plain weight W + s A B in the dtype of the given dense base."""
  return (base_IxO.astype(jnp.float32) + delta(w)).astype(base_IxO.dtype)
