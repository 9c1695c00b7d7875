"""From problems to batches: chat prompts, completions, loss on completions.

A batch of B examples is a dict of arrays whose shapes never change in a run:

  tokens    i32 [B, L]   prompt and completion, padded on the right
  loss_at   i32 [B, C]   where a completion token is predicted from
  labels    i32 [B, C]   that token
  weights   f32 [B, C]   1, or 0 for padding

Logits are made at `loss_at` alone. Which examples a step sees is a function of
the seed and the step, so a resumed run continues exactly.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qdora_jax.config import DataSection
from qdora_jax.interop import reasoning_gym

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question with its answer, and what the verifier needs to know."""

  question: str
  answer: str
  entry: Any


@dataclasses.dataclass(frozen=True)
class Task:
  """Problems to train on, others to test on, and the judge of answers."""

  train: Sequence[Problem]
  held_out: Sequence[Problem]
  score: Callable[[str, Problem], float]


@dataclasses.dataclass(frozen=True)
class Example:
  """Token ids: the completion is learned, the prompt is given."""

  prompt: tuple[int, ...]
  completion: tuple[int, ...]


def load_task(data: DataSection) -> Task:
  """The problems a config names; no question is in both parts.

  reasoning-gym draws problem i from seed + i, so two seeds give overlapping
  sets: one seed is drawn from, its first distinct questions are held out and
  the following ones trained on.

  Raises:
    ValueError: for an unknown data set, or too few distinct questions.
  """
  family, _, name = data.name.partition('/')
  if family != 'reasoning_gym' or not name:
    raise ValueError(
      f"config.data.name={data.name!r}: expected 'reasoning_gym/TASK', such as "
      "'reasoning_gym/chain_sum'"
    )
  if data.path:
    raise ValueError(
      f'config.data.path={data.path!r}: {data.name} reads no files; leave it '
      'empty'
    )
  need = data.eval_size + data.train_size
  # Repeated questions are skipped; a task with fewer than half distinct ones is
  # too small for the sizes asked.
  source = reasoning_gym.load(name, 2 * need, data.seed, data.options)
  distinct: dict[str, Problem] = {}
  for i in range(len(source)):
    entry = source[i]
    if entry['answer'] is None:
      raise ValueError(
        f'{data.name} gives no answer to learn (many are right): '
        f'{entry["question"]!r}; choose another config.data.name'
      )
    question, answer = entry['question'].strip(), str(entry['answer']).strip()
    distinct.setdefault(question, Problem(question, answer, entry))
    if len(distinct) == need:
      break
  problems = list(distinct.values())
  if len(problems) < need:
    raise ValueError(
      f'{data.name} with {dict(data.options)} has {len(problems)} distinct '
      f'questions among {2 * need}; config.data.eval_size + '
      f'config.data.train_size ask for {need}'
    )
  return Task(
    problems[data.eval_size :],
    problems[: data.eval_size],
    lambda answer, problem: source.score_answer(answer, problem.entry),
  )


def messages(
  data: DataSection, problem: Problem, shots: Sequence[Problem] = ()
) -> list[dict[str, str]]:
  """The chat that asks a problem, solved ones before it."""

  def ask(p: Problem) -> dict[str, str]:
    text = (
      f'{p.question}\n{data.instruction}' if data.instruction else (p.question)
    )
    return {'role': 'user', 'content': text}

  chat = [{'role': 'system', 'content': data.system}] if data.system else []
  for shot in shots:
    chat += [ask(shot), {'role': 'assistant', 'content': shot.answer}]
  return [*chat, ask(problem)]


def prompt_ids(tokenizer: Any, chat: list[dict[str, str]]) -> list[int]:
  """Token ids of a chat, up to where the assistant starts to speak."""
  text = tokenizer.apply_chat_template(
    chat, tokenize=False, add_generation_prompt=True
  )
  return tokenizer.encode(text, add_special_tokens=False)


def encode(tokenizer: Any, data: DataSection, problem: Problem) -> Example:
  """A problem as prompt and completion, its end-of-turn token included."""
  prompt = prompt_ids(tokenizer, messages(data, problem))
  answer = tokenizer.encode(problem.answer, add_special_tokens=False)
  return Example(tuple(prompt), (*answer, tokenizer.eos_token_id))


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches by step: `batches(step)`, a pure function.

  Attributes:
    examples: those that fit.
    dropped: how many did not.
    batch_size: B.
    length: L.
    completion: C, the longest completion.
    seed: of the order; every epoch has its own.
  """

  examples: tuple[Example, ...]
  dropped: int
  batch_size: int
  length: int
  completion: int
  seed: int

  @classmethod
  def make(
    cls, examples: Sequence[Example], batch_size: int, seq_len: int, seed: int
  ) -> 'Batches':
    """Drops examples longer than seq_len (0: none) and fixes the shapes.

    Raises:
      ValueError: if there is no example left, or one without a completion.
    """
    for n, example in enumerate(examples):
      if not example.completion:
        raise ValueError(f'example {n} has no completion to learn')
    fits = tuple(
      e
      for e in examples
      if not seq_len or len(e.prompt) + len(e.completion) <= seq_len
    )
    if not fits:
      raise ValueError(
        f'none of {len(examples)} examples fits in train.seq_len={seq_len}'
      )
    longest = max(len(e.prompt) + len(e.completion) for e in fits)
    # Whole vector registers; the model's products like multiples of 8.
    length = -(-longest // 8) * 8
    completion = max(len(e.completion) for e in fits)
    dropped = len(examples) - len(fits)
    return cls(fits, dropped, batch_size, length, completion, seed)

  def __call__(self, step: int) -> Batch:
    batch = {
      'tokens': np.zeros((self.batch_size, self.length), np.int32),
      'loss_at': np.zeros((self.batch_size, self.completion), np.int32),
      'labels': np.zeros((self.batch_size, self.completion), np.int32),
      'weights': np.zeros((self.batch_size, self.completion), np.float32),
    }
    for row, n in enumerate(self._indices(step)):
      example = self.examples[n]
      ids = example.prompt + example.completion
      count, start = len(example.completion), len(example.prompt)
      batch['tokens'][row, : len(ids)] = ids
      batch['loss_at'][row, :count] = np.arange(start - 1, len(ids) - 1)
      batch['labels'][row, :count] = example.completion
      batch['weights'][row, :count] = 1
    return batch

  def _indices(self, step: int) -> list[int]:
    """Examples of a step: epochs are permutations, one after the other."""
    total = len(self.examples)
    first = step * self.batch_size
    places = range(first, first + self.batch_size)
    epochs = {place // total for place in places}
    orders = {
      epoch: np.random.default_rng((self.seed, epoch)).permutation(total)
      for epoch in epochs
    }
    return [int(orders[place // total][place % total]) for place in places]
