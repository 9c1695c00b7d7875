"""The decoder: one Linen module, scanned over its layers.

Dims legend, used in names all over the package:
  B batch   L query length   S key length   D width    F feed-forward
  H query heads   K kv heads   Dh head width   V vocabulary   N layers
  I in   O out   R rank

Parameters (kernels are [I, O]; everything under `layers` has a leading N):
  embed/embedding [V, D]
  layers/attn_norm/scale [D]        layers/attn/{q,k,v,o}/kernel (and /bias)
  layers/mlp_norm/scale [D]         layers/mlp/{gate,up,down}/kernel
  final_norm/scale [D]              lm_head/kernel [D, V] unless tied

A kernel may be any leaf that `linear` takes: the model never asks which.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax.attention import NOWHERE, attention, visible
from qdora_jax.linear import PRODUCT, linear

Remat = Literal['none', 'dots', 'block']


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shapes and constants of a decoder."""

  vocab: int
  width: int
  ff: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  eps: float = 1e-5
  tied: bool = True
  attn_bias: bool = False
  mlp_bias: bool = False


class Linear(nn.Module):
  """A kernel and maybe a bias, multiplied by `linear`."""

  features: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.is_initializing():
      init = nn.initializers.normal(0.02)
      self.param('kernel', init, (x.shape[-1], self.features))
      if self.use_bias:
        self.param('bias', nn.initializers.zeros, (self.features,))
    # Not self.param: a kernel may be a leaf of other shape than it began with.
    kernel = self.get_variable('params', 'kernel')
    bias = self.get_variable('params', 'bias') if self.use_bias else None
    return linear(x, kernel, bias)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


def rope(positions_BxL: jax.Array, head_dim: int, theta: float) -> jax.Array:
  """Rotary angles' (cos, sin), f32 [2, B, L, 1, Dh/2] (arXiv 2104.09864)."""
  # In float32 and in this order, as transformers rounds them.
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  wavelength = (theta ** exponent.astype(np.float64)).astype(np.float32)
  frequency = jnp.asarray(np.float32(1) / wavelength)
  angle = positions_BxL[..., None].astype(jnp.float32) * frequency[None, None]
  return jnp.stack([jnp.cos(angle), jnp.sin(angle)])[..., None, :]


def rotate(x_BxLxHxDh: jax.Array, rope: jax.Array) -> jax.Array:
  """Turns the pairs (x[i], x[i + Dh/2]) by their angles, in float32."""
  cos, sin = rope
  a, b = jnp.split(x_BxLxHxDh.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BxLxHxDh.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxLxD, rope, mask, cache):
    c = self.config
    *batch, width = x_BxLxD.shape

    def heads(name: str, n: int) -> jax.Array:
      y = Linear(n * c.head_dim, c.attn_bias, name=name)(x_BxLxD)
      return y.reshape(*batch, n, c.head_dim)

    q = rotate(heads('q', c.heads), rope)
    k, v = rotate(heads('k', c.kv_heads), rope), heads('v', c.kv_heads)
    new = None
    if cache is not None:
      new = {'k': k.astype(cache['k'].dtype), 'v': v.astype(cache['v'].dtype)}
      k, v = (_write(cache[n], new[n], 1, cache['index']) for n in ('k', 'v'))
    y = attention(q, k, v, mask).reshape(*batch, -1)
    return Linear(width, c.attn_bias, name='o')(y), new


def _write(
  to: jax.Array, new: jax.Array, axis: int, index: jax.Array
) -> jax.Array:
  """Puts new keys, values or positions at their place along an axis."""
  return jax.lax.dynamic_update_slice_in_dim(to, new, index, axis)


class MLP(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    c = self.config
    gate = Linear(c.ff, c.mlp_bias, name='gate')(x_BxLxD)
    up = Linear(c.ff, c.mlp_bias, name='up')(x_BxLxD)
    return Linear(c.width, c.mlp_bias, name='down')(nn.silu(gate) * up)


class Block(nn.Module):
  """One layer, as nn.scan wants it: (x, ...) -> (x, new keys and values)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxLxD, rope, mask, cache):
    c = self.config
    y = RMSNorm(c.eps, name='attn_norm')(x_BxLxD)
    y, new = Attention(c, name='attn')(y, rope, mask, cache)
    x_BxLxD = x_BxLxD + y
    y = RMSNorm(c.eps, name='mlp_norm')(x_BxLxD)
    return x_BxLxD + MLP(c, name='mlp')(y), new


class Decoder(nn.Module):
  """A Llama-like decoder over any parameter tree `attach` gives.

  Attributes:
    config: shapes and constants.
    dtype: compute dtype of activations and products; logits are float32.
    remat: what the backward pass finds of a layer: 'none' keeps everything,
      'dots' the products with the base, 'block' the layer's input alone.
  """

  config: ModelConfig
  dtype: Any = jnp.float32
  remat: Remat = 'block'

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab, c.width, name='embed')
    block = Block
    if self.remat != 'none':
      keep = jax.checkpoint_policies.save_only_these_names(PRODUCT)
      policy = keep if self.remat == 'dots' else None
      block = nn.remat(Block, prevent_cse=False, policy=policy)
    self.layers = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, nn.broadcast, 0),
      length=c.layers,
    )(c)
    self.final_norm = RMSNorm(c.eps)
    if not c.tied:
      self.lm_head = Linear(c.vocab)

  def __call__(
    self,
    tokens_BxL: jax.Array,
    positions_BxL: jax.Array | None = None,
    segments_BxL: jax.Array | None = None,
    cache: dict[str, jax.Array] | None = None,
  ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """Next-token logits.

    Args:
      tokens_BxL: token ids.
      positions_BxL: 0, 1, ... within each example; NOWHERE for padding that
        others must not see. None counts from 0 (or from the cache's index).
      segments_BxL: which packed example each token belongs to; None: one a row.
      cache: what `init_cache` or an earlier call gave.

    Returns:
      Logits f32 [B, L, V]; with a cache, also the cache moved on by L.
    """
    x, cache = self.hidden(tokens_BxL, positions_BxL, segments_BxL, cache)
    logits = self.unembed(x)
    return logits if cache is None else (logits, cache)

  def hidden(
    self, tokens_BxL, positions_BxL=None, segments_BxL=None, cache=None
  ):
    """The last layer's normed output [B, L, D], and the cache or None."""
    c = self.config
    if positions_BxL is None:
      start = 0 if cache is None else cache['index']
      positions_BxL = jnp.broadcast_to(
        start + jnp.arange(tokens_BxL.shape[1])[None], tokens_BxL.shape
      )
    keys, kv = positions_BxL, None
    if cache is not None:
      keys = _write(cache['positions'], positions_BxL, 1, cache['index'])
      index = jnp.broadcast_to(cache['index'], (c.layers,))
      kv = {'k': cache['k'], 'v': cache['v'], 'index': index}
    mask = visible(positions_BxL, keys, segments_BxL, segments_BxL)
    angles = rope(positions_BxL, c.head_dim, c.rope_theta)
    x = self.embed(tokens_BxL).astype(self.dtype)
    x, new = self.layers(x, angles, mask, kv)
    if cache is not None:
      # Written once for all layers: in a loop, in place.
      cache = {
        'k': _write(cache['k'], new['k'], 2, cache['index']),
        'v': _write(cache['v'], new['v'], 2, cache['index']),
        'positions': keys,
        'index': cache['index'] + tokens_BxL.shape[1],
      }
    return self.final_norm(x), cache

  def unembed(self, x_BxLxD: jax.Array) -> jax.Array:
    """Logits f32 [B, L, V] of what `hidden` gave."""
    if self.config.tied:
      table = self.embed.embedding.astype(x_BxLxD.dtype)
      return jnp.einsum(
        'bld,vd->blv', x_BxLxD, table, preferred_element_type=jnp.float32
      )
    return self.lm_head(x_BxLxD).astype(jnp.float32)


def init_cache(
  config: ModelConfig, batch: int, length: int, dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
  """An empty KV cache for `length` tokens: pass it to the model's call."""
  shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
  return {
    'k': jnp.zeros(shape, dtype),
    'v': jnp.zeros(shape, dtype),
    'positions': jnp.full((batch, length), NOWHERE, jnp.int32),
    'index': jnp.zeros((), jnp.int32),
  }
