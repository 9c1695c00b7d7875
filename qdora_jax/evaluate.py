"""Exact match by a task's own verifier, with confidence intervals."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from qdora_jax.config import DataSection
from qdora_jax.data import Problem, Task, messages, prompt_ids
from qdora_jax.generate import generate
from qdora_jax.model import Decoder


@dataclasses.dataclass(frozen=True)
class Score:
  """How many problems were answered right.

  Attributes:
    right: exact matches.
    parseable: answers of the form the task asks for, right or wrong.
    total: problems.
    samples: (question, answer given, answer expected) of the first few.
  """

  right: int
  parseable: int
  total: int
  samples: tuple[tuple[str, str, str], ...] = ()

  @property
  def mean(self) -> float:
    return self.right / self.total

  @property
  def interval(self) -> tuple[float, float]:
    return wilson(self.right, self.total)

  def __str__(self) -> str:
    low, high = self.interval
    return (
      f'{self.mean:.1%} right (95% interval {low:.1%} to {high:.1%}, '
      f'n={self.total}); {self.parseable / self.total:.0%} parseable'
    )


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
  """Wilson's score interval of a proportion, 95% by default (Wilson 1927)."""
  p = right / total
  middle = (p + z**2 / (2 * total)) / (1 + z**2 / total)
  spread = math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
  spread *= z / (1 + z**2 / total)
  return max(0.0, middle - spread), min(1.0, middle + spread)


def exact_match(
  model: Decoder,
  params: Any,
  tokenizer: Any,
  task: Task,
  data: DataSection,
  *,
  shots: Sequence[Problem] = (),
  batch_size: int = 50,
  max_new_tokens: int = 16,
  progress: Any = iter,
) -> Score:
  """Answers the held-out problems greedily and has them scored.

  Args:
    model: the decoder.
    params: what it is applied to.
    tokenizer: with a chat template.
    task: problems and verifier; an answer is right if it scores 1.
    data: how a problem is posed.
    shots: solved problems shown before each question.
    batch_size: problems answered at once.
    max_new_tokens: an answer's length at most.
    progress: wraps the iterable over batches.
  """
  right = parseable = 0
  samples = []
  problems = task.held_out
  starts = range(0, len(problems), batch_size)
  for start in progress(starts):
    part = problems[start : start + batch_size]
    prompts = [
      prompt_ids(tokenizer, messages(data, problem, shots)) for problem in part
    ]
    answers = generate(
      model, params, prompts, max_new_tokens, stop=[tokenizer.eos_token_id]
    )
    for problem, ids in zip(part, answers, strict=True):
      answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
      right += task.score(answer, problem) == 1
      parseable += re.fullmatch(data.answer_pattern, answer) is not None
      if len(samples) < 3:
        samples.append((problem.question, answer, problem.answer))
  return Score(right, parseable, len(problems), tuple(samples))
