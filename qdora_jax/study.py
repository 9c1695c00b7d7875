"""Studies of real runs and real weights, written as tables and pictures.

`of_runs` follows the kernels of run folders through their checkpoints: how far
magnitudes and directions moved and whether the two go together, and of what
rank the update is. `of_weights` stores a model's kernels in each 4-bit format:
the error, and what it does to perplexity.
"""

import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qdora_jax import (
  analysis,
  folder,
  likelihood,
  paths,
  pictures,
  rows,
  runs,
)
from qdora_jax.analysis import Change, Format
from qdora_jax.intervals import Mean, bootstrap
from qdora_jax.linear import materialize
from qdora_jax.pretrained import load_pretrained
from qdora_jax.report import markdown_table
from qdora_jax.run import untrained
from qdora_jax.transforms import attach, unquantized

FORMATS = (
  Format('int4'),
  Format('fp4'),
  Format('nf4'),
  Format('nf4', double_quant=True),
)
FLOW = ('q', 'k', 'v', 'qkv', 'o', 'gate', 'up', 'gate_up', 'down')


@dataclasses.dataclass(frozen=True)
class Trace:
  """A run's kernels through its checkpoints.

  Attributes:
    run: its folder.
    method: 'full', 'lora', 'dora over nf4' ...
    steps: {step: how each kernel has moved since the start}.
  """

  run: Path
  method: str
  steps: Mapping[int, Sequence[Change]]

  @property
  def last(self) -> Sequence[Change]:
    return self.steps[max(self.steps)]

  @property
  def every(self) -> list[Change]:
    return [change for moved in self.steps.values() for change in moved]


def trace(workdir: Path, say: Callable[[str], None] = print) -> Trace:
  """Reads every checkpoint of a run, and what it began with.

  Raises:
    FileNotFoundError: if there is no checkpoint.
  """
  saved = workdir / 'checkpoints'
  found = sorted(int(p.name) for p in saved.glob('*') if p.name.isdigit())
  if not found:
    raise FileNotFoundError(
      f'no checkpoint in {saved}; an analysis is of those that a run has kept '
      '(config.train.save_every, config.train.keep_last)'
    )
  run = untrained(workdir)
  # Not the base: an adapter may have come out of it, or out of PEFT's files.
  start = attach(run.base, run.trained) if run.base else run.trained
  steps = {}
  for step in found:
    run.restore(step)
    after = attach(run.base, run.trained) if run.base else run.trained
    say(f'{workdir}: step {step}')
    steps[step] = analysis.changes(
      start, after, run.config.adapter.targets, ranks=step == found[-1]
    )
  return Trace(workdir, runs.method(run.config), steps)


def of_runs(
  places: Sequence[Path], out: Path, say: Callable[[str], None] = print
) -> str:
  """Writes changes.csv, changes.md, decomposition.png and maps.png.

  Args:
    places: run folders, or folders of such.
    out: folder, made if need be.
    say: hears what is being read.

  Returns:
    The text of changes.md.

  Raises:
    FileNotFoundError: if there are no runs, or one of them has no checkpoint.
  """
  traces = [trace(seen.workdir, say) for seen in runs.find(places)]
  out.mkdir(parents=True, exist_ok=True)
  _write_changes(traces, out / 'changes.csv')
  methods: dict[str, list[Trace]] = {}
  for one in traces:
    methods.setdefault(one.method, []).append(one)
  found = dict.fromkeys(c.module for t in traces for c in t.last)
  # In the order of the data flow.
  modules = [m for m in FLOW if m in found]
  modules += [m for m in found if m not in FLOW]
  text = '# How far the weights went\n\n' + _means(methods, modules)
  text += (
    '\n## Do magnitude and direction go together?\n\n'
    'Correlation of dM and dD over layers and checkpoints; of q the DoRA paper '
    'has -.62 under full fine-tuning, +.83 under LoRA, -.31 under DoRA.\n\n'
  )
  text += _correlations(methods, modules, lambda one: one.every)
  text += '\nOver layers, at the last checkpoint alone:\n\n'
  text += _correlations(methods, modules, lambda one: one.last)
  folder.write_text(out / 'changes.md', text)
  pictures.decomposition(methods, modules, out / 'decomposition.png')
  pictures.maps(methods, modules, out / 'maps.png')
  return text


def _write_changes(traces: Sequence[Trace], path: Path) -> None:
  with path.open('w', newline='') as file:
    writer = csv.writer(file)
    fields = [field.name for field in dataclasses.fields(Change)]
    writer.writerow(['run', 'method', 'step', *fields])
    for one in traces:
      for step, moved in one.steps.items():
        for change in moved:
          values = dataclasses.astuple(change)
          writer.writerow([one.run, one.method, step, *values])


def _means(
  methods: Mapping[str, Sequence[Trace]], modules: Sequence[str]
) -> str:
  """Of the last checkpoints, by method and module."""
  lines = [['method', 'runs', 'step', 'module', 'dM', '% of length', 'dD']]
  lines[0] += [f'rank ({analysis.SHARE:.0%} of the update)']
  for method, some in methods.items():
    for module in modules:
      own = [c for one in some for c in one.last if c.module == module]
      if own:
        steps = ', '.join({f'{max(one.steps):,}' for one in some})
        lines.append(
          [
            *(method, str(len(some)), steps, module),
            f'{statistics.fmean(c.magnitude for c in own):.3g}',
            f'{100 * statistics.fmean(c.relative for c in own):.3g}',
            f'{statistics.fmean(c.direction for c in own):.3g}',
            f'{statistics.fmean(c.rank or 0 for c in own):.3g}',
          ]
        )
  return markdown_table(lines)


def _correlations(
  methods: Mapping[str, Sequence[Trace]],
  modules: Sequence[str],
  take: Callable[[Trace], Sequence[Change]],
) -> str:
  """A row for each method: means over its runs, with their intervals."""
  lines = [['method', 'runs', 'all kernels', *modules]]
  for method, some in methods.items():
    cells = []
    for wanted in (modules, *([m] for m in modules)):
      own = [[c for c in take(one) if c.module in wanted] for one in some]
      found = [analysis.correlation(moved) for moved in own]
      finite = [r for r in found if not math.isnan(r)]
      cells.append(f'{Mean.of(finite)}' if finite else '')
    lines.append([method, str(len(some)), *cells])
  return markdown_table(lines)


def of_weights(
  name: str,
  out: Path,
  text: str = '',
  *,
  targets: str,
  formats: Sequence[Format] = FORMATS,
  limit: int = 0,
  length: int = 512,
  progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> str:
  """Writes formats.md and formats.png.

  Args:
    name: a model, as for `load_pretrained`.
    out: folder, made if need be.
    text: source of a text whose perplexity is measured, see `rows.read`; '' for
      none.
    targets: regex over whole names: kernels to be stored.
    formats: ways of storing them.
    limit: characters of the text read; 0 for all.
    length: tokens that a window of it has.
    progress: wraps the iterable over batches.

  Returns:
    The text of formats.md.

  Raises:
    ValueError: if targets match nothing, or nothing that could be stored so.
  """
  # At the door, before a model is loaded.
  whole = rows.as_text(rows.read(text))[: limit or None] if text else ''
  model, params, tokenizer = load_pretrained(name)
  out.mkdir(parents=True, exist_ok=True)

  def nats(tree: Any) -> likelihood.Perplexity | None:
    if not whole:
      return None
    return likelihood.perplexity(
      model, tree, tokenizer, whole, length=length, progress=progress
    )

  before = nats(params)
  lines = [['format', 'bits a weight', 'error']]
  lines[0] += ['perplexity by token', 'times that of float32'] if before else []
  lines.append(['float32', '32', '0'])
  if before:
    lines[1] += [f'{before.by_token:.4g}', '1']
  for form in formats:
    tree, error = form.tree(params, targets)
    lines.append([str(form), f'{form.bits:.3f}', f'{error:.2%}'])
    if before:
      lines[-1] += [*_against(nats(tree), before)]
  text = f'# {name} in four bits\n\n' + markdown_table(lines)
  for form in formats:
    left = unquantized(params, form.spec(targets))
    text += ''.join(f'\n{form}: {path} stays: {left[path]}\n' for path in left)
  text += _normality(params, targets)
  folder.write_text(out / 'formats.md', text)
  pictures.formats(scaled(params, targets), out / 'formats.png')
  return text


def _against(
  after: likelihood.Perplexity, before: likelihood.Perplexity
) -> tuple[str, str]:
  """Perplexity, and its ratio with an interval by resampling windows."""
  more = np.array(after.nats) - np.array(before.nats)
  tokens = np.array(after.tokens)
  ratio = bootstrap(
    lambda at: math.exp(more[at].sum() / tokens[at].sum()), len(tokens)
  )
  return f'{after.by_token:.4g}', str(ratio)


def _normality(params: Any, targets: str) -> str:
  """A table of Shapiro-Wilk tests by module."""
  lines = [
    ['module', 'columns not normal', 'blocks of 64 not normal', 'tested']
  ]
  flat = paths.flatten(params)
  for path in paths.select(params, targets, 'targets'):
    w = np.asarray(materialize(flat[path], jnp.float32))
    columns, count = analysis.normality(w)
    blocks = ''
    if w.shape[-2] % 64 == 0:
      blocks = f'{analysis.normality(w, 64)[0]:.1%}'
    lines.append([path, f'{columns:.1%}', blocks, str(count)])
  return (
    '\n## Are the weights normal?\n\nShapiro-Wilk tests at 5%, which 5% of '
    'normal ones fail; of the output features of LLaMA-7B the QLoRA paper has '
    f'7.5%.\n\n{markdown_table(lines)}'
  )


def scaled(params: Any, targets: str, block_size: int = 64) -> np.ndarray:
  """Weights over their block's absmax, f32 [n], of kernels that can be stored.

  Args:
    params: nested dicts.
    targets: regex over whole names.
    block_size: weights along the in axis that share an absmax.
  """
  parts = []
  flat = paths.flatten(params)
  for path in paths.select(params, targets, 'targets'):
    w = materialize(flat[path], jnp.float32)
    if w.shape[-2] % block_size == 0:
      blocks = w.reshape(-1, block_size, w.shape[-1])
      absmax = jnp.abs(blocks).max(1, keepdims=True)
      parts.append(np.asarray(blocks / jnp.where(absmax > 0, absmax, 1)))
  return np.concatenate([part.reshape(-1) for part in parts])
