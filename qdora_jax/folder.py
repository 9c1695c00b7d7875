"""The run folder: what another program may want to read of a run.

  config.json     every key, as run
  metrics.jsonl   a line for each step: see `train.fit`
  scores.json     how held-out rows were answered before and after
  benchmarks.json how it did on others' tests: a list, see benchmark.Result
  summary.json    the run in numbers, once it has ended
  curves.png      loss by step, and the scores
  checkpoints/    orbax: what is trained, the optimizer, where the data stood
  adapter/        PEFT files, where PEFT has a form for what was trained
  .lock           held by the command that trains here, .benchmarks.lock by who
                  adds to benchmarks.json

A folder belongs to one config, whatever devices it goes on with and whoever
follows it: config.mesh and config.log may change. Files appear whole or not at
all.
"""

import contextlib
import dataclasses
import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from qdora_jax import processes
from qdora_jax.config import RunConfig
from qdora_jax.evaluate import Score
from qdora_jax.interop.hf import read_json
from qdora_jax.intervals import Measure

# What the trained model's score is called in scores.json.
AFTER = 'fine-tuned'


def check(config: RunConfig, workdir: Path) -> None:
  """Refuses a folder that is another run's, or none."""
  if workdir.exists() and not workdir.is_dir():
    raise NotADirectoryError(
      f'--workdir={workdir} is a file; expected a folder, such as '
      f'{_free(workdir)}'
    )
  if not (workdir / 'config.json').exists():
    return
  began = config_of(workdir)
  config = dataclasses.replace(config, mesh=began.mesh, log=began.log)
  theirs = dataclasses.asdict(began)
  mine = json.loads(json.dumps(dataclasses.asdict(config)))
  changed = _difference(theirs, mine, 'config')
  if changed:
    raise ValueError(
      f'{workdir} holds a run of another config: {"; ".join(changed)}. '
      f'Choose another --workdir, such as {_free(workdir)}'
    )


def config_of(workdir: Path) -> RunConfig:
  """The config of a run folder.

  Raises:
    ValueError: naming the file, if it is something else.
  """
  path = workdir / 'config.json'
  values = read_json(path)
  try:
    return RunConfig.make(values)
  except ValueError as error:
    raise ValueError(
      f'{path} is not the config of a run ({error}); expected a folder that '
      '`qdora train --workdir` made, or a new one'
    ) from error


@contextlib.contextmanager
def claimed(config: RunConfig, workdir: Path) -> Iterator[None]:
  """Holds a folder for this config: nobody else trains into it meanwhile.

  Raises:
    ValueError: if it holds a run of another config.
    RuntimeError: if another command is writing into it, and does not end within
      `processes.GRACE` seconds, as one does that has lost its parent.
  """
  if not processes.first():
    check(config, workdir)
    yield
    return
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(_lock(workdir / '.lock', processes.GRACE))
    except filelock.Timeout:
      raise RuntimeError(
        f'another command is writing into {workdir}; wait for it or stop it, '
        f'or choose another --workdir, such as {_free(workdir)}'
      ) from None
    check(config, workdir)
    path = workdir / 'config.json'
    if not path.exists():
      write(path, dataclasses.asdict(config))
    yield


@contextlib.contextmanager
def _lock(path: Path, seconds: float = -1) -> Iterator[None]:
  """Holds a lock; none where the file system knows none.

  Raises:
    filelock.Timeout: if another has it for longer than so many seconds.
  """
  lock = filelock.FileLock(path, timeout=seconds)
  try:
    lock.acquire()
  except NotImplementedError:
    pass
  except OSError as error:
    unknown = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
    if isinstance(error, filelock.Timeout) or error.errno not in unknown:
      raise
  try:
    yield
  finally:
    lock.release()


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
  """Says of which folder it is what the system says of no file."""
  try:
    yield
  except OSError as error:
    # Without a number it is one of our own messages.
    if error.errno is None:
      raise
    raise OSError(
      f'--workdir={workdir} cannot be written ({error.strerror}); expected a '
      'folder that can be written, with room for checkpoints: the same command '
      'then continues'
    ) from error


def _free(workdir: Path) -> Path:
  """A name beside it that is not taken."""
  number = 2
  while workdir.with_name(f'{workdir.name}-{number}').exists():
    number += 1
  return workdir.with_name(f'{workdir.name}-{number}')


def _difference(old: Any, new: Any, where: str) -> list[str]:
  """'config.a.b was 1, is 2' for every key that differs."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return [] if old == new else [f'{where} was {old!r}, is {new!r}']
  return [
    line
    for key in {**old, **new}
    for line in _difference(
      old[key] if key in old else None,
      new[key] if key in new else None,
      f'{where}.{key}',
    )
  ]


def load_scores(path: Path) -> dict[str, Score]:
  """scores.json: what `fine_tune` found before and after."""
  return {k: Score(**v) for k, v in json.loads(path.read_text()).items()}


def save_scores(workdir: Path, scores: Mapping[str, Score]) -> None:
  text = {name: dataclasses.asdict(score) for name, score in scores.items()}
  write(workdir / 'scores.json', text)


def benchmarks(workdir: Path) -> list[dict[str, Any]]:
  """What `add_benchmark` has written so far."""
  path = workdir / 'benchmarks.json'
  return json.loads(path.read_text()) if path.exists() else []


def add_benchmark(workdir: Path, values: Mapping[str, Any]) -> None:
  """Adds a benchmark's result, in the place of an older one of the same."""

  def what(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = ('source', 'by', 'model', 'total')
    return (*(entry[key] for key in keys), _how(entry))

  if not processes.first():
    return
  # Beside a training, or another evaluation.
  with _lock(workdir / '.benchmarks.lock'):
    others = [e for e in benchmarks(workdir) if what(e) != what(values)]
    write(workdir / 'benchmarks.json', [*others, dict(values)])


def figures(workdir: Path) -> dict[str, Measure]:
  """How the trained model did: on what was held out, and on benchmarks."""
  found = {}
  path = workdir / 'scores.json'
  scores = load_scores(path) if path.exists() else {}
  after = scores[AFTER] if AFTER in scores else None
  if after and after.loss is not None:
    low, high = after.loss_interval or (None, None)
    found['held-out loss'] = Measure(after.loss, low, high)
  if after and after.total:
    found['exact match'] = Measure(after.mean, *after.interval)
  for entry in benchmarks(workdir):
    if entry['model'] == 'last':
      task = Path(entry['source'].partition(':')[0]).name
      how = f' ({_how(entry)})' if _how(entry) else ''
      for name, measure in entry['measures'].items():
        found[f'{task} {name}{how}'] = Measure(**measure)
  return found


def _how(entry: Mapping[str, Any]) -> str:
  """Of a benchmark, which earlier versions did not write."""
  return entry['how'] if 'how' in entry else ''


def write(path: Path, values: Any) -> None:
  """JSON, whole or not at all; of many processes the first writes it."""
  write_text(path, json.dumps(values, indent=2) + '\n')


def write_text(path: Path, text: str) -> None:
  """The same of any text."""
  if not processes.first():
    return
  part = path.with_suffix('.part')
  part.write_text(text)
  part.replace(path)
