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

import jax
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
from qdora_jax.generate import generate
from qdora_jax.intervals import Mean, Measure, bootstrap
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
  own: int = 0,
  length: int = 512,
  progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> str:
  """Writes formats.md and formats.png; of texts of the model's own, own.txt.

  Of a text that the model writes itself (at temperature 1) the loss added by a
  format is an estimate of the divergence from the model before, which is never
  negative.

  Args:
    name: a model, as for `load_pretrained`.
    out: folder, made if need be.
    text: source of a text whose perplexity is measured, see `rows.read`; '' for
      none.
    targets: regex over whole names: kernels to be stored.
    formats: ways of storing them.
    limit: characters of the text read; 0 for all.
    own: takes so many texts that the model writes itself, instead of `text`.
    length: tokens of a window of the text, or of each text of its own.
    progress: wraps the iterable over batches.

  Returns:
    The text of formats.md.

  Raises:
    ValueError: if targets match nothing, or nothing that could be stored so;
      for both a text and texts of its own; for either, if the model has no
      tokenizer.
  """
  if text and own:
    raise ValueError(f'text={text!r} and own={own}: expected one of them')
  # At the door, before a model is loaded.
  whole = rows.as_text(rows.read(text))[: limit or None] if text else ''
  model, params, tokenizer = load_pretrained(name)
  pairs: Sequence[likelihood.Pair] = []
  if whole or own:
    if tokenizer is None:
      raise ValueError(
        f'{name} has no tokenizer, which a text needs; expected one beside it, '
        'or neither text nor own'
      )
    first = likelihood.first_token(tokenizer)
  out.mkdir(parents=True, exist_ok=True)
  if whole:
    ids = tokenizer.encode(whole, add_special_tokens=False, verbose=False)
    pairs = list(likelihood.windows(ids, first, length))
  elif own:
    said = own_texts(model, params, first, own, length)
    pairs = [([first], ids) for ids in said]
    folder.write_text(out / 'own.txt', '\n\n'.join(map(tokenizer.decode, said)))

  def nats(tree: Any) -> np.ndarray:
    """(nats, tokens) of each window, f64 [N, 2]."""
    found = likelihood.log_likelihoods(
      model, tree, pairs, batch_size=4, progress=progress
    )
    return np.array([(-one.nats, one.tokens) for one in found])

  before = nats(params) if pairs else None
  lines = [['format', 'bits a weight', 'error']]
  lines.append(['float32', '32', '0'])
  if before is not None:
    lines[0] += ['perplexity by token', 'times that of float32']
    lines[1] += [str(_perplexity(before)), '1']
  for form in formats:
    tree, error = form.tree(params, targets)
    lines.append([str(form), f'{form.bits:.3f}', f'{error:.2%}'])
    if before is not None:
      after = nats(tree)
      ratio = _perplexity(after - before * [[1, 0]])
      lines[-1] += [str(_perplexity(after)), str(ratio)]
  title = Path(name).resolve().name if Path(name).is_dir() else name
  text = f'# {title} in four bits\n\n' + markdown_table(lines)
  stays: dict[str, list[str]] = {}
  for form in formats:
    for path, why in unquantized(params, form.spec(targets)).items():
      stays.setdefault(f'{path} stays: {why}', []).append(str(form))
  text += ''.join(f'\n{"; ".join(stays[one])}: {one}\n' for one in stays)
  text += _normality(params, targets)
  folder.write_text(out / 'formats.md', text)
  pictures.formats(scaled(params, targets), out / 'formats.png')
  return text


def own_texts(
  model: Any, params: Any, first: int, count: int, length: int
) -> list[list[int]]:
  """Texts that a model writes itself at temperature 1, as ids.

  Args:
    model, params: as for `generate`.
    first: the id that each begins after.
    count: of texts.
    length: ids of each; the model's own ends of a text are among them.
  """
  said: list[list[int]] = []
  for n in range(0, count, 32):
    key = jax.random.fold_in(jax.random.key(0), n)
    prompts = [[first]] * min(32, count - n)
    said += generate(model, params, prompts, length, temperature=1.0, key=key)
  return said


def _perplexity(sums_Nx2: np.ndarray) -> Measure:
  """Of windows' nats and tokens; of more nats, how many times as much."""

  def value(at: np.ndarray) -> float:
    nats, tokens = sums_Nx2[at].sum(0)
    return math.exp(nats / tokens)

  return bootstrap(value, len(sums_Nx2))


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
