"""What a run shows at its ends: the tree before training, the curves after."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import paths
from qdora_jax.adapter import Adapter
from qdora_jax.evaluate import Score
from qdora_jax.linear import kind
from qdora_jax.specs import QuantSpec
from qdora_jax.transforms import unquantized


def nbytes(tree: Any) -> int:
  """Bytes of all arrays of a tree."""
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def count(tree: Any) -> int:
  """Numbers in all arrays of a tree."""
  return sum(a.size for a in jax.tree.leaves(tree))


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
  """Markdown of a heading and rows."""
  head, *rest = lines
  rows = (head, ['---'] * len(head), *rest)
  # A bar within a cell, as of a regex, would end it.
  cells = ([cell.replace('|', r'\|') for cell in row] for row in rows)
  return ''.join(f'| {" | ".join(row)} |\n' for row in cells)


def answer_text(question: str, given: str, expected: str) -> str:
  """An answer looked at, in three lines."""
  return (
    f'  {short(question)}\n    answered: {short(given)}\n'
    f'    expected: {short(expected)}'
  )


def save_figure(figure: Any, path: str | Path) -> None:
  """Writes a matplotlib figure as a PNG, whole or not at all."""
  part = Path(path).with_suffix('.part')
  figure.savefig(part, format='png')
  part.replace(path)


def by_kind(base: Any, trained: Any) -> dict[str, int]:
  """Bytes of the frozen tree by how it is stored, and of what is trained."""
  kinds: dict[str, int] = {}
  for leaf in paths.flatten(base).values():
    kinds[kind(leaf)] = kinds.get(kind(leaf), 0) + nbytes(leaf)
  return {**kinds, 'trained': nbytes(trained)}


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
  whole = sum(leaf.size for leaf in paths.flatten(base or trained).values())
  kinds = by_kind(base, trained)
  lines.append(
    'bytes: ' + ', '.join(f'{k} {n / 1e6:.1f} MB' for k, n in kinds.items())
  )
  lines.append(
    f'trained: {count(trained):,} parameters, {count(trained) / whole:.2%} of '
    f'the {whole:,} of the model'
  )
  return '\n'.join(lines)


def estimate(base: Any, trained: Any, tokens: int, remat: str) -> float:
  """Seconds a training step takes at least, from one product timed here.

  Counted are the products with kernels: forward, for the gradient of their
  inputs, again for what is not kept, and for kernels' own gradients where
  they are trained.

  Args:
    base: the frozen tree; empty in full fine-tuning.
    trained: what is trained.
    tokens: places in a batch, padding included.
    remat: the decoder's.
  """
  leaves = paths.flatten(base or trained)
  kernels = [leaf for path, leaf in leaves.items() if path.endswith('kernel')]
  passes = 2 + (remat != 'none') + (not base)
  work = 2 * tokens * passes * sum(leaf.size for leaf in kernels)
  _, *_, i, o = max((leaf.shape for leaf in kernels), key=math.prod)
  x, w = jnp.ones((min(tokens, 1024), i)), jnp.ones((i, o))
  times = []
  for _ in range(4):
    began = time.perf_counter()
    jax.block_until_ready(_product(x, w))
    times.append(time.perf_counter() - began)
  # The first was compiled.
  return work * min(times[1:]) / (2 * x.size * o)


_product = jax.jit(jnp.matmul)


def duration(seconds: float) -> str:
  """'42 s', '3 min 20 s', '5 h 10 min'."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60} min {seconds % 60} s'
  return f'{seconds // 3600} h {seconds % 3600 // 60} min'


def short(text: str, width: int = 100) -> str:
  """A text in one line, its middle left out if it is long."""
  line = ' '.join(text.split())
  if len(line) <= width:
    return line
  half = (width - 5) // 2
  return f'{line[:half]} ... {line[-half:]}'


def _trained(node: Any) -> str:
  """How a leaf is trained, in words."""
  if not isinstance(node, Adapter):
    return 'all of it'
  ranks = sorted({rank for rank in node.ranks if rank})
  layers = sum(map(bool, node.ranks))
  if node.spec.method == 'magnitude':
    return 'magnitude'
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
  import matplotlib.figure

  done = [row for row in rows if row['loss'] is not None]
  x = np.array([row['step'] for row in done])
  loss = np.array([row['loss'] for row in done])
  figure = matplotlib.figure.Figure((9, 3.6), dpi=120, layout='constrained')
  asked = {name: score for name, score in scores.items() if score.total}
  if asked:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_scores(right, asked)
  else:
    left = figure.subplots()
  left.plot(x, loss, color='#9ecae1', linewidth=1, label='each step')
  window = max(1, len(loss) // 15)
  if len(loss) >= 3 * window:
    smooth = np.convolve(loss, np.ones(window) / window, 'valid')
    left.plot(
      x[window - 1 :], smooth, color='#08519c', label=f'mean of {window}'
    )
  held = {r['step']: r['held_out_loss'] for r in rows if 'held_out_loss' in r}
  names = [n for n, score in scores.items() if score.loss is not None]
  # The last was taken after training, the first of several before it.
  if len(names) > 1:
    held = {0: scores[names[0]].loss, **held}
  if names:
    held[rows[-1]['step']] = scores[names[-1]].loss
  if held:
    left.plot(
      list(held), list(held.values()), 'o-', color='#d94801', label='held out'
    )
  left.set(xlabel='step', ylabel='loss (nats per learned token)')
  left.set_ylim(bottom=0)
  left.legend(frameon=False)
  for axes in figure.axes:
    axes.spines[['top', 'right']].set_visible(False)
  figure.suptitle(title)
  save_figure(figure, path)


def _plot_scores(axes: Any, scores: dict[str, Score]) -> None:
  """Exact match with its intervals, a bar each."""
  means = [score.mean for score in scores.values()]
  spans = np.array([score.interval for score in scores.values()]).T
  errors = np.abs(spans - np.array(means)[None])
  colours = ['#bdbdbd'] * (len(means) - 1) + ['#08519c']
  bars = axes.bar(list(scores), means, yerr=errors, capsize=4, color=colours)
  axes.bar_label(bars, [f'{m:.0%}' for m in means], padding=3)
  axes.set(ylabel='exact match, held out', ylim=(0, 1.08))
