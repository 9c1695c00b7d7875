"""Sweeps: runs that differ in a few keys, one table and one plot of them.

A sweep file has a function get_sweep() that returns a Sweep: a question, a
config, and points - dicts of dotted keys - made by `grid`, `zipped` and
`product`:

  Sweep(
    question='Which rank is enough?',
    config='../configs/e2e.py',
    points=product(
      grid('adapter.method', ['lora', 'dora']),
      grid('adapter.rank', [2, 4, 8, 16]),
      grid('seed', [0, 1, 2]),
    ),
    measure='held-out loss',
    x='adapter.rank',
  )

Its folder holds points/NAME, a run folder each, and what `findings.py` makes of
them. The same command again skips what is done and goes on with what is not; a
point that fails is reported and does not stop the others.
"""

import dataclasses
import functools
import itertools
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora_jax import (
  benchmark,
  data,
  folder,
  optim,
  paths,
  plan,
  processes,
)
from qdora_jax.config import RunConfig
from qdora_jax.finetune import fine_tune
from qdora_jax.job import trees
from qdora_jax.opening import mesh_of, settled

Point = dict[str, Any]
# A point's word for itself, in no config.
LABEL = 'label'
# Keys whose values are repetitions of one thing, not things to be compared.
SEEDS = ('seed', 'data.seed')
# In the folder of a run that had a process to itself: its peak memory is its
# own, and not that of a point before it.
ALONE = 'alone'


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What is swept, and what is asked.

  Attributes:
    question: what the sweep answers.
    config: file, from where the sweep's file lies.
    points: dicts {dotted key: value}; 'label' is a name for the table.
    measure: column of the table that answers the question, and the plot's y.
    x: key on the plot's x axis; '' for a bar each.
    over: keys that are tuned: of their values a second table, and the plot if
      none is on its x axis, takes those with the best `chosen_by`,
    chosen_by: another column, so that nothing is chosen by what is reported.
    pairs: (label, label) to be compared seed by seed, all else being equal;
      of what is tuned each has its best.
  """

  question: str
  config: str
  points: Sequence[Point]
  measure: str = 'held-out loss'
  x: str = ''
  over: Sequence[str] = ()
  chosen_by: str = 'held-out loss'
  pairs: Sequence[tuple[str, str]] = ()


def grid(key: str, values: Iterable[Any]) -> list[Point]:
  """A point for each value of a key."""
  return [{key: value} for value in values]


def zipped(columns: Mapping[str, Sequence[Any]]) -> list[Point]:
  """Keys that change together: the first of each, the second of each, ...

  Raises:
    ValueError: if they are not equally many.
  """
  lengths = {key: len(values) for key, values in columns.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f'zipped: expected as many values of each key: {lengths}')
  rows = zip(*columns.values(), strict=True)
  return [dict(zip(columns, row, strict=True)) for row in rows]


def product(*parts: Sequence[Point]) -> list[Point]:
  """Every combination; of a key in several parts the last counts."""
  return [
    {key: value for point in points for key, value in point.items()}
    for points in itertools.product(*parts)
  ]


def name_of(point: Point) -> str:
  """A folder's name: 'rank=4,lr=0.001,seed=0'."""
  words = [
    value if key == LABEL else f'{key.rpartition(".")[2]}={value}'
    for key, value in point.items()
  ]
  return re.sub(r'[^\w.=,+-]+', '-', ','.join(words)).strip('-')


def build(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, RunConfig]:
  """Every point's config, its keys and values checked.

  Args:
    sweep: with its points.
    values: the config's.

  Raises:
    ValueError: naming each point that cannot be; for none, or two of one name.
  """
  if not sweep.points:
    raise ValueError('the sweep has no points')
  swept = {key: None for point in sweep.points for key in point}
  for key in filter(None, (sweep.x, *sweep.over)):
    if key not in swept:
      raise ValueError(
        f'x or over of the sweep names {key!r}, which no point has; swept are '
        f'{", ".join(swept)}'
      )
    if key in SEEDS:
      raise ValueError(
        f'x or over of the sweep names {key!r}; points that differ in it are '
        'repetitions of one thing, and averaged'
      )
  labels = {point[LABEL] for point in sweep.points if LABEL in point}
  for label in itertools.chain(*sweep.pairs):
    if label not in labels:
      raise ValueError(
        f'pairs of the sweep name {label!r}, which no point is called; labels '
        f'are {", ".join(labels) or "none"}'
      )
  built: dict[str, RunConfig] = {}
  wrong = []
  for point in sweep.points:
    name = name_of(point)
    if name in built:
      raise ValueError(
        f'two points of the sweep are called {name}: {point}; give them a '
        "'label' each"
      )
    try:
      built[name] = RunConfig.make(_with(values, point))
    except ValueError as error:
      wrong.append(f'point {name}: {error}')
  if wrong:
    more = f' (and {len(wrong) - 3} more)' if len(wrong) > 3 else ''
    raise ValueError('; '.join(wrong[:3]) + more)
  return built


def check(
  points: Mapping[str, RunConfig], out: Path, mesh: bool = True
) -> None:
  """Tries what can be told of points before anything runs.

  Their data and benchmarks are read; their models quantized, adapted and
  updated as shapes. An adapter that they go on from is looked for, unless a
  point before them makes it.

  Args:
    points: what `build` made of a sweep.
    out: the sweep's folder.
    mesh: whether they run on the devices that this process sees.

  Raises:
    ValueError, FileNotFoundError, ImportError: naming the first point that
      cannot be.
  """
  seen: list[Any] = []
  made: list[Path] = []
  for name, config in points.items():
    shapes = config.model.name, config.quant, config.adapter
    tries: list[tuple[Any, Callable[[RunConfig], Any]]] = [
      (config.data, lambda c: data.load_data(c.data)),
      (config.eval, _sources),
      ((*shapes, dataclasses.replace(config.optim, lr=0.0)), _trees),
    ]
    if config.adapter.spec() is not None and config.adapter.path:
      found = functools.partial(_adapter, made=made)
      tries.append((config.adapter.path, found))
    made.append((out / 'points' / name).resolve())
    if mesh:
      tries.append(((config.mesh, config.train), mesh_of))
    for part, attempt in tries:
      if part in seen:
        continue
      seen.append(part)
      try:
        attempt(config)
      except (ValueError, OSError, ImportError) as error:
        raise type(error)(f'point {name}: {error}') from error


def _sources(config: RunConfig) -> None:
  for source in config.eval.benchmarks:
    benchmark.load(source)


def _trees(config: RunConfig) -> None:
  """Quantizes, adapts and updates shapes alone."""
  train = dataclasses.replace(config.train, seq_len=config.train.seq_len or 1)
  job = plan.of_run(dataclasses.replace(config, train=train))
  optim.check(config.optim, trees(job).trained)


def _adapter(config: RunConfig, made: Sequence[Path]) -> None:
  path = Path(config.adapter.path)
  if path.is_dir() or any(map(path.resolve().is_relative_to, made)):
    return
  raise FileNotFoundError(
    f'config.adapter.path={config.adapter.path!r}: no such directory'
    f'{paths.beside(path)}'
  )


def _with(values: Mapping[str, Any], point: Point) -> dict[str, Any]:
  """The values with a point's in their places."""
  changed = dict(values)
  for key, value in point.items():
    if key == LABEL:
      continue
    *sections, last = key.split('.')
    node = changed
    for section in sections:
      node[section] = dict(node[section]) if section in node else {}
      node = node[section]
    node[last] = value
  return changed


def run(
  sweep: Sweep,
  points: Mapping[str, RunConfig],
  out: Path,
  only: str | None = None,
  isolated: Sequence[str] | None = None,
  report: Callable[[], str] = str,
) -> int:
  """Runs what is not done.

  Args:
    sweep: the sweep.
    points: what `build` made of it.
    out: folder.
    only: the point of this name alone.
    isolated: a command that runs the sweep: each point is a process of its own.
    report: is called after each point, unless `only` one is run; what it
      returns last is printed.

  Returns:
    1 if a point has failed, else 0: the command's exit code.

  Raises:
    ValueError: if `only` names none.
  """
  if only is not None and only not in points:
    raise ValueError(f'--only={only}: the points are {", ".join(points)}')
  print(sweep.question)
  names = [only] if only else list(points)
  for number, name in enumerate(names, 1):
    workdir = out / 'points' / name
    if done(out, name):
      folder.check(settled(points[name], workdir), workdir)
      print(f'[{number}/{len(names)}] {name}: done before', flush=True)
      continue
    print(f'[{number}/{len(names)}] {name}', flush=True)
    began = time.perf_counter()
    failed = workdir.with_name(f'{name}.error')
    failed.unlink(missing_ok=True)
    try:
      if isolated is None:
        fine_tune(points[name], workdir)
      else:
        code = processes.call([*isolated, '--only', name])
        if code:
          raise RuntimeError(f'its process ended with code {code}')
        (workdir / ALONE).touch()
    except Exception as error:
      # Whatever it is, the others go on.
      failed.parent.mkdir(parents=True, exist_ok=True)
      failed.write_text(traceback.format_exc())
      print(f'{name} failed: {error}; {failed}', file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    print(f'[{number}/{len(names)}] {name}: {seconds:.0f} s', flush=True)
    if only is None:
      report()
  if only is None:
    print(report())
  broken = [n for n in names if not done(out, n)]
  if broken:
    print(
      f'{len(broken)} of {len(names)} points failed: {", ".join(broken)}; the '
      'same command tries them again',
      file=sys.stderr,
    )
  return min(1, len(broken))


def done(out: Path, name: str) -> bool:
  """Whether a point's run has ended."""
  return (out / 'points' / name / 'summary.json').exists()
