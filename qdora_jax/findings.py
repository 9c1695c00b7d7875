"""What a sweep found: means over seeds, differences seed by seed, a plot.

Written into the sweep's folder after each point: table.csv, a line for each
point; table.md, means over seeds with 95% intervals (Student's t) and, of the
sweep's pairs, differences seed by seed, of which what a seed does to both is no
part; plot.png.
"""

import csv
import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora_jax import folder, paths
from qdora_jax.intervals import Mean
from qdora_jax.metrics import read_log
from qdora_jax.report import markdown_table, save_figure
from qdora_jax.sweep import ALONE, LABEL, SEEDS, Point, Sweep, done, name_of


def results(workdir: Path) -> dict[str, float]:
  """A finished run's figures, by the table's headings."""
  summary = json.loads((workdir / 'summary.json').read_text())
  losses = [
    r['loss']
    for r in read_log(workdir / 'metrics.jsonl')
    if r['loss'] is not None
  ]
  last = losses[-max(1, len(losses) // 10) :] or [math.nan]
  found = {'training loss': statistics.fmean(last)}
  found |= {k: m.value for k, m in folder.figures(workdir).items()}
  frozen = sum(n for k, n in summary['bytes'].items() if k != 'trained')
  found['frozen MB'] = frozen / 1e6
  found['trained parameters'] = summary['trained_parameters']
  found['seconds a step'] = summary['seconds_per_step']
  if (workdir / ALONE).exists():
    found['peak GB'] = summary['peak_memory_bytes'] / 1e9
  return found


@dataclasses.dataclass(frozen=True)
class Group:
  """Points that differ in their seeds alone: what they are, figures by seed."""

  point: Point
  rows: Mapping[Any, Mapping[str, float]]

  @functools.cached_property
  def means(self) -> dict[str, Mean]:
    columns = dict.fromkeys(key for row in self.rows.values() for key in row)
    return {
      key: Mean.of([row[key] for row in self.rows.values() if key in row])
      for key in columns
    }


def groups(sweep: Sweep, out: Path) -> list[Group]:
  """What is done so far, from the sweep's folder."""
  return _grouped(
    (point, results(out / 'points' / name_of(point)))
    for point in sweep.points
    if done(out, name_of(point))
  )


def read_table(sweep: Sweep, path: str | Path) -> list[Group]:
  """The same from a table.csv, whose runs may be gone.

  Raises:
    ValueError: if the table has none of the sweep's points.
  """
  with Path(path).open(newline='') as file:
    lines = {line['point']: line for line in csv.DictReader(file)}
  found = []
  for point in sweep.points:
    line = lines.get(name_of(point), {})
    figures = {
      key: float(text)
      for key, text in line.items()
      if text and key not in (*point, 'point', 'error')
    }
    if figures:
      found.append((point, figures))
  if not found:
    raise ValueError(
      f'{path} has no finished point of this sweep; it has '
      f'{", ".join(list(lines)[:3])} ...'
    )
  return _grouped(found)


def _grouped(found: Iterable[tuple[Point, dict[str, float]]]) -> list[Group]:
  together: dict[str, Group] = {}
  for point, figures in found:
    rest = {k: v for k, v in point.items() if k not in SEEDS}
    group = together.setdefault(name_of(rest), Group(rest, {}))
    group.rows[tuple(point[k] for k in SEEDS if k in point)] = figures
  return list(together.values())


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


def paired(sweep: Sweep, found: Sequence[Group]) -> list[Group]:
  """Differences of the sweep's pairs, by the seeds that both have.

  Args:
    sweep: its `pairs` of labels.
    found: groups, of what is tuned the best alone.

  Returns:
    A group for each pair and each setting of the keys in which a label's own
    points differ.
  """
  values: dict[str, dict[str, set[str]]] = {}
  for point in sweep.points:
    for key, value in point.items():
      own = values.setdefault(point.get(LABEL, ''), {})
      own.setdefault(key, set()).add(str(value))
  varied = {key for own in values.values() for key in own if len(own[key]) > 1}
  varied -= {*SEEDS, *sweep.over}
  by_label: dict[str, list[Group]] = {}
  for group in found:
    by_label.setdefault(group.point.get(LABEL, ''), []).append(group)
  differences = []
  for first, second in sweep.pairs:
    both = itertools.product(by_label.get(first, []), by_label.get(second, []))
    for a, b in both:
      shared = [k for k in a.point if k in b.point and k in varied]
      if any(a.point[k] != b.point[k] for k in shared):
        continue
      point = {LABEL: f'{first} - {second}'}
      point |= {k: v for k, v in {**b.point, **a.point}.items() if k in varied}
      rows = {
        seed: {k: row[k] - b.rows[seed][k] for k in row if k in b.rows[seed]}
        for seed, row in a.rows.items()
        if seed in b.rows
      }
      if rows:
        differences.append(Group(point, rows))
  return differences


def report(sweep: Sweep, out: Path) -> str:
  """Writes table.csv, table.md and plot.png of what is done; gives the text."""
  _write_csv(sweep, out)
  found = groups(sweep, out)
  if not found:
    return ''
  count = sum(done(out, name_of(point)) for point in sweep.points)
  text = (
    f'# {sweep.question}\n\n{count} of {len(sweep.points)} points are done.'
  )
  have = dict.fromkeys(column for group in found for column in group.means)
  asked = (sweep.measure, *([sweep.chosen_by] if sweep.over else ()))
  for column in dict.fromkeys(asked):
    if column not in have:
      near = ', '.join(paths.near(column, list(have)))
      text += (
        f'\n\nNo point has the column {column!r}, which the sweep names; near: '
        f'{near}. Put it right: `qdora sweep --table` runs nothing again.'
      )
  text += f'\n\n{markdown(found)}'
  chosen = found
  if sweep.over:
    chosen = best(sweep, found)
    keys = ', '.join(sweep.over)
    text += f'\n## Each at its best {keys}, by {sweep.chosen_by}\n\n'
    text += markdown(chosen)
  differences = paired(sweep, chosen)
  if differences:
    text += f'\n## Differences, seed by seed\n\n{markdown(differences)}'
  folder.write_text(out / 'table.md', text)
  plot(sweep, found, out / 'plot.png')
  return text


def _write_csv(sweep: Sweep, out: Path) -> None:
  rows = []
  for point in sweep.points:
    name = name_of(point)
    row: dict[str, Any] = {'point': name, **point}
    error = out / 'points' / f'{name}.error'
    if done(out, name):
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


def markdown(found: Sequence[Group], wanted: Sequence[str] = ()) -> str:
  """A table: swept keys, then figures.

  Args:
    found: its lines.
    wanted: figures, in this order; all if empty.
  """
  if not found:
    return 'Nothing yet.\n'
  keys = list(dict.fromkeys(k for group in found for k in group.point))
  every = list(dict.fromkeys(k for group in found for k in group.means))
  columns = list(wanted) or every
  lines = [[*keys, 'seeds', *columns]]
  for group in found:
    count = max(mean.count for mean in group.means.values())
    cells = [str(group.point[k]) if k in group.point else '' for k in keys]
    means = [str(group.means[c]) if c in group.means else '' for c in columns]
    lines.append([*cells, str(count), *means])
  return markdown_table(lines)


def plot(sweep: Sweep, found: Sequence[Group], path: str | Path) -> None:
  """`measure` over `x`, a line for all that is otherwise alike, or bars.

  What is tuned (`over`) and is not on the x axis stands at its best.
  What lies far outside of the others (Tukey's outer fences) is its value at the
  edge, so that the others can be told apart.
  """
  import matplotlib.figure

  if sweep.over and sweep.x not in sweep.over:
    found = best(sweep, found)
  found = [group for group in found if sweep.measure in group.means]
  if not found:
    return
  figure = matplotlib.figure.Figure((8, 4.5), layout='constrained', dpi=150)
  axes = figure.subplots()
  if sweep.x:
    _lines(axes, sweep, [g for g in found if sweep.x in g.point])
  else:
    means = [group.means[sweep.measure] for group in found]
    bars = [mean.half or 0.0 for mean in means]
    ys = range(len(means))
    xs = [mean.value for mean in means]
    axes.errorbar(xs, ys, xerr=bars, fmt='o', capsize=3)
    axes.set_yticks(ys, [_words(group.point) for group in found])
    axes.invert_yaxis()
  axes.set_title(sweep.question, loc='left', fontsize=10, wrap=True)
  (axes.set_ylabel if sweep.x else axes.set_xlabel)(sweep.measure)
  axes.spines[['top', 'right']].set_visible(False)
  save_figure(figure, path)


def _lines(axes: Any, sweep: Sweep, found: Sequence[Group]) -> None:
  """Means over `x` with their intervals, lines a little beside each other."""
  lines: dict[str, list[Group]] = {}
  tuned = () if sweep.x in sweep.over else sweep.over
  for group in found:
    rest = {k: v for k, v in group.point.items() if k not in (sweep.x, *tuned)}
    lines.setdefault(_words(rest), []).append(group)
  places = list(dict.fromkeys(group.point[sweep.x] for group in found))
  numbers = all(isinstance(x, int | float) and x > 0 for x in places)
  if numbers:
    places = sorted(places)
  # On even steps: values of a grid are chosen so, whatever they are.
  low, high = _fences([group.means[sweep.measure].value for group in found])
  inside: list[float] = []
  for n, (name, some) in enumerate(lines.items()):
    beside = 0.04 * (n - (len(lines) - 1) / 2)
    some = sorted(some, key=lambda g: places.index(g.point[sweep.x]))
    xs = [places.index(group.point[sweep.x]) + beside for group in some]
    means = [group.means[sweep.measure] for group in some]
    ys = [mean.value for mean in means]
    # No interval of what is not in sight.
    bars = [
      mean.half or 0.0 if low <= mean.value <= high else 0.0 for mean in means
    ]
    drawn = axes.errorbar(xs, ys, bars, marker='o', capsize=3, label=name)
    for x, y, bar in zip(xs, ys, bars, strict=True):
      if low <= y <= high:
        inside += [max(y - bar, low), min(y + bar, high)]
      elif not math.isnan(y):
        above = y > high
        axes.annotate(
          f'{y:.3g}',
          (x, 1.0 if above else 0.0),
          xytext=(0, (-1 if above else 1) * (4 + 13 * n)),
          xycoords=('data', 'axes fraction'),
          textcoords='offset points',
          ha='center',
          va='top' if above else 'bottom',
          color=drawn[0].get_color(),
          fontsize=8,
          bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1},
        )
  if inside and len(inside) < 2 * len(found):
    margin = 0.08 * (max(inside) - min(inside)) or 1.0
    axes.set_ylim(min(inside) - margin, max(inside) + margin)
  labels = [f'{x:g}' if numbers else str(x) for x in places]
  axes.set_xticks(range(len(places)), labels)
  axes.set_xlabel(sweep.x)
  if len(lines) > 1:
    axes.legend(frameon=False)


def _fences(values: Sequence[float]) -> tuple[float, float]:
  """Tukey's outer ones: three times the quartiles' distance beyond them."""
  finite = [value for value in values if math.isfinite(value)]
  if len(finite) < 4:
    return -math.inf, math.inf
  first, _, third = statistics.quantiles(finite, n=4, method='inclusive')
  return first - 3 * (third - first), third + 3 * (third - first)


def _words(point: Point) -> str:
  """A point in a legend."""
  return ', '.join(
    str(v) if k == LABEL else f'{k.rpartition(".")[2]} {v}'
    for k, v in point.items()
    if k == LABEL or LABEL not in point or '.' not in k
  )
