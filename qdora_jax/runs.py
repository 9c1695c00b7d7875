"""Run folders side by side: what they are, and how far they came."""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdora_jax import folder
from qdora_jax.metrics import read_log
from qdora_jax.report import answer_text, save_figure


@dataclasses.dataclass(frozen=True)
class Seen:
  """A run folder, as it lies on the disk."""

  workdir: Path
  config: Any
  rows: Sequence[dict[str, Any]]
  ended: bool

  @property
  def state(self) -> str:
    if self.ended:
      return 'done'
    return f'step {len(self.rows)} of {self.config.train.steps}'


def find(places: Sequence[Path]) -> list[Seen]:
  """The run folders among some folders and all that lies in them.

  Raises:
    FileNotFoundError: if there is none.
  """
  paths: list[Path] = []
  for place in places:
    inside = sorted(place.rglob('config.json')) if place.is_dir() else []
    # An exported adapter or a checkpoint has a config.json of its own.
    paths += [p.parent for p in inside if (p.parent / 'metrics.jsonl').exists()]
  paths = list(dict.fromkeys(paths))
  if not paths:
    raise FileNotFoundError(
      f'no run folder in {", ".join(map(str, places))}; expected what `qdora '
      'train --workdir` made, or a folder of such'
    )
  return [
    Seen(
      path,
      folder.config_of(path),
      read_log(path / 'metrics.jsonl'),
      (path / 'summary.json').exists(),
    )
    for path in paths
  ]


def table(found: Sequence[Seen], compare: bool = False) -> str:
  """A line for each run; to compare, with the keys that they differ in."""
  rows = [
    {
      'run': str(run.workdir),
      'state': run.state,
      'last change': _when(run.workdir / 'metrics.jsonl'),
      **(_differing(found)[n] if compare else _what(run.config)),
      **_figures(run),
    }
    for n, run in enumerate(found)
  ]
  keys = list(dict.fromkeys(key for row in rows for key in row))
  cells = [[row[k] if k in row else '' for k in keys] for row in rows]
  lines = [keys, *cells]
  widths = [max(len(line[n]) for line in lines) for n in range(len(keys))]
  return '\n'.join(
    '  '.join(
      cell.ljust(w) for cell, w in zip(line, widths, strict=True)
    ).rstrip()
    for line in lines
  )


def history(run: Seen) -> str:
  """Its evaluations during training, and the last answers looked at.

  What config.eval.every asked for; the training loss is the mean since the
  evaluation before.
  """
  lines, losses, samples = [], [], []
  for row in run.rows:
    if row['loss'] is not None:
      losses.append(row['loss'])
    if 'held_out_loss' in row:
      mean = f'{statistics.fmean(losses):.4f}' if losses else ''
      lines.append((str(row['step']), mean, f'{row["held_out_loss"]:.4f}'))
      losses = []
    if 'samples' in row and row['samples']:
      samples = [f'answers at step {row["step"]}:']
      samples += [answer_text(*sample) for sample in row['samples']]
  if not lines:
    return (
      f'{run.workdir}: no evaluations during training '
      f'(config.eval.every={run.config.eval.every})'
    )
  head = ('step', 'training loss', 'held-out loss')
  table = [
    '  '.join(
      cell.rjust(len(word)) for cell, word in zip(line, head, strict=True)
    )
    for line in (head, *lines)
  ]
  return '\n'.join([str(run.workdir), *table, *samples])


def _when(path: Path) -> str:
  return time.strftime('%Y-%m-%d %H:%M', time.localtime(path.stat().st_mtime))


def method(config: Any) -> str:
  """'dora over nf4', 'lora', 'full'."""
  name = 'full' if config.adapter.method == 'none' else config.adapter.method
  base = '' if config.quant.format == 'none' else f' over {config.quant.format}'
  return name + base


def _what(config: Any) -> dict[str, str]:
  """What a run is, in a few words."""
  data = Path(config.data.path).name if config.data.path else config.data.name
  return {'method': method(config), 'data': data, 'lr': f'{config.optim.lr:g}'}


def _differing(found: Sequence[Seen]) -> list[dict[str, str]]:
  """Of each run the keys that are not the same in all."""
  flat = [_flat(dataclasses.asdict(run.config)) for run in found]
  keys = [k for k in flat[0] if len({str(f[k]) for f in flat}) > 1]
  return [{key: str(f[key]) for key in keys} for f in flat]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
  """Dotted keys of the sections; a dict within one is a value."""
  return {
    (f'{section}.{key}' if key else section): value
    for section, inner in values.items()
    for key, value in (
      inner.items() if isinstance(inner, dict) else [('', inner)]
    )
  }


def _figures(run: Seen) -> dict[str, str]:
  """How it went."""
  figures: dict[str, str] = {}
  losses = [row['loss'] for row in run.rows if row['loss'] is not None]
  if losses:
    figures['loss'] = f'{losses[-1]:.4f}'
  held = [r['held_out_loss'] for r in run.rows if 'held_out_loss' in r]
  if held:
    figures['held-out loss'] = f'{held[-1]:.4f}'
  # Of several benchmarks the first figure of each.
  tasks = set()
  for name, measure in folder.figures(run.workdir).items():
    task, _, what = name.partition(' ')
    if name in ('held-out loss', 'exact match'):
      figures[name] = str(measure)
    elif task not in tasks:
      tasks.add(task)
      figures[f'{task}: {what}'] = str(measure)
  path = run.workdir / 'summary.json'
  if path.exists():
    summary = json.loads(path.read_text())
    figures['s/step'] = f'{summary["seconds_per_step"]:.2f}'
    if peak := summary['peak_memory_bytes']:
      figures['GB'] = f'{peak / 1e9:.2f}'
  return figures


def plot(found: Sequence[Seen], path: Path) -> None:
  """The runs' losses by step, smoothed, and held-out losses as dots."""
  import matplotlib.figure
  import numpy as np

  figure = matplotlib.figure.Figure((8, 4.5), layout='constrained', dpi=150)
  axes = figure.subplots()
  differ = _differing(found)
  for run, keys in zip(found, differ, strict=True):
    rows = [row for row in run.rows if row['loss'] is not None]
    if not rows:
      continue
    words = [f'{k.rpartition(".")[2]} {v}' for k, v in keys.items()][:4]
    losses = np.array([row['loss'] for row in rows])
    window = max(1, len(losses) // 15)
    smooth = np.convolve(losses, np.ones(window) / window, 'valid')
    steps = [row['step'] for row in rows][window - 1 :]
    (line,) = axes.plot(
      steps, smooth, label=', '.join(words) or run.workdir.name
    )
    held = [
      (r['step'], r['held_out_loss']) for r in rows if 'held_out_loss' in r
    ]
    if held:
      axes.plot(*zip(*held, strict=True), 'o', color=line.get_color())
  axes.set(xlabel='step', ylabel='loss (nats per learned token)')
  axes.spines[['top', 'right']].set_visible(False)
  if len(found) > 1:
    axes.legend(frameon=False, fontsize=8)
  save_figure(figure, path)
