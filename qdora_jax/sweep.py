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

Its folder holds points/NAME, a run folder each; table.csv, a line for each
point; table.md, means over seeds with 95% intervals (Student's t); plot.png.
The same command again skips what is done and goes on with what is not; a point
that fails is reported and does not stop the others.
"""

import csv
import dataclasses
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from qdora_jax import benchmark, data, folder
from qdora_jax.config import RunConfig
from qdora_jax.finetune import AFTER, fine_tune
from qdora_jax.metrics import read_log
from qdora_jax.run import settled

Point = dict[str, Any]
# A point's word for itself, in no config.
LABEL = 'label'
SEED = 'seed'
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
    over: keys that are tuned: of their values a second table takes those with
      the best `chosen_by`,
    chosen_by: another column, so that nothing is chosen by what is reported.
  """

  question: str
  config: str
  points: Sequence[Point]
  measure: str = 'held-out loss'
  x: str = ''
  over: Sequence[str] = ()
  chosen_by: str = 'held-out loss'


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
  """Every point's config, checked, its data found: before anything runs.

  Args:
    sweep: with its points.
    values: the config's.

  Raises:
    ValueError: naming each point that cannot be; for none, or two of one name.
    FileNotFoundError: for data that is not there.
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
  seen: list[Any] = []
  for name, config in built.items():
    for part, load in ((config.data, data.load_data), (config.eval, _sources)):
      if part in seen:
        continue
      seen.append(part)
      try:
        load(part)
      except (ValueError, OSError) as error:
        raise type(error)(f'point {name}: {error}') from error
  return built


def _sources(section: Any) -> None:
  for source in section.benchmarks:
    benchmark.load(source)


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
) -> int:
  """Runs what is not done, and writes table and plot after each point.

  Args:
    sweep: the sweep.
    points: what `build` made of it.
    out: folder.
    only: the point of this name alone, and no table.
    isolated: a command that runs the sweep: each point is a process of its own.

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
    if (workdir / 'summary.json').exists():
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
        subprocess.run([*isolated, '--only', name], check=True)
        (workdir / ALONE).touch()
    except Exception as error:
      # Whatever it is, the others go on.
      failed.parent.mkdir(parents=True, exist_ok=True)
      failed.write_text(traceback.format_exc())
      print(f'{name} failed: {error}; {failed}', file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    print(f'[{number}/{len(names)}] {name}: {seconds:.0f} s', flush=True)
    if only is None:
      report(sweep, points, out, say=False)
  broken = [n for n in names if not _done(out, n)]
  if only is None:
    report(sweep, points, out)
  if broken:
    print(
      f'{len(broken)} of {len(names)} points failed: {", ".join(broken)}; the '
      'same command tries them again',
      file=sys.stderr,
    )
  return min(1, len(broken))


def _done(out: Path, name: str) -> bool:
  return (out / 'points' / name / 'summary.json').exists()


def results(workdir: Path) -> dict[str, float]:
  """A finished run's figures, by the table's headings."""
  summary = json.loads((workdir / 'summary.json').read_text())
  losses = [r['loss'] for r in read_log(workdir / 'metrics.jsonl') if r['loss']]
  last = losses[-max(1, len(losses) // 10) :]
  found = {'training loss': statistics.fmean(last)}
  if (workdir / 'scores.json').exists():
    scores = folder.load_scores(workdir / 'scores.json')
    if AFTER in scores and scores[AFTER].loss is not None:
      found['held-out loss'] = scores[AFTER].loss
    if AFTER in scores and scores[AFTER].total:
      found['exact match'] = scores[AFTER].mean
  for entry in folder.benchmarks(workdir):
    if entry['model'] == 'last':
      task = entry['source'].partition(':')[0]
      for name, measure in entry['measures'].items():
        found[f'{task} {name}'] = measure['value']
  found['trained parameters'] = summary['trained_parameters']
  found['seconds a step'] = summary['seconds_per_step']
  if (workdir / ALONE).exists():
    found['peak GB'] = summary['peak_memory_bytes'] / 1e9
  return found


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean over seeds, with half of its 95% interval (None of one seed)."""

  value: float
  half: float | None
  count: int

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Mean':
    value, n = statistics.fmean(values), len(values)
    if n < 2:
      return cls(value, None, n)
    t = scipy.stats.t.ppf(0.975, n - 1)
    return cls(value, t * statistics.stdev(values) / math.sqrt(n), n)

  def __str__(self) -> str:
    if self.value == int(self.value) and not self.half:
      return f'{int(self.value):,}'
    text = f'{self.value:.4g}'
    return text if self.half is None else f'{text} ± {self.half:.2g}'


@dataclasses.dataclass(frozen=True)
class Group:
  """Points that differ in their seed alone: what they are, and their means."""

  point: Point
  means: dict[str, Mean]

  @property
  def name(self) -> str:
    return name_of(self.point)


def groups(sweep: Sweep, out: Path) -> list[Group]:
  """What is done so far, means over seeds."""
  found: dict[str, tuple[Point, list[dict[str, float]]]] = {}
  for point in sweep.points:
    if _done(out, name_of(point)):
      rest = {k: v for k, v in point.items() if k != SEED}
      _, rows = found.setdefault(name_of(rest), (rest, []))
      rows.append(results(out / 'points' / name_of(point)))
  return [
    Group(
      point,
      {key: Mean.of([r[key] for r in rows if key in r]) for key in rows[0]},
    )
    for point, rows in found.values()
  ]


def lower_is_better(column: str) -> bool:
  return any(word in column for word in ('loss', 'nats', 'perplexity', 'bits'))


def best(sweep: Sweep, found: Sequence[Group]) -> list[Group]:
  """Of points that differ in `over` alone the one that is best by chosen_by."""
  tuned: dict[str, list[Group]] = {}
  for group in found:
    rest = {k: v for k, v in group.point.items() if k not in sweep.over}
    if sweep.chosen_by in group.means:
      tuned.setdefault(name_of(rest), []).append(group)
  sign = 1 if lower_is_better(sweep.chosen_by) else -1

  def badness(group: Group) -> float:
    value = sign * group.means[sweep.chosen_by].value
    return math.inf if math.isnan(value) else value

  return [min(some, key=badness) for some in tuned.values()]


def report(
  sweep: Sweep, points: Mapping[str, RunConfig], out: Path, say: bool = True
) -> None:
  """Writes table.csv, table.md and plot.png of what is done so far."""
  _write_csv(sweep, out)
  found = groups(sweep, out)
  if not found:
    return
  done = sum(_done(out, name) for name in points)
  text = f'# {sweep.question}\n\n{done} of {len(points)} points are done.\n\n'
  text += markdown(found)
  if sweep.over:
    keys = ', '.join(sweep.over)
    text += f'\n## Each at its best {keys}, by {sweep.chosen_by}\n\n'
    text += markdown(best(sweep, found))
  folder.write_text(out / 'table.md', text)
  plot(sweep, found, out / 'plot.png')
  if say:
    print(text)


def _write_csv(sweep: Sweep, out: Path) -> None:
  rows = []
  for point in sweep.points:
    name = name_of(point)
    row: dict[str, Any] = {'point': name, **point}
    error = out / 'points' / f'{name}.error'
    if _done(out, name):
      row |= results(out / 'points' / name)
    elif error.exists():
      row['error'] = error.read_text().strip().splitlines()[-1]
    rows.append(row)
  keys = list(dict.fromkeys(key for row in rows for key in row))
  out.mkdir(parents=True, exist_ok=True)
  with (out / 'table.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, keys)
    writer.writeheader()
    writer.writerows(rows)


def markdown(found: Sequence[Group]) -> str:
  """A table: swept keys, then figures."""
  if not found:
    return 'Nothing yet.\n'
  keys = list(dict.fromkeys(k for group in found for k in group.point))
  columns = list(dict.fromkeys(k for group in found for k in group.means))
  lines = [[*keys, 'seeds', *columns], ['---'] * (len(keys) + 1 + len(columns))]
  for group in found:
    count = max(mean.count for mean in group.means.values())
    cells = [str(group.point[k]) if k in group.point else '' for k in keys]
    means = [str(group.means[c]) if c in group.means else '' for c in columns]
    lines.append([*cells, str(count), *means])
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def plot(sweep: Sweep, found: Sequence[Group], path: Path) -> None:
  """`measure` over `x`, a line for all that is otherwise alike, or bars."""
  import matplotlib.figure

  found = [group for group in found if sweep.measure in group.means]
  if not found:
    return
  figure = matplotlib.figure.Figure((8, 4.5), layout='constrained', dpi=150)
  axes = figure.subplots()

  def error(group: Group) -> float:
    return group.means[sweep.measure].half or 0.0

  if sweep.x:
    lines: dict[str, list[Group]] = {}
    for group in found:
      rest = {k: v for k, v in group.point.items() if k != sweep.x}
      lines.setdefault(_words(rest), []).append(group)
    for name, some in lines.items():
      some = [group for group in some if sweep.x in group.point]
      xs = [group.point[sweep.x] for group in some]
      ys = [group.means[sweep.measure].value for group in some]
      bars = [error(group) for group in some]
      axes.errorbar(xs, ys, bars, marker='o', capsize=3, label=name)
    xs = [g.point[sweep.x] for g in found if sweep.x in g.point]
    numbers = xs and all(isinstance(x, int | float) and x > 0 for x in xs)
    if numbers and max(xs) >= 8 * min(xs):
      axes.set_xscale('log')
    if numbers:
      ticks = sorted(set(xs))
      axes.set_xticks(ticks, [f'{x:g}' for x in ticks])
      axes.minorticks_off()
    axes.set_xlabel(sweep.x)
    if len(lines) > 1:
      axes.legend(frameon=False)
  else:
    names = [_words(group.point) for group in found]
    ys = [group.means[sweep.measure].value for group in found]
    bars = [error(group) for group in found]
    axes.errorbar(ys, range(len(ys)), xerr=bars, fmt='o', capsize=3)
    axes.set_yticks(range(len(ys)), names)
    axes.invert_yaxis()
  axes.set_title(sweep.question, loc='left', fontsize=10, wrap=True)
  (axes.set_ylabel if sweep.x else axes.set_xlabel)(sweep.measure)
  axes.spines[['top', 'right']].set_visible(False)
  part = path.with_suffix('.part')
  figure.savefig(part, format='png')
  part.replace(path)


def _words(point: Point) -> str:
  """A point in a legend."""
  return ', '.join(
    str(v) if k == LABEL else f'{k.rpartition(".")[2]} {v}'
    for k, v in point.items()
    if k == LABEL or LABEL not in point or '.' not in k
  )
