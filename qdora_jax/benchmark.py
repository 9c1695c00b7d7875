"""A benchmark's score: a source of data, a model, and what is made of both.

Three ways: by answers (generated, greedily or by beams, and judged by the task
or compared with its references; and how likely the right ones are), by the
likelihood of choices, and by perplexity. Every figure has a 95% interval:
Wilson's for shares, by resampling for others (of perplexity: of windows).
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from qdora_jax import chat, likelihood, nlg, rows, tasks
from qdora_jax.evaluate import answers
from qdora_jax.intervals import Measure, bootstrap, wilson
from qdora_jax.prompts import Format
from qdora_jax.rows import Row
from qdora_jax.run import Run

By = Literal['answers', 'likelihood', 'perplexity']


@dataclasses.dataclass(frozen=True)
class Result:
  """What a benchmark found.

  Attributes:
    source: as it was asked for.
    by: how it was measured; 'lm_eval': by its harness.
    total: rows scored (windows of perplexity); available: rows there are.
    measures: figures by name.
    how: what was asked for besides, '3 shots, 4 beams'.
    samples: (question, answer given, answer expected) of the first few.
    notes: what a reader should know.
    seconds: it took.
  """

  source: str
  by: By | Literal['lm_eval']
  total: int
  available: int
  measures: dict[str, Measure]
  how: str = ''
  samples: Sequence[Sequence[str]] = ()
  notes: Sequence[str] = ()
  seconds: float = 0.0

  def __str__(self) -> str:
    some = '' if self.total == self.available else f' of {self.available:,}'
    way = f'{self.by}, {self.how}' if self.how else self.by
    head = f'{self.source}, by {way}, n={self.total:,}{some}:'
    measures = [f'  {name}: {m}' for name, m in self.measures.items()]
    return '\n'.join([head, *measures, *(f'  {note}' for note in self.notes)])


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is measured: a model, and how it is spoken to."""

  model: Any
  params: Any
  tokenizer: Any
  form: Format = chat.CHAT


def of_run(
  run: Run,
  source: str,
  by: By | None = None,
  *,
  base: bool = False,
  beams: int | None = None,
  **options: Any,
) -> Result:
  """Measures a run's model, and says what of the source it was trained on.

  Args:
    run: the run.
    source, by: as for `measure`.
    base: takes its base without the adapter.
    beams: as for `measure`; None: what the run's config says.
    options: others of `measure`.

  Raises:
    ValueError: for the base of a full fine-tuning.
  """
  if base and not run.base:
    raise ValueError(
      f'{run.workdir} is a full fine-tuning, and does not keep its base; '
      "expected an adapter's run"
    )
  params = run.base if base else run.params()
  form = run.config.data.format()
  subject = Subject(run.model, params, run.tokenizer, form)
  trained, notes = None, []
  if not base:
    try:
      trained = [row for some in run.data.train.values() for row in some]
    except (OSError, ValueError) as error:
      notes = [f'whether it overlaps the training set is not known: {error}']
  if beams is None:
    beams = run.config.eval.beams
  options |= {'beams': beams, 'trained': trained}
  found = measure(subject, source, by, **options)
  return dataclasses.replace(found, notes=[*found.notes, *notes])


def load(source: str, limit: int = 0, seed: int = 0) -> tuple[list[Row], int]:
  """Rows of a benchmark, and how many there are.

  Args:
    source: 'TASK:FILE' or a file, see `rows.read`. Of the task e2e inputs are
      rows, with all their references.
    limit: so many at random; 0 for all.
    seed: which.

  Raises:
    ValueError, FileNotFoundError: as `rows.read`.
    ImportError: if it has references and no package compares with them.
  """
  found = rows.read(source)
  if tasks.split(source)[0] == 'e2e':
    groups = tasks.grouped([row.values for row in found])
    found = [Row(g, f'{source}[{n}]') for n, g in enumerate(groups)]
  if 'references' in found[0].values:
    nlg.check()
  if not limit or limit >= len(found):
    return found, len(found)
  chosen = np.random.default_rng(seed).permutation(len(found))[:limit]
  return [found[n] for n in sorted(chosen)], len(found)


def way(source: str, by: By | None = None) -> By:
  """How a source is measured: as asked, or as its kind wants it."""
  name, file = tasks.split(source)
  text = not name and file.endswith('.txt')
  return by or ('perplexity' if text else 'answers')


def measure(
  subject: Subject,
  source: str,
  by: By | None = None,
  *,
  limit: int = 0,
  seed: int = 0,
  shots: Sequence[Row] = (),
  batch_size: int = 32,
  max_new_tokens: int = 0,
  beams: int = 1,
  length: int = 1024,
  trained: Sequence[Row] | None = None,
  progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Result:
  """Measures a model on a source.

  Args:
    subject: the model.
    source: 'TASK:FILE' (see tasks.py), or a file of rows.
    by: None: perplexity for a .txt file, answers for all else.
    limit: rows taken, at random; 0 for all.
    seed: which.
    shots: rows shown with their answers before each question.
    batch_size: prompts or texts read at once.
    max_new_tokens: of an answer; 0 for what the task says.
    beams: 1 answers greedily, more by a beam search.
    length: tokens of a window of perplexity.
    trained: rows the model was trained on: questions that are among them are
      counted.
    progress: wraps the iterable over batches.

  Raises:
    ValueError: if the source has nothing of the kind asked for.
  """
  began = time.perf_counter()
  found, available = load(source, limit, seed)
  name, _ = tasks.split(source)
  by = way(source, by)
  if by == 'likelihood':
    result = _by_likelihood(subject, found, batch_size, progress)
  elif by == 'perplexity':
    result = _by_perplexity(subject, found, batch_size, length, progress)
    available = result['total']
  else:
    task = tasks.find(name) if name else tasks.PLAIN
    result = _by_answers(
      subject,
      found,
      task,
      shots,
      batch_size,
      max_new_tokens or task.max_new_tokens,
      beams,
      progress,
    )
  if trained is not None:
    seen = overlap(found, trained)
    what = 'texts' if by == 'perplexity' else 'questions'
    result['notes'].append(f'{seen:,} of its {what} were trained on')
  seconds = round(time.perf_counter() - began, 1)
  return Result(source, by, available=available, seconds=seconds, **result)


def _share(right: int, total: int) -> Measure:
  return Measure(right / total, *wilson(right, total))


def _by_likelihood(subject, found, batch_size, progress) -> dict[str, Any]:
  chosen = likelihood.choose(
    subject.model,
    subject.params,
    subject.tokenizer,
    found,
    batch_size=batch_size,
    progress=progress,
  )
  labels = [row.values['label'] for row in found]
  measures = {}
  for way in ('by_sum', 'by_token', 'by_byte'):
    right = sum(
      getattr(one, way) == label
      for one, label in zip(chosen, labels, strict=True)
    )
    measures[f'accuracy {way.replace("_", " ")}'] = _share(right, len(found))
  return {'total': len(found), 'measures': measures, 'notes': []}


def _by_perplexity(
  subject, found, batch_size, length, progress
) -> dict[str, Any]:
  text = rows.as_text(found)
  got = likelihood.perplexity(
    subject.model,
    subject.params,
    subject.tokenizer,
    text,
    length=length,
    batch_size=max(1, batch_size // 8),
    progress=progress,
  )
  nats, tokens = np.array(got.nats), np.array(got.tokens)

  def some(at: np.ndarray) -> likelihood.Perplexity:
    return dataclasses.replace(got, nats=nats[at], tokens=tokens[at])

  ways = {
    'perplexity by token': lambda at: some(at).by_token,
    'perplexity by word': lambda at: some(at).by_word,
    'bits by byte': lambda at: some(at).bits_by_byte,
  }
  measures = {name: bootstrap(f, len(nats)) for name, f in ways.items()}
  return {
    'total': len(nats),
    'measures': measures,
    'notes': [f'{tokens.sum():,} tokens in windows of {length}'],
  }


def _by_answers(
  subject, found, task, shots, batch_size, max_new_tokens, beams, progress
) -> dict[str, Any]:
  said = answers(
    subject.model,
    subject.params,
    subject.tokenizer,
    found,
    subject.form,
    shots=shots,
    batch_size=batch_size,
    max_new_tokens=max_new_tokens,
    beams=beams,
    progress=progress,
  )
  pairs = list(zip(found, said, strict=True))
  notes: list[str] = []
  if 'references' in found[0].values:
    wanted = [row.values['references'] for row in found]
    measures, notes = nlg.compare(said, wanted)
  else:
    right = sum(row.score(answer) == 1 for row, answer in pairs)
    formed = sum(re.fullmatch(task.pattern, a) is not None for a in said)
    measures = {
      'exact match': _share(right, len(found)),
      'of the right form': _share(formed, len(found)),
    }
  cut = max_new_tokens != task.max_new_tokens
  asked = {
    'shots': len(shots),
    'new tokens': max_new_tokens if cut else 0,
    'beams': beams if beams > 1 else 0,
  }
  return {
    'how': ', '.join(f'{n} {what}' for what, n in asked.items() if n),
    'total': len(found),
    'measures': measures | _nats(subject, found, batch_size),
    'samples': [(r.question, answer, r.answer) for r, answer in pairs[:3]],
    'notes': notes,
  }


def _nats(subject, found, batch_size) -> dict[str, Measure]:
  """How likely the completions are that were expected."""
  pairs = []
  for some in chat.encode_rows(subject.tokenizer, found, subject.form):
    at = np.flatnonzero(some[0].learned)
    if len(some) > 1 or len(at) != at[-1] - at[0] + 1 or not at[0]:
      return {}  # Of several turns.
    ids = some[0].tokens.tolist()
    pairs.append((ids[: at[0]], ids[at[0] :]))
  scored = likelihood.log_likelihoods(
    subject.model, subject.params, pairs, batch_size=batch_size
  )
  nats = np.array([-one.nats for one in scored])
  tokens = np.array([one.tokens for one in scored])
  loss = bootstrap(lambda n: nats[n].sum() / tokens[n].sum(), len(nats))
  return {'nats by token': loss}


def overlap(tested: Sequence[Row], trained: Iterable[Row]) -> int:
  """Of how many rows the question was trained on, case and blanks aside."""
  seen = {row.bare for row in trained}
  return sum(row.bare in seen for row in tested)
