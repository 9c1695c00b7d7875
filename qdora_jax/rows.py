"""Rows of data, wherever they lie: files, the hub, reasoning-gym.

A row is a mapping that says what to learn in one of three ways:

  {'messages': [{'role': 'user', 'content': ...}, ...]}   every assistant turn
  {'prompt': ..., 'completion': ...}                      the completion
  {'text': ...}                                           all of it

A source 'TASK:FILE' has records of a benchmark, see tasks.py, and rows are what
it makes of them. Whatever is wrong with a row is reported with its place: file
and line.
"""

import dataclasses
import functools
import gzip
import json
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qdora_jax import paths, tasks
from qdora_jax.interop import reasoning_gym

FORMS = (('messages',), ('prompt', 'completion'), ('text',))
SUFFIXES = ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.parquet', '.txt')


@dataclasses.dataclass(frozen=True)
class Row:
  """One example, unread by any tokenizer.

  Attributes:
    values: the mapping, with the keys of one of FORMS and maybe others.
    place: where it comes from, for messages ('train.jsonl:12').
    judge: scores an answer, 1 for right; None compares with the row's answer.
  """

  values: Mapping[str, Any]
  place: str = 'row'
  judge: Callable[[str], float] | None = None

  @property
  def form(self) -> tuple[str, ...]:
    """Which of FORMS it has.

    Raises:
      ValueError: if it has none, or a field is of another type.
    """
    for form in FORMS:
      if all(key in self.values for key in form):
        self._check(form)
        return form
    raise ValueError(
      f"{self.place}: a row needs 'messages', 'prompt' and 'completion', or "
      f"'text'; this one has {', '.join(map(repr, self.values)) or 'nothing'}. "
      "Say which field is which: config.data.fields={'prompt': 'question', "
      "'completion': 'answer'}"
    )

  def _check(self, form: tuple[str, ...]) -> None:
    if form != ('messages',):
      for key in form:
        if not _is_text(self.values[key]):
          raise ValueError(
            f'{self.place}: {key}={self.values[key]!r}: expected a string (of '
            'valid Unicode)'
          )
      return
    turns = self.values['messages']
    fine = (
      isinstance(turns, list | tuple)
      and turns
      and all(isinstance(turn, Mapping) for turn in turns)
      and all(
        key in turn and _is_text(turn[key])
        for turn in turns
        for key in ('role', 'content')
      )
    )
    if not fine:
      raise ValueError(
        f'{self.place}: messages={str(turns)[:80]!r}: expected a list of '
        "{'role': ..., 'content': ...}, both strings"
      )

  @property
  def answer(self) -> str | None:
    """What should be answered: the completion, or the last assistant turn."""
    if self.form == ('prompt', 'completion'):
      return self.values['completion'].strip()
    if self.form == ('messages',) and self.values['messages'][-1][
      'role'
    ].startswith('assistant'):
      return self.values['messages'][-1]['content'].strip()
    return None

  @property
  def question(self) -> str:
    """What is asked, or the text: it tells rows apart."""
    if self.form == ('messages',):
      turns = self.values['messages']
      asked = turns[:-1] if self.answer is not None else turns
      return '\n'.join(turn['content'] for turn in asked)
    return self.values[self.form[0]].strip()

  @property
  def bare(self) -> str:
    """The question without case and blanks: whoever has seen it knows it."""
    return ' '.join(self.question.lower().split())

  def score(self, answer: str) -> float:
    """1 for a right answer."""
    if self.judge is not None:
      return self.judge(answer)
    return float(answer.strip() == self.answer)


def _is_text(value: Any) -> bool:
  """Whether it is a string of whole characters, not of halves like \\ud800."""
  return isinstance(value, str) and not _HALVES.search(value)


_HALVES = re.compile('[\ud800-\udfff]')


def as_text(rows: Iterable[Row]) -> str:
  """The rows' texts, or their questions, an empty line between them."""
  return '\n\n'.join(
    row.values['text'] if row.form == ('text',) else row.question
    for row in rows
  )


def read(
  source: str,
  fields: Mapping[str, str] | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[Row]:
  """All rows of a file or of a hub data set.

  Args:
    source: a file that ends in one of SUFFIXES, or 'hub:OWNER/NAME', of which
      'hub:OWNER/NAME?name=CONFIG&split=test' sets options; with 'TASK:' before
      it, records of a benchmark. A .json file holds one list or one object a
      line, a .txt file one text.
    fields: {'prompt': 'question'} takes the row's field 'question' as prompt.
    options: for hub data: keywords of `datasets.load_dataset`; the split is
      'train' unless they say otherwise.

  Raises:
    FileNotFoundError: if there is no such file or hub data set.
    ImportError: if Parquet or the hub needs the extra `hf`.
    ValueError: naming file and line, if something is not what it should be; for
      a task that there is not.
  """
  name, source = tasks.split(source)
  if source.startswith('hub:'):
    rows = _hub(source.removeprefix('hub:'), dict(options or {}))
  elif not source.endswith(SUFFIXES):
    raise ValueError(
      f'{source!r}: expected a file that ends in {", ".join(SUFFIXES)}; '
      "'hub:OWNER/NAME', or 'reasoning_gym/TASK'"
    )
  elif not Path(source).is_file():
    raise FileNotFoundError(f'{source}: no such file{paths.beside(source)}')
  elif source.endswith('.parquet'):
    rows = _parquet(source)
  elif source.endswith('.txt'):
    rows = [Row({'text': _text(source)}, source)]
  else:
    rows = _json(source)
  rows = [_renamed(row, fields or {}) for row in rows]
  if name:
    rows = [made for row in rows for made in _of_task(row, name)]
  if not rows:
    raise ValueError(
      f'{source} is empty: there is not one row in it; expected one object a '
      'line, or a list of them'
    )
  return rows


def _of_task(row: Row, name: str) -> list[Row]:
  """What a task makes of a record."""
  task = tasks.find(name)
  try:
    made = list(task.rows(row.values))
  except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f'{row.place} is no record of the task {name} ({type(error).__name__}: '
      f'{error}); it has {", ".join(map(repr, row.values)) or "nothing"}'
    ) from error
  return [
    Row(
      values,
      row.place if len(made) == 1 else f'{row.place}:{n}',
      functools.partial(task.score, values),
    )
    for n, values in enumerate(made, 1)
  ]


def _text(source: str) -> str:
  """What a file holds, gzip or not."""
  opener = gzip.open if source.endswith('.gz') else open
  try:
    with opener(source, 'rt', encoding='utf-8-sig') as file:
      return file.read()
  except (gzip.BadGzipFile, zlib.error, EOFError) as error:
    raise ValueError(
      f'{source}: not a whole gzip file ({error}); copy or download it again'
    ) from error
  except UnicodeDecodeError as error:
    line = error.object.count(b'\n', 0, error.start) + 1
    raise ValueError(
      f'{source}: not UTF-8 text, from line {line} on ({error}); convert it, '
      'as with iconv -t utf-8'
    ) from error


def _json(source: str) -> list[Row]:
  text = _text(source)
  if text.lstrip().startswith('['):
    values = _parse(text, source, 0)
    return [_row(value, f'{source}[{n}]') for n, value in enumerate(values)]
  # Not splitlines: a string may hold other line separators.
  lines = enumerate(text.split('\n'), 1)
  return [
    _row(_parse(line, source, n), f'{source}:{n}')
    for n, line in lines
    if line.strip()
  ]


def _parse(text: str, source: str, line: int) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    line = line or error.lineno
    near = error.doc[max(0, error.pos - 20) : error.pos + 20]
    raise ValueError(
      f'{source}:{line}: not JSON ({error.msg}, column {error.colno}, near '
      f'{near!r}); expected one object a line, or one list'
    ) from None


def _row(value: Any, place: str) -> Row:
  if not isinstance(value, dict):
    raise ValueError(
      f'{place}: {str(value)[:60]!r} is no object; expected '
      '{"prompt": ..., "completion": ...} or the like'
    )
  return Row(value, place)


def _parquet(source: str) -> list[Row]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise _needs_hf(source) from error
  try:
    values = pyarrow.parquet.read_table(source).to_pylist()
  except pyarrow.ArrowException as error:
    raise ValueError(
      f'{source}: not a Parquet file ({error}); copy or download it again'
    ) from error
  return [Row(value, f'{source}[{n}]') for n, value in enumerate(values)]


def _hub(name: str, options: dict[str, Any]) -> list[Row]:
  try:
    import datasets
  except ImportError as error:
    raise _needs_hf(f'hub:{name}') from error
  name, _, query = name.partition('?')
  if not name:
    raise ValueError("'hub:' names nothing; expected 'hub:OWNER/NAME'")
  try:
    asked = dict(urllib.parse.parse_qsl(query, strict_parsing=bool(query)))
  except ValueError as error:
    raise ValueError(
      f"hub:{name}?{query}: expected 'hub:{name}?name=CONFIG&split=SPLIT', of "
      'keywords of datasets.load_dataset'
    ) from error
  options = {'split': 'train', **options, **asked}
  try:
    table = datasets.load_dataset(name, **options)
  except (OSError, datasets.exceptions.DatasetsError) as error:
    raise FileNotFoundError(
      f'hub:{name}: the hub gave no data set of that name '
      f'({type(error).__name__}: {" ".join(str(error).split())[:300]}). Is the '
      'name right, and the hub within reach? A file needs no hub: '
      'config.data.path'
    ) from error
  return [
    Row(value, f'hub:{name}/{options["split"]}[{n}]')
    for n, value in enumerate(table)
  ]


def _needs_hf(source: str) -> ImportError:
  return ImportError(f"{source} needs: pip install 'qdora_jax[hf]'")


def _renamed(row: Row, fields: Mapping[str, str]) -> Row:
  """The row with its fields under the names of FORMS."""
  values = dict(row.values)
  for name, field in fields.items():
    if field not in row.values:
      near = ', '.join(map(repr, paths.near(field, row.values)))
      raise ValueError(
        f'{row.place} has no field {field!r} (config.data.fields.{name}); it '
        f'has {near or "none"}'
      )
    values[name] = row.values[field]
  return dataclasses.replace(row, values=values)


def distinct(rows: Iterable[Row]) -> list[Row]:
  """The rows with the first of each question alone."""
  first: dict[str, Row] = {}
  for row in rows:
    first.setdefault(row.question, row)
  return list(first.values())


def of_task(
  task: str, count: int, seed: int, options: Mapping[str, Any]
) -> list[Row]:
  """So many distinct problems of a reasoning-gym task, with its own verifier.

  Raises:
    ValueError: for an unknown task, one without answers, or one with too few
      distinct questions.
  """
  # Repeated questions are skipped; a task with fewer than half distinct ones is
  # too small for the size asked.
  source = reasoning_gym.load(task, 2 * count, seed, options)
  found: dict[str, Row] = {}
  for i in range(len(source)):
    entry = source[i]
    place = f'reasoning_gym/{task}[{i}]'
    if entry['answer'] is None:
      raise ValueError(
        f'{place} gives no answer to learn (many are right): '
        f'{entry["question"]!r}; choose another config.data.name'
      )
    question, answer = entry['question'].strip(), str(entry['answer']).strip()
    judge = functools.partial(source.score_answer, entry=entry)
    values = {'prompt': question, 'completion': answer}
    found.setdefault(question, Row(values, place, judge))
    if len(found) == count:
      return list(found.values())
  raise ValueError(
    f'reasoning_gym/{task} with {dict(options)} has {len(found)} distinct '
    f'questions among {2 * count}; config.data.eval_size + '
    f'config.data.train_size ask for {count}'
  )
