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
Some families join q, k, v into attn/qkv and gate, up into mlp/gate_up, norm
queries and keys (attn/{q,k}_norm/scale) or norm what a layer adds, after or
around it (attn_post_norm, mlp_post_norm; then mlp_pre_norm for mlp_norm).

A kernel may be any leaf that `linear` takes: the model never asks which.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from qdora_jax import few
from qdora_jax.attention import Form, attention
from qdora_jax.dora import NORM
from qdora_jax.flash import ATTENDED
from qdora_jax.linear import in_place, linear, product
from qdora_jax.lora import LAST, LOW, PRODUCT
from qdora_jax.rope import Rope, angles, rotate
from qdora_jax.sharding import by_batch
from qdora_jax.sight import ALL, NOWHERE, look

Remat = Literal['none', 'dots', 'block', 'offload']
Activation = Literal['silu', 'gelu', 'gelu_tanh']

_ACTIVATIONS = {
  'silu': nn.silu,
  'gelu': functools.partial(nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
}

# What the backward pass finds of a layer, beside its parameters.
_BLOCK_INPUT = 'block_input'
_POLICIES = {
  'dots': jax.checkpoint_policies.save_only_these_names(
    PRODUCT, LOW, NORM, LAST, ATTENDED
  ),
  'block': jax.checkpoint_policies.save_only_these_names(NORM, LAST),
  'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[NORM],
    names_which_can_be_offloaded=[_BLOCK_INPUT, LAST],
    offload_src='device',
    offload_dst='pinned_host',
  ),
}


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """Where layers that are otherwise equal may differ.

  Attributes:
    rope: how queries and keys are turned.
    window: how many positions a query sees, its own included; None: all.
  """

  rope: Rope
  window: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shapes and constants of a decoder.

  Attributes:
    vocab, width, ff, layers, heads, kv_heads, head_dim: V, D, F, N, H, K, Dh.
    kinds: of every layer, N of them.
    eps: of every RMS norm.
    tied: the head is the embedding.
    qkv_bias, o_bias, mlp_bias: which kernels have a bias beside them.
    activation: of the gate.
    fused: q, k and v are one kernel, gate and up another.
    norms: where a layer norms: 'pre' what attention and feed-forward read,
      'post' what they give, or 'both'.
    unit_scale: norms multiply by 1 + scale.
    qk_norm: queries and keys are normed: each 'head', or the 'whole' of them.
    embed_scale: factor on embeddings.
    residual_scale: factor on what attention and feed-forward add.
    attn_scale: factor on attention's scores; None: 1 / sqrt(Dh).
    attn_softcap, logits_softcap: bend scores or logits to +-softcap.
    logits_scale: factor on logits.
  """

  vocab: int
  width: int
  ff: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  kinds: tuple[LayerKind, ...]
  eps: float = 1e-5
  tied: bool = True
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  activation: Activation = 'silu'
  fused: bool = False
  norms: Literal['pre', 'post', 'both'] = 'pre'
  unit_scale: bool = False
  qk_norm: Literal['none', 'head', 'whole'] = 'none'
  embed_scale: float = 1.0
  residual_scale: float = 1.0
  attn_scale: float | None = None
  attn_softcap: float | None = None
  logits_softcap: float | None = None
  logits_scale: float = 1.0


class Linear(nn.Module):
  """A kernel and maybe a bias, multiplied by `linear`."""

  features: int
  use_bias: bool = False
  product: str = PRODUCT

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
    return linear(x, kernel, bias, self.product)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    one = nn.initializers.zeros if c.unit_scale else nn.initializers.ones
    scale = self.param('scale', one, (x.shape[-1],)).astype(jnp.float32)
    scale = 1 + scale if c.unit_scale else scale
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + c.eps)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: ModelConfig
  form: Form = 'auto'

  @nn.compact
  def __call__(self, x_BxLxD, turns, sight, cache):
    c = self.config
    *batch, width = x_BxLxD.shape
    whole, each = c.heads * c.head_dim, c.kv_heads * c.head_dim
    if c.fused:
      y = Linear(whole + 2 * each, c.qkv_bias, name='qkv')(x_BxLxD)
      q, k, v = jnp.split(y, (whole, whole + each), axis=-1)
    else:
      q = Linear(whole, c.qkv_bias, name='q')(x_BxLxD)
      k = Linear(each, c.qkv_bias, name='k')(x_BxLxD)
      v = Linear(each, c.qkv_bias, name='v')(x_BxLxD)

    def heads(y: jax.Array, name: str) -> jax.Array:
      if c.qk_norm == 'whole':
        y = RMSNorm(c, name=name)(y)
      y = y.reshape(*batch, -1, c.head_dim)
      if c.qk_norm == 'head':
        y = RMSNorm(c, name=name)(y)
      return rotate(y, turns)

    q, k = heads(q, 'q_norm'), heads(k, 'k_norm')
    v = v.reshape(*batch, -1, c.head_dim)
    new = None
    if cache is not None:
      new = {'k': k.astype(cache['k'].dtype), 'v': v.astype(cache['v'].dtype)}
      k, v = (_write(cache[n], new[n], 1, cache['index']) for n in ('k', 'v'))
    y = attention(q, k, v, sight, c.attn_scale, c.attn_softcap, self.form)
    return Linear(width, c.o_bias, name='o')(y.reshape(*batch, -1)), new


def _write(
  to: jax.Array, new: jax.Array, axis: int, index: jax.Array
) -> jax.Array:
  """Puts new keys, values or positions at their place along an axis."""
  return jax.lax.dynamic_update_slice_in_dim(to, new, index, axis)


class MLP(nn.Module):
  """down(activation(gate(x)) * up(x))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    c = self.config
    if c.fused:
      y = Linear(2 * c.ff, c.mlp_bias, name='gate_up')(x_BxLxD)
      gate, up = jnp.split(y, 2, axis=-1)
    else:
      gate = Linear(c.ff, c.mlp_bias, name='gate')(x_BxLxD)
      up = Linear(c.ff, c.mlp_bias, name='up')(x_BxLxD)
    y = _ACTIVATIONS[c.activation](gate) * up
    return Linear(c.width, c.mlp_bias, LAST, name='down')(y)


class Block(nn.Module):
  """One layer, as nn.scan wants it: (x, ...) -> (x, new keys and values).

  `turns` and `sights` are those of every kind of layer in the model, stacked;
  `kind` says which is this one's.
  """

  config: ModelConfig
  mesh: Mesh | None = None
  form: Form = 'auto'

  @nn.compact
  def __call__(self, x_BxLxD, turns, sights, kind, cache):
    c = self.config
    x_BxLxD = checkpoint_name(by_batch(x_BxLxD, self.mesh), _BLOCK_INPUT)
    own = 0 if kind is None else kind
    turn, sight = jax.tree.map(lambda a: a[own], (turns, sights))

    def norm(y: jax.Array, name: str, where: str) -> jax.Array:
      if c.norms not in (where, 'both'):
        return y
      return RMSNorm(c, name=name)(y)

    y = norm(x_BxLxD, 'attn_norm', 'pre')
    y, new = Attention(c, self.form, name='attn')(y, turn, sight, cache)
    y = norm(y, 'attn_post_norm', 'post')
    x_BxLxD = x_BxLxD + c.residual_scale * y
    # A name of its own: Hugging Face's post_attention_layernorm is this norm
    # in one family, and attention's post-norm in another.
    before = 'mlp_norm' if c.norms == 'pre' else 'mlp_pre_norm'
    y = MLP(c, name='mlp')(norm(x_BxLxD, before, 'pre'))
    y = norm(y, 'mlp_post_norm', 'post')
    return x_BxLxD + c.residual_scale * y, new


class Decoder(nn.Module):
  """A decoder over any parameter tree `attach` gives.

  Attributes:
    config: shapes and constants.
    dtype: compute dtype of activations and products; logits are float32.
    remat: what the backward pass finds of a layer: 'none' keeps everything,
      'dots' the products with kernels, with what an adapter adds to them, those
      with A, and what attention in chunks gives; 'block' the layer's input, and
      its last product where DoRA's gain or a norm behind it asks for that;
      'offload' the same, waiting in the host's memory. DoRA's norms, a number
      an output, are kept by all.
    mesh: activations are split over it by their rows; None leaves it to XLA.
    attention: its form; 'auto' takes the best for length, dtype and device.
  """

  config: ModelConfig
  dtype: Any = jnp.float32
  remat: Remat = 'block'
  mesh: Mesh | None = None
  attention: Form = 'auto'

  def setup(self):
    c = self.config
    self.embed = nn.Embed(c.vocab, c.width, name='embed')
    block = Block
    if self.remat != 'none':
      policy = _POLICIES[self.remat]
      block = nn.remat(Block, prevent_cse=False, policy=policy)
    self.layers = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, nn.broadcast, 0, 0),
      length=c.layers,
    )(c, self.mesh, self.attention)
    self.final_norm = RMSNorm(c)
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
    keys, kv, longest = positions_BxL, None, None
    if cache is not None:
      keys = _write(cache['positions'], positions_BxL, 1, cache['index'])
      index = jnp.broadcast_to(cache['index'], (c.layers,))
      kv = {'k': cache['k'], 'v': cache['v'], 'index': index}
      longest = keys.shape[1]
    kinds = list(dict.fromkeys(c.kinds))
    turns = [
      angles(kind.rope, positions_BxL, longest, segments_BxL) for kind in kinds
    ]
    windowed = any(kind.window for kind in kinds)
    sights = [
      look(
        positions_BxL,
        keys,
        segments_BxL,
        segments_BxL,
        kind.window or (ALL if windowed else None),
      )
      for kind in kinds
    ]
    kind = None
    if len(kinds) > 1:
      kind = jnp.asarray([kinds.index(k) for k in c.kinds])
    x = self.embed(tokens_BxL).astype(self.dtype)
    x = x * jnp.asarray(c.embed_scale, x.dtype)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *sights)
    run = self.layers
    one = cache is not None and tokens_BxL.shape[1] == 1
    if one and few.here() and not self.is_initializing():
      run = self._in_place
    x, new = run(x, jnp.stack(turns), stacked, kind, kv)
    if cache is not None:
      # Written once for all layers: in a loop, in place.
      cache = {
        'k': _write(cache['k'], new['k'], 2, cache['index']),
        'v': _write(cache['v'], new['v'], 2, cache['index']),
        'positions': keys,
        'index': cache['index'] + tokens_BxL.shape[1],
      }
    return self.final_norm(x), cache

  def _in_place(self, x, turns, sights, kind, cache):
    """`self.layers`, whose packed kernels stay in their stacks: few.py."""
    params = self.variables['params']['layers']
    block = Block(self.config, form=self.attention, parent=None)

    def step(x, each):
      n, kind, cache = each
      layer = {'params': in_place(params, n)}
      return block.apply(layer, x, turns, sights, kind, cache)

    return jax.lax.scan(step, x, (jnp.arange(self.config.layers), kind, cache))

  def unembed(self, x_BxLxD: jax.Array) -> jax.Array:
    """Logits f32 [B, L, V] of what `hidden` gave."""
    c = self.config
    if c.tied:
      table = self.embed.embedding.astype(x_BxLxD.dtype)
      logits = product(x_BxLxD, table.T, jnp.float32)
    else:
      logits = self.lm_head(x_BxLxD).astype(jnp.float32)
    logits = c.logits_scale * logits
    if c.logits_softcap is None:
      return logits
    return c.logits_softcap * jnp.tanh(logits / c.logits_softcap)


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
