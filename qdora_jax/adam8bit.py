"""AdamW whose moments take one byte a parameter (Dettmers et al., 2110.02861).

Each moment is stored as 8-bit codes and, for every 256 of them, the largest
magnitude. A code stands for a level of a dynamic map: steps that are fine near
zero and coarse near one, so that moments of very different sizes share a block;
signed levels for the first moment, twice as many positive ones for the second.
An update decodes both, moves them as Adam does, takes its step from what they
are now, and only then rounds them again.

Facts are those of bitsandbytes 0.50 (AdamW8bit): blocks of 256 numbers in the
array's own order, an array of fewer than 4,096 numbers in 32 bits, epsilon
beside the corrected root, decay apart from the moments. Each layer of a stack
is an array of its own. Our kernels are (in, out) where torch's are (out, in),
so that blocks run along the outputs here.

Codes have their parameter's shape, and are placed on a mesh like it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdora_jax import paths
from qdora_jax.nf4 import DYNAMIC_MAP, UNSIGNED_MAP

# bitsandbytes: Optimizer2State.init_state's blocksize and min_8bit_size.
BLOCK = 256
LEAST = 4096


class Blocks(NamedTuple):
  """A moment in 8 bits: about 1 + 4 / 256 bytes a number.

  Attributes:
    codes8: u8, of the parameter's shape.
    absmax8: f32 [..., I, O/256] where 256 divides the last axis, else [N, n]
      for a stack and [n] for other arrays, blocks of all their numbers.
  """

  codes8: jax.Array
  absmax8: jax.Array


class Adam8bitState(NamedTuple):
  """Updates so far, and both moments: trees of Blocks, or of float32."""

  count: jax.Array
  mu: Any
  nu: Any


def adamw8bit(
  learning_rate: float | optax.Schedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformation:
  """AdamW with moments in 8 bits; the arguments are `optax.adamw`'s."""
  return optax.chain(
    scale_by_adam8bit(b1, b2, eps),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def scale_by_adam8bit(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adam's direction, before the learning rate and decay."""

  def init(params: Any) -> Adam8bitState:
    zeros = jax.tree_util.tree_map_with_path(_zeros, params)
    again = jax.tree_util.tree_map_with_path(_zeros, params)
    return Adam8bitState(jnp.zeros((), jnp.int32), zeros, again)

  def update(
    grads: Any, state: Adam8bitState, params: Any = None
  ) -> tuple[Any, Adam8bitState]:
    del params
    count = optax.safe_increment(state.count)
    # Products, not quotients: XLA would choose one of them by what is around.
    first, second = 1 / (1 - b1**count), 1 / jnp.sqrt(1 - b2**count)

    def one(g: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
      g = g.astype(jnp.float32)
      m = b1 * decode(mu, DYNAMIC_MAP) + (1 - b1) * g
      v = b2 * decode(nu, UNSIGNED_MAP) + (1 - b2) * g * g
      step = (m * first) / (jnp.sqrt(v) * second + eps)
      return step, encode(m, mu, DYNAMIC_MAP), encode(v, nu, UNSIGNED_MAP)

    leaves, tree = jax.tree.flatten(grads)
    moments = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
    made = [one(*parts) for parts in zip(leaves, *moments, strict=True)]
    steps, mu, nu = (tree.unflatten(part[n] for part in made) for n in range(3))
    return steps, Adam8bitState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def _zeros(path: Any, param: jax.Array) -> Any:
  """A moment at its start."""
  lead = param.shape[: paths.STACK in paths.of(path).split('/')]
  own = param.shape[len(lead) :]
  if math.prod(own) < LEAST:
    return jnp.zeros(param.shape, jnp.float32)
  if own[-1] % BLOCK == 0:
    blocks = (*param.shape[:-1], own[-1] // BLOCK)
  else:
    blocks = (*lead, -(-math.prod(own) // BLOCK))
  return Blocks(
    jnp.zeros(param.shape, jnp.uint8), jnp.zeros(blocks, jnp.float32)
  )


def _blocked(array: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
  """[*blocks, 256], padded with zeros."""
  if array.size != BLOCK * math.prod(blocks):
    *lead, count = blocks
    array = array.reshape(*lead, -1)
    short = count * BLOCK - array.shape[-1]
    array = jnp.pad(array, [*((0, 0) for _ in lead), (0, short)])
  return array.reshape(*blocks, BLOCK)


def _unblocked(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Inverse of `_blocked`."""
  if array.size != math.prod(shape):
    *lead, count, _ = array.shape
    own = math.prod(shape[len(lead) :])
    array = array.reshape(*lead, count * BLOCK)[..., :own]
  return array.reshape(shape)


def decode(moment: Blocks | jax.Array, levels: np.ndarray) -> jax.Array:
  """The float32 numbers that codes stand for."""
  if not isinstance(moment, Blocks):
    return moment
  codes, absmax = moment
  units = jnp.asarray(levels).at[codes].get(mode='promise_in_bounds')
  scaled = _blocked(units, absmax.shape) * absmax[..., None]
  return _unblocked(scaled, codes.shape)


def encode(
  array: jax.Array, like: Blocks | jax.Array, levels: np.ndarray
) -> Blocks | jax.Array:
  """The nearest codes of float32 numbers, where `like` has any."""
  if not isinstance(like, Blocks):
    return array
  parts = _blocked(array, like.absmax8.shape)
  absmax = jnp.max(jnp.abs(parts), axis=-1)
  # A block of zeros has the level 0.
  units = parts / jnp.where(absmax == 0, 1, absmax)[..., None]
  codes = _nearest(units, levels)
  if levels[0] == 0:
    # What is positive never becomes nothing: the next step would be m / eps.
    codes = jnp.maximum(codes, (units > 0).astype(jnp.uint8))
  return Blocks(_unblocked(codes, array.shape), absmax)


def _nearest(units: jax.Array, levels: np.ndarray) -> jax.Array:
  """u8: of sorted levels the nearest, the lower one of two."""
  middles = jnp.asarray((levels[1:] + levels[:-1]) / np.float32(2))
  code = jnp.zeros(units.shape, jnp.int32)
  # Bisection of 255 midpoints, bit by bit from the highest.
  for bit in (128, 64, 32, 16, 8, 4, 2, 1):
    middle = middles.at[code + (bit - 1)].get(mode='promise_in_bounds')
    code = jnp.where(units > middle, code + bit, code)
  return code.astype(jnp.uint8)
