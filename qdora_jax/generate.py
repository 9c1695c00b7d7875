"""Generation with a KV cache, over any parameter tree the model takes.

What all prompts of a batch begin with - a system message, few-shot examples -
is read once and its cache shared. The rest is padded on the left, at positions
nothing can see.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax.linear import by_row
from qdora_jax.model import Decoder, init_cache
from qdora_jax.sharding import gather
from qdora_jax.sight import NOWHERE

# New tokens between two looks at what was said.
PAUSE = 16
State = dict[str, Any]


def generate(
  model: Decoder,
  params: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  stop: Sequence[int] = (),
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  key: jax.Array | None = None,
  done: Callable[[list[list[int]]], Sequence[bool]] | None = None,
) -> list[list[int]]:
  """Continues each prompt.

  What is drawn is drawn as in transformers: of logits over the temperature the
  top_k, of these the fewest that have top_p of the probability.

  Args:
    model: the decoder.
    params: plain, quantized, attached or (fastest for DoRA) frozen.
    prompts: token ids, of any lengths; not empty.
    max_new_tokens: at most so many each.
    stop: ids that end a continuation; not part of the result.
    temperature: 0 takes the likeliest token.
    top_k: draws among so many of the likeliest tokens; 0 for all.
    top_p: draws among the likeliest tokens that have so much of the probability
      together; 1 for all.
    key: PRNG key, needed if temperature > 0.
    done: asked every PAUSE tokens with what was said so far, says which rows
      need no more; such a row may still get a few.

  Returns:
    The new ids of each prompt.

  Raises:
    ValueError: for an empty prompt, a temperature without a key, or a number
      out of its range.
  """
  layout = lay_out(params, prompts, max_new_tokens)
  for name, value, fine, expected in (
    ('temperature', temperature, temperature >= 0, 'at least 0'),
    ('top_k', top_k, top_k >= 0, 'at least 0 (all)'),
    ('top_p', top_p, 0 < top_p <= 1, 'more than 0, at most 1 (all)'),
  ):
    if not fine:
      raise ValueError(f'{name}={value}: expected {expected}')
  if temperature > 0 and key is None:
    raise ValueError(f'temperature={temperature} needs a PRNG key')
  draw = Draw(temperature > 0, top_k, top_p < 1)
  settings = {
    'temperature': jnp.float32(temperature),
    'top_p': jnp.float32(top_p),
    'key': jax.random.key(0) if key is None else key,
    'stop': jnp.asarray(tuple(stop) or (-1,), jnp.int32),
  }
  state = _begin(model, draw, max_new_tokens, params, settings, layout)
  ends = frozenset(stop)

  def said(state: State) -> list[list[int]]:
    new = gather(state['new']).tolist()
    rows = [row[: int(state['count'])] for row in new]
    return [list(itertools.takewhile(lambda t: t not in ends, r)) for r in rows]

  pause = max_new_tokens if done is None else PAUSE
  for until in range(pause, max_new_tokens + pause, pause):
    until = min(until, max_new_tokens)
    state = _go_on(model, draw, params, settings, state, jnp.int32(until))
    if bool(jnp.all(state['done'])) or until == max_new_tokens:
      break
    over = jnp.asarray(done(said(state)), bool)
    state['done'] |= over
  return said(state)


def generate_text(
  model: Decoder,
  params: Any,
  tokenizer: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  stop_strings: Sequence[str] = (),
  **options: Any,
) -> list[str]:
  """What each prompt is continued with, as text.

  Args:
    model, params, prompts, max_new_tokens: as for `generate`.
    tokenizer: a transformers fast tokenizer; its end-of-text token ends a
      continuation.
    stop_strings: each ends a continuation where it begins, within a token or
      not.
    options: temperature, top_k, top_p and key of `generate`.

  Returns:
    The text of each, without special tokens, blanks and all.
  """

  def text(ids: Sequence[int]) -> str:
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [whole.find(words) for words in stop_strings]
    return whole[: min((e for e in ends if e >= 0), default=len(whole))]

  def done(said: list[list[int]]) -> list[bool]:
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    return [any(words in t for words in stop_strings) for t in texts]

  said = generate(
    model,
    params,
    prompts,
    max_new_tokens,
    stop=[tokenizer.eos_token_id],
    done=done if stop_strings else None,
    **options,
  )
  return [text(ids) for ids in said]


class Layout(NamedTuple):
  """Prompts as they are read.

  Attributes:
    shared_1xP: i32, what all of them begin with.
    tokens_BxL: i32, the rest of each, padded on the left.
    positions_BxL: i32; padding is NOWHERE.
  """

  shared_1xP: jax.Array
  tokens_BxL: jax.Array
  positions_BxL: jax.Array


def lay_out(
  params: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Layout:
  """Checks what is asked for, and lays the prompts out."""
  if not prompts or not all(prompts):
    raise ValueError('expected prompts of at least one token each')
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens={max_new_tokens}: expected at least 1')
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
  return Layout(
    jnp.asarray([prompts[0][:shared]], jnp.int32),
    jnp.asarray(tokens),
    jnp.asarray(positions),
  )


class Draw(NamedTuple):
  """How a token is chosen; part of the program."""

  warm: bool
  top_k: int
  by_p: bool


def pick(
  logits_BxV: jax.Array, draw: Draw, settings: Mapping[str, Any], n: jax.Array
) -> jax.Array:
  """Token n of each row, i32 [B]; see `generate`."""
  if not draw.warm:
    return jnp.argmax(logits_BxV, -1).astype(jnp.int32)
  logits = logits_BxV / settings['temperature']
  if draw.top_k:
    least = jax.lax.top_k(logits, min(draw.top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if draw.by_p:
    ordered = jnp.sort(logits, -1, descending=True)
    p = jax.nn.softmax(ordered, -1)
    # A token stays if those before it have less than top_p.
    stays = jnp.cumsum(p, -1) - p < settings['top_p']
    least = jnp.min(jnp.where(stays, ordered, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  key = jax.random.fold_in(settings['key'], n)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def read(
  model: Decoder, params: Any, layout: Layout, most: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """What the model makes of some prompts.

  Returns:
    hidden states of the last tokens, [B, 1, D], and a cache with room for
    `most` more.
  """
  shared, (batch, width) = layout.shared_1xP.shape[1], layout.tokens_BxL.shape
  variables = {'params': params}
  cache = init_cache(model.config, 1, shared + width + most, model.dtype)
  if shared:
    _, cache = model.apply(
      variables, layout.shared_1xP, cache=cache, method='hidden'
    )
  hidden, cache = model.apply(
    variables,
    layout.tokens_BxL,
    layout.positions_BxL,
    cache=choose(cache, jnp.zeros(batch, jnp.int32)),
    method='hidden',
  )
  return hidden[:, -1:], cache


def choose(
  cache: dict[str, jax.Array], rows: jax.Array
) -> dict[str, jax.Array]:
  """A cache of some of a cache's rows, once or more each."""
  return {
    'k': jnp.take(cache['k'], rows, axis=1),
    'v': jnp.take(cache['v'], rows, axis=1),
    'positions': jnp.take(cache['positions'], rows, axis=0),
    'index': cache['index'],
  }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(model, draw, most, params, settings, layout):
  """The state after the first new token, with room for `most` of them."""
  hidden, cache = read(model, params, layout, most)
  first = _next(model, draw, params, settings, hidden, jnp.int32(0))
  return {
    'count': jnp.int32(1),
    'token': first,
    'done': _ended(first, settings),
    'new': jnp.zeros((len(first), most), jnp.int32).at[:, 0].set(first),
    'last': layout.positions_BxL[:, -1:],
    'cache': cache,
  }


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _go_on(model, draw, params, settings, state, until):
  """The state with `until` new tokens, or when all rows are done.

  A row that is done repeats its last token.
  """

  def more(state):
    return (state['count'] < until) & ~jnp.all(state['done'])

  def step(state):
    n, token = state['count'], state['token']
    hidden, cache = model.apply(
      {'params': params},
      token[:, None],
      state['last'] + n,
      cache=state['cache'],
      method='hidden',
    )
    drawn = _next(model, draw, params, settings, hidden, n)
    token = jnp.where(state['done'], token, drawn)
    new = jax.lax.dynamic_update_slice(state['new'], token[:, None], (0, n))
    return {
      **state,
      'count': n + 1,
      'token': token,
      'done': state['done'] | _ended(token, settings),
      'new': new,
      'cache': cache,
    }

  return jax.lax.while_loop(more, step, state)


def _next(model, draw, params, settings, hidden_Bx1xD, n):
  """Token n."""
  logits = model.apply({'params': params}, hidden_Bx1xD, method='unembed')[:, 0]
  return pick(logits, draw, settings, n)


def _ended(token_B: jax.Array, settings: Mapping[str, Any]) -> jax.Array:
  return jnp.any(token_B[:, None] == settings['stop'][None], axis=1)
