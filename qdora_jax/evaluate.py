"""Held-out loss, and exact match with confidence intervals."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from qdora_jax.beam import beam_search
from qdora_jax.chat import CHAT, Format, question_ids
from qdora_jax.data import Batch
from qdora_jax.generate import generate
from qdora_jax.intervals import Measure, bootstrap, wilson
from qdora_jax.loss import summed_loss
from qdora_jax.model import Decoder
from qdora_jax.rows import Row


@dataclasses.dataclass(frozen=True)
class Score:
  """How well held-out rows were answered.

  Attributes:
    right: exact matches.
    parseable: answers of the form the task asks for, right or wrong.
    total: questions asked; 0 if only the loss was taken.
    samples: (question, answer given, answer expected) of the first few.
    loss: mean cross-entropy of the learned tokens, in nats, if it was taken.
    loss_interval: its 95% interval, by resampling batches; None of one batch.
  """

  right: int
  parseable: int
  total: int
  samples: Sequence[Sequence[str]] = ()
  loss: float | None = None
  loss_interval: Sequence[float] | None = None

  @property
  def mean(self) -> float:
    return self.right / max(1, self.total)

  @property
  def interval(self) -> tuple[float, float]:
    return wilson(self.right, self.total)

  def __str__(self) -> str:
    parts = []
    if self.total:
      low, high = self.interval
      parts += [
        f'{self.mean:.1%} right (95% interval {low:.1%} to {high:.1%}, '
        f'n={self.total})',
        f'{self.parseable / self.total:.0%} parseable',
      ]
    if self.loss is not None:
      text = f'held-out loss {self.loss:.4f} '
      if self.loss_interval is not None:
        text += '({:.4f} to {:.4f}) '.format(*self.loss_interval)
      parts.append(f'{text}nats a token')
    return '; '.join(parts)


def exact_match(
  model: Decoder,
  params: Any,
  tokenizer: Any,
  rows: Sequence[Row],
  form: Format = CHAT,
  *,
  answer_pattern: str = '.+',
  shots: Sequence[Row] = (),
  batch_size: int = 50,
  max_new_tokens: int = 16,
  beams: int = 1,
  progress: Any = iter,
) -> Score:
  """Answers held-out questions and has them scored.

  Args:
    model: the decoder.
    params: what it is applied to.
    tokenizer: a transformers fast tokenizer.
    rows: with answers; right is what their verifiers score 1.
    form: how a question is posed.
    answer_pattern: regex of an answer of the right form.
    shots: rows shown with their answers before each question.
    batch_size: questions answered at once.
    max_new_tokens: an answer's length at most.
    beams: 1 takes the likeliest token each time, more are a beam search.
    progress: wraps the iterable over batches.

  Raises:
    ValueError: if a row has no answer.
  """
  said = answers(
    model,
    params,
    tokenizer,
    rows,
    form,
    shots=shots,
    batch_size=batch_size,
    max_new_tokens=max_new_tokens,
    beams=beams,
    progress=progress,
  )
  pairs = list(zip(rows, said, strict=True))
  return Score(
    sum(row.score(answer) == 1 for row, answer in pairs),
    sum(re.fullmatch(answer_pattern, answer) is not None for answer in said),
    len(rows),
    tuple((row.question, answer, row.answer) for row, answer in pairs[:3]),
  )


def answers(
  model: Decoder,
  params: Any,
  tokenizer: Any,
  rows: Sequence[Row],
  form: Format = CHAT,
  *,
  shots: Sequence[Row] = (),
  batch_size: int = 50,
  max_new_tokens: int = 16,
  beams: int = 1,
  progress: Any = iter,
) -> list[str]:
  """What the model answers to each row's question.

  Args, Raises: as for `exact_match`.
  """
  for row in rows:
    if row.answer is None:
      raise ValueError(
        f'{row.place} has no answer to compare with; expected a completion or '
        'an assistant turn at the end (or config.eval.exact_match=False, '
        '--by perplexity)'
      )
  search = generate
  if beams > 1:
    search = functools.partial(beam_search, beams=beams)
  said: list[str] = []
  for start in progress(range(0, len(rows), batch_size)):
    part = rows[start : start + batch_size]
    prompts = [question_ids(tokenizer, row, form, shots) for row in part]
    ids = search(
      model, params, prompts, max_new_tokens, stop=[tokenizer.eos_token_id]
    )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    said += [text.strip() for text in texts]
  return said


def held_out_loss(
  model: Decoder, params: Any, batches: Iterable[Batch]
) -> float:
  """Mean cross-entropy of all learned tokens, in nats; exp of it: perplexity.

  Args:
    model: the decoder.
    params: what it is applied to.
    batches: finitely many, of one shape, such as `Batches.once()` gives.

  Raises:
    ValueError: if there are none.
  """
  nats, tokens = _sums(model, params, batches).sum(0)
  return float(nats / tokens)


def held_out_measure(
  model: Decoder, params: Any, batches: Iterable[Batch]
) -> Measure:
  """`held_out_loss` with its 95% interval, by resampling batches."""
  sums = _sums(model, params, batches)

  def mean(at: np.ndarray) -> float:
    nats, tokens = sums[at].sum(0)
    return nats / tokens

  return bootstrap(mean, len(sums))


def _sums(model: Decoder, params: Any, batches: Iterable[Batch]) -> np.ndarray:
  """(nats, learned tokens) of each batch, f64 [N, 2]."""
  sums = [
    (float(_loss(model, params, batch)), float(batch['weights'].sum()))
    for batch in batches
  ]
  if not sum(tokens for _, tokens in sums):
    raise ValueError('held_out_loss: there is nothing to take the loss of')
  return np.array(sums)


_loss = jax.jit(summed_loss, static_argnums=0)
