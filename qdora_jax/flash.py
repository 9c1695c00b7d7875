"""Attention a chunk at a time: never L x S scores, in no direction.

Written out, softmax(q k^T) v needs every score of a query before the first is
used. It does not have to (Milakov and Gimelshein, arXiv 1805.02867; Rabe and
Staats, arXiv 2112.05682): over chunks j of keys, with scores s_j,

  m' = max(m, max s_j)                     the largest score so far
  l' = l exp(m - m') + sum exp(s_j - m')   the sum of exponentials so far
  y' = y exp(m - m') + exp(s_j - m') v_j   what they weigh, so far

and y / l in the end. The backward pass (FlashAttention-2, arXiv 2307.08691)
finds q, k, v, the output and log-sum-exp = m + log l, and makes the scores
again, chunk by chunk: p = exp(s - log-sum-exp) are the probabilities, and

  dv = p^T dy     ds = p (dy v^T - sum(dy y))     dq = ds k     dk = ds^T q

Pairs of chunks are visited one after the other, those alone that can see each
other (`Sight`): half of them in a causal row, few in a row of many
examples or behind a window. The plain form multiplies them all, and keeps [H,
L, S] numbers; here [H, chunk, chunk] exist at once. The price is the scores'
product once more in the backward pass. Sums, maxima and exponentials are
float32, products are of q's dtype with float32 sums, as in the plain form.

Dims as in model.py, and: G query heads to a kv head, C and E tokens of a chunk
of queries and of keys, N and M chunks of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qdora_jax.sight import Sight, cut

# A score no query may see, and the largest one before any: exp(HIDDEN - LEAST)
# is 0, so that a query that sees nothing gets 0, and gradients of 0.
HIDDEN, LEAST = float(jnp.finfo(jnp.float32).min), -1e30
# Name of the output and log-sum-exp, for rematerialization policies: who keeps
# them makes the scores once less in the backward pass.
ATTENDED = 'attended'


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash(
  q_BxLxHxDh: jax.Array,
  k_BxSxKxDh: jax.Array,
  v_BxSxKxDh: jax.Array,
  sight: Sight,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """softmax(scale q k^T) v over the keys that a query sees; 0 if it sees none.

  Args:
    q_BxLxHxDh, k_BxSxKxDh, v_BxSxKxDh: H is a multiple of K.
    sight: who sees whom.
    scale: of the scores.
    softcap: scores are bent to softcap * tanh(score / softcap); None: not.

  Returns:
    [B, L, H, Dh] in q's dtype.
  """
  return _forward(q_BxLxHxDh, k_BxSxKxDh, v_BxSxKxDh, sight, scale, softcap)[0]


def _forward(q, k, v, sight, scale, softcap):
  q_NxBxKxGxCxDh, k_MxBxKxExDh, v_MxBxKxExDh = _cut(q, k, v, sight.chunk)
  seen = sight.chunks()

  def step(n, state):
    i, j = sight.pairs_Px2[n]
    s_BxKxGxCxE = _scores(
      _at(q_NxBxKxGxCxDh, i),
      _at(k_MxBxKxExDh, j),
      seen.of(i, j),
      scale,
      softcap,
    )
    y, m, total = (_at(a, i) for a in state)
    larger = jnp.maximum(m, jnp.max(s_BxKxGxCxE, axis=-1, keepdims=True))
    p_BxKxGxCxE = jnp.exp(s_BxKxGxCxE - larger)
    shrink = jnp.exp(m - larger)
    total = total * shrink + jnp.sum(p_BxKxGxCxE, axis=-1, keepdims=True)
    y = y * shrink + _product(
      'bkgce,bked->bkgcd', p_BxKxGxCxE.astype(v.dtype), _at(v_MxBxKxExDh, j)
    )
    return tuple(
      _put(a, b, i) for a, b in zip(state, (y, larger, total), strict=True)
    )

  y = jnp.zeros(q_NxBxKxGxCxDh.shape, jnp.float32)
  one = y[..., :1]
  y, m, total = jax.lax.fori_loop(0, sight.count, step, (y, one + LEAST, one))
  total = jnp.where(total > 0, total, 1)
  y = checkpoint_name(_join((y / total).astype(q.dtype), q.shape), ATTENDED)
  logsumexp = checkpoint_name(m + jnp.log(total), ATTENDED)
  return y, (q, k, v, sight, y, logsumexp)


def _backward(scale, softcap, residuals, dy):
  q, k, v, sight, y, logsumexp_NxBxKxGxCx1 = residuals
  q_NxBxKxGxCxDh, k_MxBxKxExDh, v_MxBxKxExDh = _cut(q, k, v, sight.chunk)
  dy_NxBxKxGxCxDh = _heads(dy, k.shape[2], sight.chunk)
  seen = sight.chunks()
  along = dy.astype(jnp.float32) * y.astype(jnp.float32)
  along = jnp.sum(along, axis=-1, keepdims=True)
  along_NxBxKxGxCx1 = _heads(along, k.shape[2], sight.chunk)

  def step(n, sums):
    i, j = sight.pairs_Px2[n]
    q, dy = _at(q_NxBxKxGxCxDh, i), _at(dy_NxBxKxGxCxDh, i)
    k, v = _at(k_MxBxKxExDh, j), _at(v_MxBxKxExDh, j)
    s_BxKxGxCxE = _scores(q, k, seen.of(i, j), scale, softcap)
    p = jnp.exp(s_BxKxGxCxE - _at(logsumexp_NxBxKxGxCx1, i))
    ds = _product('bkgcd,bked->bkgce', dy, v) - _at(along_NxBxKxGxCx1, i)
    ds *= p
    if softcap is not None:
      # Where a score is hidden p is 0; the square there must be finite.
      bent = jnp.clip(s_BxKxGxCxE / softcap, -1, 1)
      ds *= 1 - jnp.square(bent)
    ds = (scale * ds).astype(q.dtype)
    parts = (
      _product('bkgce,bked->bkgcd', ds, k),
      _product('bkgce,bkgcd->bked', ds, q),
      _product('bkgce,bkgcd->bked', p.astype(dy.dtype), dy),
    )
    return tuple(
      _put(a, _at(a, n) + b, n)
      for a, b, n in zip(sums, parts, (i, j, j), strict=True)
    )

  like = (q_NxBxKxGxCxDh, k_MxBxKxExDh, v_MxBxKxExDh)
  zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in like)
  sums = jax.lax.fori_loop(0, sight.count, step, zeros)
  dq, dk, dv = (
    _join(a, x.shape).astype(x.dtype)
    for a, x in zip(sums, (q, k, v), strict=True)
  )
  return dq, dk, dv, None


flash.defvjp(_forward, _backward)


def _scores(q_BxKxGxCxDh, k_BxKxExDh, sight, scale, softcap):
  """Of one pair of chunks: f32 [B, K, G, C, E]."""
  s = scale * _product('bkgcd,bked->bkgce', q_BxKxGxCxDh, k_BxKxExDh)
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  return jnp.where(sight.mask()[:, None, None], s, HIDDEN)


# One chunk, and one in its place: a slice, where indexing would be a scatter.
_at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
_put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _cut(q, k, v, chunk):
  """Queries as [N, B, K, G, C, Dh], keys and values as [M, B, K, E, Dh]."""
  kv = k.shape[2]
  k, v = (_heads(a, kv, chunk)[:, :, :, 0] for a in (k, v))
  return _heads(q, kv, chunk), k, v


def _heads(x_BxLxHxDh: jax.Array, kv: int, chunk: int) -> jax.Array:
  """[B, L, K G, Dh] in chunks: [N, B, K, G, C, Dh]."""
  *lead, h, dh = x_BxLxHxDh.shape
  chunks = cut(x_BxLxHxDh.reshape(*lead, kv, h // kv, dh), chunk)
  return chunks.transpose(0, 1, 3, 4, 2, 5)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """`_heads` undone: [N, B, K, (G,) C, Dh] as [B, L, H, Dh]."""
  x = jnp.moveaxis(x, (0, -2), (1, 2))
  rows, count, each = x.shape[:3]
  return x.reshape(rows, count * each, *shape[2:])[:, : shape[1]]
