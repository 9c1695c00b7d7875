"""Who sees whom: positions, segments and windows, never an L x L array.

What may see what is told by positions and segments alone, so that training on
packed examples, evaluation on padded batches and decoding from a cache are the
same attention. The same numbers say which chunks of queries can see which
chunks of keys at all: behind a window, or in a row of many examples, few.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# Position of a key that no query may see: padding, or an empty cache slot.
NOWHERE = jnp.iinfo(jnp.int32).max // 2
# A window that hides nothing.
ALL = jnp.iinfo(jnp.int32).max
# Where a chunk is filled up: a query there sees nothing, no query sees a key.
_NO_QUERY, _NO_KEY = -1, jnp.iinfo(jnp.int32).max


@struct.dataclass
class Sight:
  """Who sees whom; `look` makes it.

  Attributes:
    query_BxL, key_BxS: positions.
    query_segment_BxL, key_segment_BxS: which packed example each belongs to;
      both None: one a row.
    window: i32 [], how many positions a query sees, with its own; None: all.
    pairs_Px2: i32, numbers of a chunk of queries and of one of keys; first come
      those pairs in which, in some row, a query may see a key.
    count: i32 [], of these.
    whole: bool [], whether each row is one text and padding behind it, and a
      query of the text sees all of it up to its own place.
    chunk: tokens of a chunk.
    ordered: whether queries and keys are the same tokens, so that none sees a
      key behind its place: a text's tokens stand in the order of positions.
  """

  query_BxL: jax.Array
  key_BxS: jax.Array
  query_segment_BxL: jax.Array | None
  key_segment_BxS: jax.Array | None
  window: jax.Array | None
  pairs_Px2: jax.Array | None = None
  count: jax.Array | None = None
  whole: jax.Array | None = None
  chunk: int = struct.field(pytree_node=False, default=1)
  ordered: bool = struct.field(pytree_node=False, default=False)

  def mask(self) -> jax.Array:
    """bool [B, L, S]: an earlier or the same position, near, same segment."""
    back = self.query_BxL[:, :, None] - self.key_BxS[:, None, :]
    mask = back >= 0
    if self.window is not None:
      mask &= back < self.window
    if self.query_segment_BxL is not None:
      own = self.query_segment_BxL[:, :, None]
      mask &= own == self.key_segment_BxS[:, None, :]
    return mask

  def chunks(self, group: int = 1) -> 'Sight':
    """Cut: [B, L] as [N, B, chunk], the last chunk filled up.

    Queries are there once for each head of a group: [N, B, group chunk].
    """

    def queries(array_BxL: jax.Array, **filling: Any) -> jax.Array:
      return jnp.tile(cut(array_BxL, self.chunk, **filling), group)

    parts = self.replace(
      query_BxL=queries(self.query_BxL, constant_values=_NO_QUERY),
      key_BxS=cut(self.key_BxS, self.chunk, constant_values=_NO_KEY),
    )
    if self.query_segment_BxL is None:
      return parts
    return parts.replace(
      query_segment_BxL=queries(self.query_segment_BxL),
      key_segment_BxS=cut(self.key_segment_BxS, self.chunk),
    )

  def of(self, i: jax.Array, j: jax.Array) -> 'Sight':
    """Chunk i of the queries and chunk j of the keys, of what `chunks` gave."""
    parts = self.replace(query_BxL=self.query_BxL[i], key_BxS=self.key_BxS[j])
    if self.query_segment_BxL is None:
      return parts
    return parts.replace(
      query_segment_BxL=self.query_segment_BxL[i],
      key_segment_BxS=self.key_segment_BxS[j],
    )


def look(
  query_BxL: jax.Array,
  key_BxS: jax.Array,
  query_segment_BxL: jax.Array | None = None,
  key_segment_BxS: jax.Array | None = None,
  window: int | None = None,
  chunk: int | None = None,
) -> Sight:
  """Who sees whom, and which chunks: made once, for all layers of a kind.

  Args:
    query_BxL: positions of the queries.
    key_BxS: positions of the keys; NOWHERE hides one from every real query. If
      it is the same array, tokens of a segment are in the order of positions.
    query_segment_BxL: which packed example each query belongs to; None: one.
    key_segment_BxS: likewise for keys.
    window: how many positions a query sees, its own included; None: all.
    chunk: tokens of a chunk; None: what the devices here are best at.
  """
  window = None if window is None else jnp.int32(window)
  segments = query_segment_BxL, key_segment_BxS
  sight = Sight(
    query_BxL,
    key_BxS,
    *segments,
    window,
    chunk=chunk or best_chunk(jax.default_backend()),
    ordered=query_BxL is key_BxS,
  )
  pairs_Px2, count = _pairs(sight)
  return sight.replace(pairs_Px2=pairs_Px2, count=count, whole=_whole(sight))


def best_chunk(backend: str) -> int:
  """Tokens of a chunk, on 'cpu' or another backend.

  On a CPU a chunk's scores should stay in its cache: 128 was the best of 64 to
  512, see experiments/LOG.md. For a GPU every pair of chunks is a few kernels
  and a question to the host, and must be worth them; 512 is a guess that no GPU
  has confirmed yet.
  """
  return 128 if backend == 'cpu' else 512


def _whole(sight: Sight) -> jax.Array:
  """`Sight.whole`: positions rise along a row, in one segment; then padding.

  Padding is segment 0 at position 0, as `data` writes it; what it sees and
  gives is nobody's.
  """
  if not sight.ordered:
    return jnp.bool_(False)
  places, own = sight.query_BxL, sight.query_segment_BxL
  along = places[:, 1:] > places[:, :-1]
  if own is not None:
    along &= own[:, 1:] == own[:, :-1]
    along |= (own[:, 1:] == 0) & (places[:, 1:] == 0)
  whole = jnp.all(along)
  if sight.window is not None:
    whole &= sight.window > jnp.max(places) - jnp.min(places)
  return whole


def _pairs(sight: Sight) -> tuple[jax.Array, jax.Array]:
  """`pairs_Px2` and `count`, judged by chunks' least and largest numbers.

  What is left out sees nothing; what is not may see nothing, too.
  """

  def ends(array_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    parts_NxBxC = cut(array_BxL, sight.chunk, mode='edge')
    return jnp.min(parts_NxBxC, axis=2), jnp.max(parts_NxBxC, axis=2)

  (first, last), (begin, end) = ends(sight.query_BxL), ends(sight.key_BxS)
  # [chunks of queries, chunks of keys, B].
  sees = last[:, None] >= begin[None]
  if sight.window is not None:
    sees &= first[:, None] - end[None] < sight.window
  if sight.query_segment_BxL is not None:
    low, high = ends(sight.query_segment_BxL)
    least, most = ends(sight.key_segment_BxS)
    sees &= (low[:, None] <= most[None]) & (least[None] <= high[:, None])
  sees = jnp.any(sees, axis=2)
  order = jnp.argsort(~sees.reshape(-1), stable=True).astype(jnp.int32)
  pairs = jnp.stack([order // sees.shape[1], order % sees.shape[1]], axis=1)
  return pairs, jnp.sum(sees, dtype=jnp.int32)


def cut(array: jax.Array, length: int, **filling: Any) -> jax.Array:
  """[B, L, ...] as [ceil(L / length), B, length, ...], filled by jnp.pad."""
  rows, whole, *rest = array.shape
  count = -(-whole // length)
  more = [(0, 0)] * array.ndim
  more[1] = (0, count * length - whole)
  array = jnp.pad(array, more, **filling)
  return array.reshape(rows, count, length, *rest).swapaxes(0, 1)
