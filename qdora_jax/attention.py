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
) -> jax.Array:
  """Causal mask, bool [B, 1, L, S]: earlier or same position, same segment.

  Args:
    query_BxL: positions of the queries.
    key_BxS: positions of the keys; NOWHERE hides one from every real query.
    query_segment_BxL: which packed example each query belongs to; None: one.
    key_segment_BxS: likewise for keys.
  """
  mask = key_BxS[:, None, :] <= query_BxL[:, :, None]
  if query_segment_BxL is not None:
    mask &= query_segment_BxL[:, :, None] == key_segment_BxS[:, None, :]
  return mask[:, None]


def attention(
  q_BxLxHxDh: jax.Array,
  k_BxSxKxDh: jax.Array,
  v_BxSxKxDh: jax.Array,
  mask_Bx1xLxS: jax.Array,
) -> jax.Array:
  """softmax(q k^T / sqrt(Dh)) v with grouped kv heads, softmax in float32.

  Returns:
    [B, L, H, Dh] in q's dtype.
  """
  return jax.nn.dot_product_attention(
    q_BxLxHxDh, k_BxSxKxDh, v_BxSxKxDh, mask=mask_Bx1xLxS
  )
