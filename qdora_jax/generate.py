"""Generation with a KV cache, over any parameter tree the model takes.

What all prompts of a batch begin with - a system message, few-shot examples -
is read once and its cache shared. The rest is padded on the left, at positions
nothing can see.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax.linear import by_row
from qdora_jax.model import Decoder, init_cache
from qdora_jax.sharding import gather
from qdora_jax.sight import NOWHERE


def generate(
  model: Decoder,
  params: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  stop: Sequence[int] = (),
  temperature: float = 0.0,
  key: jax.Array | None = None,
) -> list[list[int]]:
  """Continues each prompt.

  Args:
    model: the decoder.
    params: plain, quantized, attached or (fastest for DoRA) frozen.
    prompts: token ids, of any lengths; not empty.
    max_new_tokens: at most so many each.
    stop: ids that end a continuation; not part of the result.
    temperature: 0 takes the likeliest token.
    key: PRNG key, needed if temperature > 0.

  Returns:
    The new ids of each prompt.

  Raises:
    ValueError: for an empty prompt, or a temperature without a key.
  """
  if not prompts or not all(prompts):
    raise ValueError('generate: expected prompts of at least one token each')
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens={max_new_tokens}: expected at least 1')
  if temperature > 0 and key is None:
    raise ValueError(f'temperature={temperature} needs a PRNG key')
  # At least one token of each prompt stays behind what is shared.
  columns = zip(*(p[:-1] for p in prompts), strict=False)
  alike = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
  # Lengths in eights, here and below, so that few shapes are compiled.
  shared = sum(1 for _ in alike) // 8 * 8
  if by_row(params):
    shared = 0  # Each row's adapter makes keys and values of its own.
  rest = [list(p[shared:]) for p in prompts]
  width = -(-max(map(len, rest)) // 8) * 8
  tokens = np.zeros((len(rest), width), np.int32)
  positions = np.full((len(rest), width), NOWHERE, np.int32)
  for row, ids in enumerate(rest):
    tokens[row, width - len(ids) :] = ids
    positions[row, width - len(ids) :] = shared + np.arange(len(ids))
  new = _generate(
    model,
    max_new_tokens,
    tuple(stop),
    params,
    jnp.asarray([prompts[0][:shared]], jnp.int32),
    jnp.asarray(tokens),
    jnp.asarray(positions),
    jnp.float32(temperature),
    jax.random.key(0) if key is None else key,
  )
  ends = frozenset(stop)
  results = []
  for row in gather(new).tolist():
    end = next((n for n, t in enumerate(row) if t in ends), len(row))
    results.append(row[:end])
  return results


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
  model, count, stop, params, prefix_1xP, tokens_BxL, positions_BxL, heat, key
):
  """New tokens [B, count]; rows that have stopped repeat their stop token."""
  batch, width = tokens_BxL.shape
  shared = prefix_1xP.shape[1]
  variables = {'params': params}
  cache = init_cache(model.config, 1, shared + width + count, model.dtype)
  if shared:
    _, cache = model.apply(variables, prefix_1xP, cache=cache, method='hidden')

  def spread(a: jax.Array, axis: int) -> jax.Array:
    return jnp.repeat(a, batch, axis=axis)

  cache = {
    'k': spread(cache['k'], 1),
    'v': spread(cache['v'], 1),
    'positions': spread(cache['positions'], 0),
    'index': cache['index'],
  }

  def pick(hidden_BxLxD: jax.Array, n: jax.Array) -> jax.Array:
    last = hidden_BxLxD[:, -1:]
    logits = model.apply(variables, last, method='unembed')[:, 0]
    greedy = jnp.argmax(logits, -1)
    warm = logits / jnp.maximum(heat, 1e-6)
    drawn = jax.random.categorical(jax.random.fold_in(key, n), warm)
    return jnp.where(heat > 0, drawn, greedy).astype(jnp.int32)

  hidden, cache = model.apply(
    variables, tokens_BxL, positions_BxL, cache=cache, method='hidden'
  )
  first = pick(hidden, jnp.int32(0))
  new = jnp.zeros((batch, count), jnp.int32).at[:, 0].set(first)
  ends = jnp.asarray(stop or (-1,), jnp.int32)

  def ended(token_B: jax.Array) -> jax.Array:
    return jnp.any(token_B[:, None] == ends[None], axis=1)

  def more(state):
    n, _, done, *_ = state
    return (n < count) & ~jnp.all(done)

  def step(state):
    n, token, done, new, cache = state
    where = positions_BxL[:, -1:] + n
    hidden, cache = model.apply(
      variables, token[:, None], where, cache=cache, method='hidden'
    )
    token = jnp.where(done, token, pick(hidden, n))
    new = jax.lax.dynamic_update_slice(new, token[:, None], (0, n))
    return n + 1, token, done | ended(token), new, cache

  state = (jnp.int32(1), first, ended(first), new, cache)
  n, token, _, new, _ = jax.lax.while_loop(more, step, state)
  # Columns never reached belong to rows that have all stopped.
  reached = jnp.arange(count)[None] < n
  return jnp.where(reached, new, token[:, None])
