"""One function: causal attention over packed, padded or cached keys.

What may see what is told by positions and segments alone, so that training on
packed examples, evaluation on padded batches and decoding from a cache are the
same product.
"""

import jax
import jax.numpy as jnp

# Position of a key that no query may see: padding, or an empty cache slot.
NOWHERE = jnp.iinfo(jnp.int32).max // 2


def visible(
  query_BxL: jax.Array,
  key_BxS: jax.Array,
  query_segment_BxL: jax.Array | None = None,
  key_segment_BxS: jax.Array | None = None,
  window: int | None = None,
) -> jax.Array:
  """Causal mask, bool [B, 1, L, S]: earlier or same position, same segment.

  Args:
    query_BxL: positions of the queries.
    key_BxS: positions of the keys; NOWHERE hides one from every real query.
    query_segment_BxL: which packed example each query belongs to; None: one.
    key_segment_BxS: likewise for keys.
    window: how many positions a query sees, its own included; None: all.
  """
  back = query_BxL[:, :, None] - key_BxS[:, None, :]
  mask = back >= 0
  if window is not None:
    mask &= back < window
  if query_segment_BxL is not None:
    mask &= query_segment_BxL[:, :, None] == key_segment_BxS[:, None, :]
  return mask[:, None]


def attention(
  q_BxLxHxDh: jax.Array,
  k_BxSxKxDh: jax.Array,
  v_BxSxKxDh: jax.Array,
  mask_Bx1xLxS: jax.Array,
  scale: float | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """softmax(scale q k^T) v with grouped kv heads, softmax in float32.

  Args:
    q_BxLxHxDh, k_BxSxKxDh, v_BxSxKxDh: H is a multiple of K.
    mask_Bx1xLxS: from `visible`.
    scale: of the scores; None: 1 / sqrt(Dh).
    softcap: scores are bent to softcap * tanh(score / softcap) (Gemma 2, arXiv
      2408.00118); None leaves them.

  Returns:
    [B, L, H, Dh] in q's dtype.
  """
  # XLA's CPU products are none of those that jax.nn asks for in float16.
  half = q_BxLxHxDh.dtype == jnp.float16 and jax.default_backend() == 'cpu'
  if softcap is None and not half:
    return jax.nn.dot_product_attention(
      q_BxLxHxDh, k_BxSxKxDh, v_BxSxKxDh, mask=mask_Bx1xLxS, scale=scale
    )
  *lead, h, dh = q_BxLxHxDh.shape
  kv = k_BxSxKxDh.shape[2]
  q = q_BxLxHxDh.reshape(*lead, kv, h // kv, dh)
  scores = jnp.einsum(
    'blkgd,bskd->bkgls', q, k_BxSxKxDh, preferred_element_type=jnp.float32
  )
  scale = scale or dh**-0.5
  if softcap is None:
    scores *= scale
  else:
    scores = softcap * jnp.tanh(scores * (scale / softcap))
  scores = jnp.where(mask_Bx1xLxS[:, :, None], scores, jnp.finfo(scores).min)
  share = jax.nn.softmax(scores, axis=-1).astype(v_BxSxKxDh.dtype)
  y = jnp.einsum('bkgls,bskd->blkgd', share, v_BxSxKxDh)
  return y.reshape(*lead, h, dh)
