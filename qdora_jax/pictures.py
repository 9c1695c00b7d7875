"""Pictures of studies and plans: small multiples, alike where they compare."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from qdora_jax import analysis
from qdora_jax.report import save_figure


def decomposition(
  methods: Mapping[str, Sequence[Any]], modules: Sequence[str], path: str | Path
) -> None:
  """dM over dD: a row for each method, a column for each module.

  Args:
    methods: {method: its `study.Trace`s}.
    modules: columns.
    path: PNG.
  """
  shape = len(methods), len(modules)
  figure = matplotlib.figure.Figure(
    (2.1 * shape[1] + 1, 2.1 * shape[0] + 0.6), layout='constrained', dpi=130
  )
  grid = figure.subplots(*shape, squeeze=False, sharey='row')
  layers = max(c.layer for some in methods.values() for c in some[0].last)
  points = None
  for row, (method, some) in zip(grid, methods.items(), strict=True):
    for axes, module in zip(row, modules, strict=True):
      for one in some:
        for step, moved in one.steps.items():
          own = [c for c in moved if c.module == module]
          points = axes.scatter(
            [c.direction for c in own],
            [c.magnitude for c in own],
            s=4 + 14 * step / max(one.steps),
            c=[c.layer for c in own],
            vmin=0,
            vmax=max(1, layers),
            cmap='viridis',
            linewidths=0,
            alpha=0.8,
          )
      rs = [
        analysis.correlation([c for c in one.every if c.module == module])
        for one in some
      ]
      axes.text(
        *(0.04, 0.95, f'r = {statistics.fmean(rs):.2f}'),
        transform=axes.transAxes,
        va='top',
        fontsize=8,
        bbox={'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.7},
      )
      axes.ticklabel_format(scilimits=(-2, 2), useMathText=True)
      axes.tick_params(labelsize=7)
      axes.xaxis.offsetText.set_fontsize(7)
      axes.yaxis.offsetText.set_fontsize(7)
      axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
      axes.spines[['top', 'right']].set_visible(False)
    row[0].set_ylabel(f'{method}\ndM', fontsize=9)
  for axes, module in zip(grid[0], modules, strict=True):
    axes.set_title(module, fontsize=9)
  figure.supxlabel('dD, the mean turn of directions', fontsize=9)
  bar = figure.colorbar(points, ax=grid, shrink=0.6, pad=0.01)
  bar.set_label('layer (larger dots: later checkpoints)', fontsize=8)
  bar.ax.tick_params(labelsize=7)
  save_figure(figure, path)


def maps(
  methods: Mapping[str, Sequence[Any]], modules: Sequence[str], path: str | Path
) -> None:
  """Layers by modules at the last checkpoint: lengths, turns, ranks.

  Args, as of `decomposition`. Means over a method's runs.
  """
  kinds = {
    'lengths, % changed': lambda c: 100 * c.relative,
    'turn (dD)': lambda c: c.direction,
    f'rank ({analysis.SHARE:.0%} of the update)': lambda c: c.rank or 0,
  }
  figure = matplotlib.figure.Figure(
    (3.6 * len(kinds), 3.4 * len(methods)), layout='constrained', dpi=130
  )
  grid = figure.subplots(len(methods), len(kinds), squeeze=False)
  for row, (method, some) in zip(grid, methods.items(), strict=True):
    for axes, (title, value) in zip(row, kinds.items(), strict=True):
      cells: dict[tuple[int, str], list[float]] = {}
      for change in (c for one in some for c in one.last):
        cells.setdefault((change.layer, change.module), []).append(
          value(change)
        )
      layers = sorted({layer for layer, _ in cells})
      image = np.array(
        [
          [
            statistics.fmean(cells[layer, module])
            if (layer, module) in cells
            else np.nan
            for module in modules
          ]
          for layer in layers
        ]
      )
      shown = axes.imshow(image, aspect='auto', origin='lower', vmin=0)
      axes.set_xticks(range(len(modules)), modules, fontsize=8)
      axes.set_ylim(-0.5, len(layers) - 0.5)
      axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
      axes.tick_params(labelsize=8)
      axes.set_title(f'{method}: {title}', fontsize=9)
      figure.colorbar(shown, ax=axes).ax.tick_params(labelsize=7)
    row[0].set_ylabel('layer', fontsize=9)
  save_figure(figure, path)


def formats(scaled: np.ndarray, path: str | Path) -> None:
  """Weights over their block's absmax, and the levels of each format.

  Args:
    scaled: f32 [n], of -1 to 1.
    path: PNG.
  """
  figure = matplotlib.figure.Figure((8, 4), layout='constrained', dpi=130)
  top, bottom = figure.subplots(
    2, sharex=True, height_ratios=[3, 1.2], gridspec_kw={'hspace': 0.05}
  )
  # Each block has one weight at an end, which is no part of the shape.
  inner = scaled[np.abs(scaled) < 1 - 1e-6]
  top.hist(inner, 201, density=True, color='0.75')
  top.set_ylabel('density')
  top.set_title(
    f'{scaled.size / 1e6:.1f} million weights over the largest of their block '
    f'of 64',
    loc='left',
    fontsize=10,
  )
  top.set_yticks([])
  names = list(analysis.LEVELS)
  for n, levels in enumerate(analysis.LEVELS.values()):
    bottom.vlines(levels, n - 0.35, n + 0.35, color=f'C{n}', lw=1.5)
  bottom.set_yticks(range(len(names)), [analysis.NAMES[name] for name in names])
  bottom.invert_yaxis()
  bottom.set_xlabel('w / absmax')
  for axes in (top, bottom):
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.tick_params(axis='y', length=0)
  save_figure(figure, path)


def memory(
  parts: Mapping[str, Mapping[str, int]], title: str, path: str | Path
) -> None:
  """Bytes by part: a bar for each of several plans.

  Args:
    parts: {what is planned: {part: bytes}}, such as `plan.Plan.parts`.
    title: over the picture.
    path: PNG.
  """
  figure = matplotlib.figure.Figure(
    (8, 1.3 + 0.45 * len(parts)), layout='constrained', dpi=130
  )
  axes = figure.subplots()
  names = list(parts)
  kinds = list(dict.fromkeys(k for part in parts.values() for k in part))
  left = np.zeros(len(names))
  for n, kind in enumerate(kinds):
    sizes = np.array([parts[name].get(kind, 0) / 1e9 for name in names])
    axes.barh(names, sizes, left=left, label=kind, color=f'C{n}')
    left += sizes
  for n, total in enumerate(left):
    axes.text(total, n, f' {total:.3g}', va='center', fontsize=8)
  axes.invert_yaxis()
  axes.margins(x=0.08)
  axes.set_xlabel('GB')
  axes.set_title(title, loc='left', fontsize=10)
  axes.spines[['top', 'right']].set_visible(False)
  figure.legend(frameon=False, loc='outside right upper', fontsize=8)
  save_figure(figure, path)
