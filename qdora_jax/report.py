"""What a run shows at its ends: the tree before training, the curves after."""

from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np

from qdora_jax import paths
from qdora_jax.evaluate import Score
from qdora_jax.linear import kind
from qdora_jax.specs import QuantSpec
from qdora_jax.transforms import Adapter, unquantized


def nbytes(tree: Any) -> int:
  """Bytes of all arrays of a tree."""
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def describe(base: Any, trained: Any, quant: QuantSpec | None = None) -> str:
  """A table of what is quantized, adapted and left, with bytes.

  Args:
    base: the frozen tree; empty in full fine-tuning.
    trained: the adapter tree, or all parameters.
    quant: what was to be quantized: kernels that could not be are explained.
  """
  nodes = paths.flatten(trained)
  rows = [('parameter', 'shape', 'stored as', 'bytes', 'trained')]
  for path, leaf in {**nodes, **paths.flatten(base)}.items():
    shape = ' x '.join(map(str, leaf.shape))
    row = (path, shape, kind(leaf), f'{nbytes(leaf):,}')
    rows.append((*row, _trained(nodes[path]) if path in nodes else ''))
  widths = [max(len(row[n]) for row in rows) for n in range(5)]
  lines = [
    '  '.join(
      cell.rjust(w) if n == 3 else cell.ljust(w)
      for n, (cell, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  if quant is not None:
    for path, reason in unquantized(base, quant).items():
      lines.append(f'left in full precision: {path}: {reason}')
  count = sum(a.size for a in jax.tree.leaves(trained))
  whole = sum(leaf.size for leaf in paths.flatten(base or trained).values())
  lines.append(
    f'base {nbytes(base) / 1e6:.1f} MB, trained {count:,} parameters '
    f'({count / whole:.2%} of {whole:,}), {nbytes(trained) / 1e6:.1f} MB'
  )
  return '\n'.join(lines)


def _trained(node: Any) -> str:
  """How a leaf is trained, in words."""
  if not isinstance(node, Adapter):
    return 'all of it'
  ranks = sorted({rank for rank in node.ranks if rank})
  layers = sum(map(bool, node.ranks))
  text = f'{node.spec.method} r={"/".join(map(str, ranks))}'
  return text if layers == len(node.ranks) else f'{text} ({layers} layers)'


def plot(
  path: Path, rows: list[dict[str, Any]], scores: dict[str, Score], title: str
) -> None:
  """A PNG: loss by step, and exact match with its intervals.

  Args:
    path: of the PNG.
    rows: of metrics.jsonl.
    scores: {name: score}, drawn in this order.
    title: above the picture.
  """
  steps = [row for row in rows if 'loss' in row]
  x = np.array([row['step'] for row in steps])
  loss = np.array([row['loss'] for row in steps])
  figure = matplotlib.figure.Figure((9, 3.6), dpi=120, layout='constrained')
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  left.plot(x, loss, color='#9ecae1', linewidth=1, label='each step')
  window = max(1, len(loss) // 15)
  if len(loss) >= 3 * window:
    smooth = np.convolve(loss, np.ones(window) / window, 'valid')
    left.plot(
      x[window - 1 :], smooth, color='#08519c', label=f'mean of {window}'
    )
  left.set(xlabel='step', ylabel='loss (nats per completion token)')
  left.set_ylim(bottom=0)
  left.legend(frameon=False)
  means = [score.mean for score in scores.values()]
  spans = np.array([score.interval for score in scores.values()]).T
  errors = np.abs(spans - np.array(means)[None])
  colours = ['#bdbdbd'] * (len(means) - 1) + ['#08519c']
  bars = right.bar(list(scores), means, yerr=errors, capsize=4, color=colours)
  right.bar_label(bars, [f'{m:.0%}' for m in means], padding=3)
  right.set(ylabel='exact match, held out', ylim=(0, 1.08))
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
  figure.suptitle(title)
  figure.savefig(path)
