"""Beam search: the likeliest continuation as a whole, not token by token.

The beams of a prompt are rows of one batch beside each other; after each token
those that go on take their rows of the cache with them. A continuation's score
is its log-probability over length ** length_penalty, the token that stops it
counted, as in transformers (5.24).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qdora_jax.generate import choose, lay_out, read
from qdora_jax.linear import by_row
from qdora_jax.model import Decoder
from qdora_jax.sharding import gather

# In `new`, behind the end of a continuation.
_NONE = -1


def beam_search(
  model: Decoder,
  params: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  beams: int,
  stop: Sequence[int] = (),
  length_penalty: float = 1.0,
) -> list[list[int]]:
  """Continues each prompt by the best of what `beams` beams find.

  A prompt is done when it has as many finished continuations as beams, and the
  best unfinished one, ended as it is, would not be better than the worst of
  them (early_stopping=False in transformers).

  Args:
    model: the decoder.
    params: plain, quantized, attached or (fastest for DoRA) frozen; with one
      adapter for all rows.
    prompts: token ids, of any lengths; not empty.
    max_new_tokens: at most so many each.
    beams: continuations kept of each prompt. 1 is greedy search.
    stop: ids that end a continuation; not part of the result.
    length_penalty: 0 prefers what is likely and short, more what is long.

  Returns:
    The new ids of each prompt.

  Raises:
    ValueError: for an empty prompt, a number out of its range, or adapters by
      row.
  """
  words = model.config.vocab
  if not 1 <= beams <= words:
    raise ValueError(
      f'beams={beams}: expected 1 to {words:,}, as many as words'
    )
  if by_row(params):
    raise ValueError(
      'beam search takes one adapter for all rows; expected params of `attach` '
      'or `freeze`, one adapter at a time'
    )
  layout = lay_out(params, prompts, max_new_tokens)
  ends = jnp.asarray(tuple(stop), jnp.int32)
  best = gather(
    _search(model, beams, max_new_tokens, params, layout, ends, length_penalty)
  )
  return [row[row != _NONE].tolist() for row in best]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(model, beams, most, params, layout, ends, length_penalty):
  """The best continuation of each prompt, i32 [B, most], _NONE behind it."""
  batch = len(layout.tokens_BxL)
  rows_Bx1 = jnp.arange(batch)[:, None]
  # So many that `beams` go on though each of the best ends in each way.
  most_candidates = beams * (1 + len(ends))

  def extend(state, hidden, cache):
    """The state with a token more; K beams, C candidates."""
    n = state['count']
    logits = model.apply({'params': params}, hidden, method='unembed')[:, 0]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    words = log_p.shape[-1]
    total = state['log_p_BxK'][:, :, None] + log_p.reshape(batch, -1, words)
    total = total.reshape(batch, -1)
    log_p_BxC, at = jax.lax.top_k(total, min(most_candidates, total.shape[1]))
    beam_BxC, token_BxC = at // words, at % words
    new = state['new'][rows_Bx1, beam_BxC].at[:, :, n].set(token_BxC)
    over_BxC = jnp.isin(token_BxC, ends) | (n + 1 == most)
    # The best that go on.
    log_p, on_BxK = jax.lax.top_k(
      jnp.where(over_BxC, -jnp.inf, log_p_BxC), beams
    )
    source = (rows_Bx1 * (len(hidden) // batch) + beam_BxC)[rows_Bx1, on_BxK]
    # Those that are over, if they are among the best of all.
    length = (n + 1).astype(jnp.float32) ** length_penalty
    counts = over_BxC & (jnp.arange(over_BxC.shape[1]) < beams)[None]
    counts &= state['open'][:, None]
    scores = jnp.where(counts, log_p_BxC / length, -jnp.inf)
    scores = jnp.concatenate([state['scores_BxK'], scores], 1)
    scores, best_BxK = jax.lax.top_k(scores, beams)
    ended = jnp.where(jnp.isin(new, ends), _NONE, new)
    ended = jnp.concatenate([state['ended'], ended], 1)
    return {
      'count': n + 1,
      'log_p_BxK': log_p,
      'token_BxK': token_BxC[rows_Bx1, on_BxK],
      'new': new[rows_Bx1, on_BxK],
      'scores_BxK': scores,
      'ended': ended[rows_Bx1, best_BxK],
      'open': state['open'] & (log_p[:, 0] / length > scores[:, -1]),
      'cache': choose(cache, source.reshape(-1)),
    }

  def more(state):
    return (state['count'] < most) & jnp.any(state['open'])

  def step(state):
    hidden, cache = model.apply(
      {'params': params},
      state['token_BxK'].reshape(-1, 1),
      last + state['count'],
      cache=state['cache'],
      method='hidden',
    )
    return extend(state, hidden, cache)

  hidden, cache = read(model, params, layout, most)
  last = jnp.repeat(layout.positions_BxL[:, -1:], beams, axis=0)
  # One beam, until its first tokens make more of it.
  state = {
    'count': jnp.int32(0),
    'log_p_BxK': jnp.zeros((batch, 1)),
    'new': jnp.full((batch, 1, most), _NONE),
    'scores_BxK': jnp.full((batch, beams), -jnp.inf),
    'ended': jnp.full((batch, beams, most), _NONE),
    'open': jnp.full(batch, True),
  }
  state = jax.lax.while_loop(more, step, extend(state, hidden, cache))
  return state['ended'][:, 0]
