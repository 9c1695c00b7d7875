"""How likely a model finds texts: perplexity, and choices by likelihood."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax.loss import best_chunk, in_chunks
from qdora_jax.model import Decoder

Pair = tuple[Sequence[int], Sequence[int]]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Of a continuation, given its context.

  Attributes:
    nats: log probability, summed over its tokens.
    greedy: whether each token is the likeliest.
    tokens: how many.
  """

  nats: float
  greedy: bool
  tokens: int


def log_likelihoods(
  model: Decoder,
  params: Any,
  pairs: Sequence[Pair],
  *,
  batch_size: int = 16,
  longest: int = 0,
  progress: Progress = iter,
) -> list[Likelihood]:
  """The log likelihood of each continuation after its context.

  Args:
    model: the decoder.
    params: what it is applied to, as for `generate`.
    pairs: token ids (context, continuation), neither of them empty.
    batch_size: pairs read at once.
    longest: tokens read of a pair at most; of a longer one the first of its
      context are left out. 0 for no limit.
    progress: wraps the iterable over batches.

  Returns:
    One for each pair, in order.

  Raises:
    ValueError: if a context or a continuation is empty, or a continuation is
      longer than `longest`.
  """
  whole = []
  for context, continuation in pairs:
    if not context or not continuation:
      raise ValueError(
        'log_likelihoods: a context and a continuation of at least one token '
        f'each are expected, got {len(context)} and {len(continuation)}; put '
        "the tokenizer's end-of-text token before a text without context"
      )
    if longest and len(continuation) > longest:
      raise ValueError(
        f'log_likelihoods: a continuation has {len(continuation)} tokens, more '
        f'than longest={longest}'
      )
    # The last token is predicted, not read.
    ids = [*context, *continuation][:-1]
    whole.append((ids[-longest:] if longest else ids, continuation))
  # Batches of like lengths.
  order = sorted(range(len(whole)), key=lambda n: -len(whole[n][0]))
  rows = min(batch_size, _step(len(whole)))
  found: list[Likelihood | None] = [None] * len(whole)
  for start in progress(range(0, len(order), batch_size)):
    places = order[start : start + batch_size]
    batch = _batch([whole[n] for n in places], rows)
    nats, greedy = jax.device_get(_score(model, params, batch))
    for row, n in enumerate(places):
      count = len(whole[n][1])
      found[n] = Likelihood(float(nats[row]), bool(greedy[row]), count)
  return found


def _batch(
  part: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int
) -> dict[str, np.ndarray]:
  """Arrays [rows, L] and [rows, C]; lengths in steps, for few programs."""
  length = _step(max(len(ids) for ids, _ in part))
  most = _step(max(len(labels) for _, labels in part))
  batch = {
    'tokens': np.zeros((rows, length), np.int32),
    'positions': np.zeros((rows, length), np.int32),
    'segments': np.zeros((rows, length), np.int32),
    'loss_at': np.zeros((rows, most), np.int32),
    'labels': np.zeros((rows, most), np.int32),
    'weights': np.zeros((rows, most), np.float32),
  }
  for row, (ids, labels) in enumerate(part):
    batch['tokens'][row, : len(ids)] = ids
    batch['positions'][row, : len(ids)] = np.arange(len(ids))
    batch['segments'][row, : len(ids)] = 1
    at = np.arange(len(ids) - len(labels), len(ids))
    batch['loss_at'][row, : len(labels)] = at
    batch['labels'][row, : len(labels)] = labels
    batch['weights'][row, : len(labels)] = 1
  return batch


def _step(length: int) -> int:
  """A length rounded up: to 8, 16, 32, and then to quarters of its octave."""
  quarter = max(8, 2 ** (max(1, length - 1).bit_length() - 3))
  return -(-length // quarter) * quarter


@functools.partial(jax.jit, static_argnums=0)
def _score(model, params, batch):
  """Of each row its log likelihood, and whether it is the greedy one."""
  parts = in_chunks(model, params, batch, best_chunk(jax.default_backend()))

  def score(sums, chunk):
    hidden, labels, weights = chunk
    logits = model.apply({'params': params}, hidden, method='unembed')
    logp = jax.nn.log_softmax(logits, -1)
    mine = jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]
    best = (jnp.argmax(logits, -1) == labels) | (weights == 0)
    nats, greedy = sums
    nats += jnp.sum(mine * weights, 1)
    return (nats, greedy & jnp.all(best, 1)), None

  rows = len(batch['labels'])
  start = (jnp.zeros(rows), jnp.ones(rows, bool))
  return jax.lax.scan(score, start, parts)[0]


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """How well a text is predicted.

  Attributes:
    nats: of each window, summed over its tokens.
    tokens: of each window.
    words, bytes: of the text, for each token.
  """

  nats: Sequence[float]
  tokens: Sequence[int]
  words: float
  bytes: float

  @property
  def loss(self) -> float:
    """Nats per token."""
    return sum(self.nats) / sum(self.tokens)

  @property
  def by_token(self) -> float:
    return math.exp(self.loss)

  @property
  def by_word(self) -> float:
    """Comparable between tokenizers."""
    return math.exp(self.loss / self.words)

  @property
  def bits_by_byte(self) -> float:
    return self.loss / math.log(2) / self.bytes


def perplexity(
  model: Decoder,
  params: Any,
  tokenizer: Any,
  text: str,
  *,
  length: int = 1024,
  context: int = 1,
  batch_size: int = 4,
  progress: Progress = iter,
) -> Perplexity:
  """Perplexity of a text, each of its tokens predicted once.

  The text is cut into windows as lm-evaluation-harness cuts it: the first token
  follows BOS (or the end-of-text token), a window's first follows the last
  `context` tokens of the window before.

  Args:
    model, params, tokenizer: as for `generate_text`.
    text: at least one token.
    length: tokens that a window reads at most.
    context: tokens of the window before that it reads again; with 1, the
      harness's own, windows are disjoint and each token is read once.
    batch_size: windows read at once.
    progress: wraps the iterable over batches.

  Raises:
    ValueError: for an empty text, or a context that leaves nothing to predict.
  """
  if not 1 <= context <= length:
    raise ValueError(f'context={context}: expected 1 to length={length} tokens')
  ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
  if not ids:
    raise ValueError('perplexity: the text is empty')
  pairs = list(windows(ids, first_token(tokenizer), length, context))
  found = log_likelihoods(
    model, params, pairs, batch_size=batch_size, progress=progress
  )
  return Perplexity(
    [-f.nats for f in found],
    [f.tokens for f in found],
    max(1, len(text.split())) / len(ids),
    len(text.encode()) / len(ids),
  )


def first_token(tokenizer: Any) -> int:
  """What stands before a text that has nothing before it."""
  bos = tokenizer.bos_token_id
  return tokenizer.eos_token_id if bos is None else bos


def windows(
  ids: Sequence[int], first: int, length: int, context: int = 1
) -> Iterable[Pair]:
  """(context, to predict) pairs in which every id is predicted once.

  Args:
    ids: of a text.
    first: what stands before it.
    length: ids read at most, the last one (which is predicted) not counted.
    context: ids of the window before, in all windows but the first.
  """
  yield [first], ids[:length]
  start, move = length, length - context + 1
  while start < len(ids):
    end = min(start + move, len(ids))
    yield ids[max(0, end - 1 - length) : start], ids[start:end]
    start = end


@dataclasses.dataclass(frozen=True)
class Chosen:
  """The choices a model finds likeliest, by three measures.

  Attributes:
    by_sum: index of the choice of the highest log likelihood,
    by_token: of the highest per token,
    by_byte: of the highest per byte of its text, but for the blank it begins
      with (lm-evaluation-harness's acc_bytes).
  """

  by_sum: int
  by_token: int
  by_byte: int


def choose(
  model: Decoder,
  params: Any,
  tokenizer: Any,
  rows: Sequence[Any],
  *,
  batch_size: int = 32,
  progress: Progress = iter,
) -> list[Chosen]:
  """Answers multiple choice by likelihood.

  Args:
    model, params, tokenizer: as for `generate_text`.
    rows: with 'context' (a text, or one for each choice) and 'choices' among
      their values, as tasks make them.
    batch_size: choices read at once.
    progress: wraps the iterable over batches.

  Raises:
    ValueError: for a row without choices.
  """
  pairs, texts = [], []
  for row in rows:
    if 'choices' not in row.values:
      raise ValueError(
        f'{row.place} has no choices; expected a record of a multiple-choice '
        "task, such as 'piqa:FILE'"
      )
    contexts, choices = row.values['context'], row.values['choices']
    if isinstance(contexts, str):
      contexts = [contexts] * len(choices)
    for context, choice in zip(contexts, choices, strict=True):
      pairs.append(encode_pair(tokenizer, context, choice))
      texts.append(choice)
  found = iter(
    zip(
      log_likelihoods(
        model, params, pairs, batch_size=batch_size, progress=progress
      ),
      texts,
      strict=True,
    )
  )
  chosen = []
  for row in rows:
    some = [next(found) for _ in row.values['choices']]
    measures = (
      [f.nats for f, _ in some],
      [f.nats / f.tokens for f, _ in some],
      [f.nats / len(text.strip().encode()) for f, text in some],
    )
    chosen.append(Chosen(*(int(np.argmax(m)) for m in measures)))
  return chosen


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
  """Token ids of both, the whole tokenized at once.

  Blanks at the context's end go to the continuation, with which they are a
  token; without a context the continuation follows `first_token`.
  """
  bare = context.rstrip()
  continuation = context[len(bare) :] + continuation
  if not bare:
    ids = tokenizer.encode(continuation, add_special_tokens=False)
    return [first_token(tokenizer)], ids
  before = tokenizer.encode(bare)
  return before, tokenizer.encode(bare + continuation)[len(before) :]
