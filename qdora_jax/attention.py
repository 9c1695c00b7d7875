"""One function: packed causal attention, in the best form there is.

Three forms of one product, equal within rounding:

  plain   all scores at once: short texts, and decoding a token at a time
  flash   a chunk of scores at a time (`flash.py`): any length, any device
  cudnn   cuDNN's fused kernel, for 16-bit numbers on GPUs from Ampere on; it is
          told who sees whom by a dense mask, unless each row is one text, and
          so is none for long texts
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from qdora_jax.flash import flash
from qdora_jax.sight import Sight, best_chunk

Form = Literal['auto', 'plain', 'flash']

# A mask of 4,096 x 4,096 takes 34 MB in 16 bits, and cuDNN's gradient of it as
# much again.
_LONGEST_MASK = 4096


def attention(
  q_BxLxHxDh: jax.Array,
  k_BxSxKxDh: jax.Array,
  v_BxSxKxDh: jax.Array,
  sight: Sight,
  scale: float | None = None,
  softcap: float | None = None,
  form: Form = 'auto',
) -> jax.Array:
  """softmax(scale q k^T) v with grouped kv heads, softmax in float32.

  Args:
    q_BxLxHxDh, k_BxSxKxDh, v_BxSxKxDh: H is a multiple of K.
    sight: who sees whom. A query that sees nothing gets what means nothing.
    scale: of the scores; None: 1 / sqrt(Dh).
    softcap: scores are bent to softcap * tanh(score / softcap) (Gemma 2, arXiv
      2408.00118); None leaves them.
    form: 'auto' asks lengths, dtype and device. One query is plain in any.

  Returns:
    [B, L, H, Dh] in q's dtype.
  """
  q, k, v = q_BxLxHxDh, k_BxSxKxDh, v_BxSxKxDh
  queries, keys = q.shape[1], k.shape[1]
  cudnn = form == 'auto' and fused(q, keys, softcap)
  if form == 'auto':
    form = best(queries, keys, jax.default_backend())
  factor = q.shape[-1] ** -0.5 if scale is None else scale
  if form == 'flash' and queries > 1 and not cudnn:
    return flash(q, k, v, sight, factor, softcap)
  if cudnn:
    return _cudnn(q, k, v, sight, factor)
  mask = sight.mask()[:, None]
  # (jax.nn's has no soft cap, and on CPU no product in float16.)
  if softcap is None and q.dtype != jnp.float16:
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)
  *lead, h, dh = q.shape
  q = q.reshape(*lead, k.shape[2], h // k.shape[2], dh)
  scores = jnp.einsum(
    'blkgd,bskd->bkgls', q, k, preferred_element_type=jnp.float32
  )
  if softcap is None:
    scores *= factor
  else:
    scores = softcap * jnp.tanh(scores * (factor / softcap))
  scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores).min)
  share = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  y = jnp.einsum('bkgls,bskd->blkgd', share, v)
  return y.reshape(*lead, h, dh)


def _cudnn(q, k, v, sight: Sight, scale: float) -> jax.Array:
  """By cuDNN's kernel, which skips what no query sees where it is told so.

  Where each row is one text it needs no mask, and where rows are in order none
  of what is above the diagonal: together half of the time (H100).
  """
  fused = functools.partial(
    jax.nn.dot_product_attention, scale=scale, implementation='cudnn'
  )

  def masked(q, k, v):
    return fused(q, k, v, mask=sight.mask()[:, None], is_causal=sight.ordered)

  if not sight.ordered:
    return masked(q, k, v)
  causal = functools.partial(fused, is_causal=True)
  return jax.lax.cond(sight.whole, causal, masked, q, k, v)


def best(queries: int, keys: int, backend: str) -> Literal['plain', 'flash']:
  """The form for so many queries and keys, cuDNN aside.

  Flash from two chunks on: on CPU it is the faster one from there, see
  experiments/LOG.md.
  """
  side = 2 * best_chunk(backend)
  return 'plain' if queries * keys < side**2 else 'flash'


def fused(q_BxLxHxDh: jax.Array, keys: int, softcap: float | None) -> bool:
  """Whether cuDNN has this attention on the devices here.

  The limits are those of jax/_src/cudnn/fused_attention_stablehlo.py (JAX 0.10
  to 0.12), and that of a dense mask.
  """
  _, queries, _, width = q_BxLxHxDh.shape
  return (
    jax.default_backend() == 'gpu'
    and _ampere(jax.local_devices()[0])
    and q_BxLxHxDh.dtype in (jnp.bfloat16, jnp.float16)
    and width <= 128
    and width % 8 == 0
    and softcap is None
    # Its backward pass wants even lengths beside a mask.
    and queries % 2 == keys % 2 == 0
    and max(queries, keys) <= _LONGEST_MASK
  )


def _ampere(device: jax.Device) -> bool:
  """An NVIDIA GPU of compute capability 8.0 or more ('gfx...' is AMD's)."""
  major = str(getattr(device, 'compute_capability', '')).partition('.')[0]
  return major.isdigit() and int(major) >= 8
