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

The query heads of a kv head are one long list of queries. Scores have keys
before queries, sums a head's features before tokens: where a product reads its
left factor down the columns, XLA's CPU takes a library that runs small ones on
all cores, and copies nothing (experiments/LOG.md).

Dims as in model.py, and: G query heads to a kv head; C tokens of a chunk of
queries, Q = G C; E keys of a chunk; N and M chunks of queries and of keys.
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
  chunks = functools.partial(_chunks, k.shape[2], sight.chunk)
  q_NxBxKxQxDh, k_MxBxKxExDh, v_MxBxKxExDh = map(chunks, (q, k, v))
  kt_MxBxKxDhxE = k_MxBxKxExDh.mT
  seen = sight.chunks(q.shape[2] // k.shape[2])

  def step(n, state):
    i, j = sight.pairs_Px2[n]
    q, kt, v = _at(q_NxBxKxQxDh, i), _at(kt_MxBxKxDhxE, j), _at(v_MxBxKxExDh, j)
    s_BxKxExQ = _scores(q, kt, seen.of(i, j), scale, softcap)
    y_BxKxDhxQ, m_BxKx1xQ, total = (_at(a, i) for a in state)
    larger = jnp.max(s_BxKxExQ, axis=-2, keepdims=True)
    larger = jnp.maximum(m_BxKx1xQ, larger)
    p_BxKxExQ = jnp.exp(s_BxKxExQ - larger)
    shrink = jnp.exp(m_BxKx1xQ - larger)
    total = total * shrink + jnp.sum(p_BxKxExQ, axis=-2, keepdims=True)
    part = _product('bked,bkeq->bkdq', v, p_BxKxExQ.astype(v.dtype))
    new = y_BxKxDhxQ * shrink + part, larger, total
    return tuple(_put(a, b, i) for a, b in zip(state, new, strict=True))

  y_NxBxKxDhxQ = jnp.zeros(q_NxBxKxQxDh.mT.shape, jnp.float32)
  one = y_NxBxKxDhxQ[..., :1, :]
  start = y_NxBxKxDhxQ, one + LEAST, one
  y, m, total = jax.lax.fori_loop(0, sight.count, step, start)
  total = jnp.where(total > 0, total, 1)
  y = checkpoint_name(_join((y / total).mT, q), ATTENDED)
  logsumexp_NxBxKx1xQ = checkpoint_name(m + jnp.log(total), ATTENDED)
  return y, (q, k, v, sight, y, logsumexp_NxBxKx1xQ)


def _backward(scale, softcap, residuals, dy):
  q, k, v, sight, y, logsumexp_NxBxKx1xQ = residuals
  chunks = functools.partial(_chunks, k.shape[2], sight.chunk)
  q_NxBxKxQxDh, k_MxBxKxExDh, v_MxBxKxExDh = map(chunks, (q, k, v))
  kt_MxBxKxDhxE, vt_MxBxKxDhxE = k_MxBxKxExDh.mT, v_MxBxKxExDh.mT
  dy_NxBxKxQxDh = chunks(dy)
  along = dy.astype(jnp.float32) * y.astype(jnp.float32)
  along = jnp.sum(along, axis=-1, keepdims=True)
  along_NxBxKx1xQ = chunks(along).mT
  seen = sight.chunks(q.shape[2] // k.shape[2])

  def step(n, sums):
    i, j = sight.pairs_Px2[n]
    q, dy = _at(q_NxBxKxQxDh, i), _at(dy_NxBxKxQxDh, i)
    k, kt, vt = (
      _at(a, j) for a in (k_MxBxKxExDh, kt_MxBxKxDhxE, vt_MxBxKxDhxE)
    )
    s_BxKxExQ = _scores(q, kt, seen.of(i, j), scale, softcap)
    p = jnp.exp(s_BxKxExQ - _at(logsumexp_NxBxKx1xQ, i))
    ds = _product('bkde,bkqd->bkeq', vt, dy) - _at(along_NxBxKx1xQ, i)
    ds *= p
    if softcap is not None:
      # Where a score is hidden p is 0; the square there must be finite.
      bent = jnp.clip(s_BxKxExQ / softcap, -1, 1)
      ds *= 1 - jnp.square(bent)
    ds = (scale * ds).astype(q.dtype)
    parts = (
      _product('bked,bkeq->bkdq', k, ds),
      _product('bkqd,bkeq->bkde', q, ds),
      _product('bkqd,bkeq->bkde', dy, p.astype(dy.dtype)),
    )
    return tuple(
      _put(a, _at(a, n) + b, n)
      for a, b, n in zip(sums, parts, (i, j, j), strict=True)
    )

  like = q_NxBxKxQxDh.mT, kt_MxBxKxDhxE, vt_MxBxKxDhxE
  zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in like)
  sums = jax.lax.fori_loop(0, sight.count, step, zeros)
  dq, dk, dv = (_join(a.mT, x) for a, x in zip(sums, (q, k, v), strict=True))
  return dq, dk, dv, None


flash.defvjp(_forward, _backward)


def _scores(q_BxKxQxDh, kt_BxKxDhxE, sight, scale, softcap):
  """Of one pair of chunks: f32 [B, K, E, Q]."""
  s = scale * _product('bkde,bkqd->bkeq', kt_BxKxDhxE, q_BxKxQxDh)
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  return jnp.where(sight.mask().mT[:, None], s, HIDDEN)


# One chunk, and one in its place: a slice, where indexing would be a scatter.
_at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
_put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _chunks(kv: int, chunk: int, x_BxLxHxDh: jax.Array) -> jax.Array:
  """[B, L, K G, Dh] in chunks: [N, B, K, G C, Dh]."""
  rows, length, heads, width = x_BxLxHxDh.shape
  group = heads // kv
  x = x_BxLxHxDh.reshape(rows, length, kv, group, width)
  x = cut(x, chunk).transpose(0, 1, 3, 4, 2, 5)
  return x.reshape(*x.shape[:3], group * chunk, width)


def _join(x_NxBxKxQxDh: jax.Array, like: jax.Array) -> jax.Array:
  """`_chunks` undone: [B, L, H, Dh] in the shape and dtype of `like`."""
  count, rows, kv, queries, width = x_NxBxKxQxDh.shape
  group = like.shape[2] // kv
  chunk = queries // group
  x = x_NxBxKxQxDh.reshape(count, rows, kv, group, chunk, width)
  x = x.transpose(1, 0, 4, 2, 3, 5)
  x = x.reshape(rows, count * chunk, kv * group, width)
  return x[:, : like.shape[1]].astype(like.dtype)
