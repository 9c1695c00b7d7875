"""The story: from a config to a fine-tuned model, and what it gained."""

import dataclasses
import functools
import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm

from qdora_jax import (
  benchmark,
  data,
  devices,
  folder,
  optim,
  plan,
  processes,
  report,
  trackers,
  train,
)
from qdora_jax.config import LogSection, RunConfig
from qdora_jax.data import Batches
from qdora_jax.evaluate import Score
from qdora_jax.folder import AFTER
from qdora_jax.metrics import own_peak, read_log
from qdora_jax.opening import settled
from qdora_jax.run import Run
from qdora_jax.sharding import gather

Tree = dict[str, Any]


def fine_tune(config: RunConfig, workdir: str | Path) -> dict[str, Score]:
  """Fine-tunes as configured; the same call again continues where it stopped.

  Args:
    config: everything the run depends on.
    workdir: the run folder; see folder.py.

  Returns:
    {'zero-shot': ..., '3-shot': ..., 'fine-tuned': ...}; nothing if
    config.data.eval_size is 0.

  Raises:
    ValueError: if workdir holds a run of another config, or the run cannot
      fit its GPU by its plan (with the plan's table).
    RuntimeError: if another command is writing into workdir.
    OSError: if it cannot be written.
  """
  workdir = Path(workdir)
  config = settled(config, workdir)
  folder.check(config, workdir)
  began = time.perf_counter()
  # What takes least goes first: bad data is found before a model is loaded.
  found = data.load_data(config.data)
  for source, limit in config.eval.benchmarks.items():
    benchmark.load(source, limit)
  plan.refuse(config)
  trackers.check(config.log)
  run = Run.open(config, workdir)
  run.data = found
  batches, _ = run.batches(), run.held_out
  optim.check(config.optim, run.trained)
  # Only now: whom bad input has stopped can use the same folder again.
  with folder.writing(workdir), folder.claimed(config, workdir):
    _show_plan(run, batches)
    scores = _before(run)
    with trackers.following(
      config.log if processes.first() else LogSection(),
      workdir,
      dataclasses.asdict(config),
    ) as followers:
      fitted = _fit(run, batches, followers)
      run.trained = fitted.trained
      if run.data.held_out:
        scores[AFTER] = run.evaluate(label=AFTER)
        folder.save_scores(workdir, scores)
      if config.eval.benchmarks:
        _benchmark(run)
      last = {k: m.value for k, m in folder.figures(workdir).items()}
      followers.write({'step': config.train.steps, **last})
    if run.base:
      _export(run)
    if not processes.first():
      return scores
    rows = read_log(workdir / 'metrics.jsonl')
    title = (
      f'{config.data.path or config.data.name}, adapter '
      f'{config.adapter.method}, quantization {config.quant.format}'
    )
    report.plot(workdir / 'curves.png', rows, scores, title)
    summary = _summary(run, batches, rows)
    summary['seconds'] = round(time.perf_counter() - began, 1)
    summary['peak_memory_bytes'] = own_peak()
    folder.write(workdir / 'summary.json', summary)
  _show_results(summary, scores, workdir)
  return scores


def _benchmark(run: Run) -> None:
  """Measures it on what config.eval.benchmarks names."""
  for source, limit in run.config.eval.benchmarks.items():
    result = benchmark.of_run(
      run, source, limit=limit, batch_size=run.config.eval.batch_size
    )
    values = {'model': 'last', **dataclasses.asdict(result)}
    folder.add_benchmark(run.workdir, values)
    print(result, flush=True)


def _export(run: Run) -> None:
  """PEFT files, where PEFT has a form for what was trained."""
  run.trained = gather(run.trained)
  if processes.first():
    try:
      run.export(run.workdir / 'adapter')
    except ValueError as error:
      print(f'no PEFT files: {error}')


def _show_plan(run: Run, batches: Batches) -> None:
  """What is about to be trained, on what, and for how long."""
  config, counts = run.config, batches.counts
  dtype, (best, why) = config.model.dtype, devices.best_dtype(jax.devices()[0])
  if dtype != best:
    why = f"config.model.dtype='auto' would take {best}: {why}"
  print(f'computes in {dtype}: {why}')
  print(report.describe(run.base, run.trained, config.quant.spec()))
  print(*run.notes, sep='\n', end='\n' if run.notes else '')
  print(counts)
  tokens = config.train.batch_size * counts.length
  cut = run.held_out.counts.truncated if run.held_out else 0
  cut = f' ({cut:,} truncated)' if cut else ''
  same = run.data.overlap
  same = f', {same:,} training rows of the same questions left out' * bool(same)
  epochs = config.train.steps * config.train.batch_size / counts.packed
  print(
    f'{len(run.data.held_out):,} rows held out{cut}{same}; '
    f'{config.train.steps:,} steps of {config.train.batch_size} x '
    f'{counts.length} = {tokens:,} tokens, {epochs:.2g} epochs'
  )
  seconds = report.estimate(run.base, run.trained, tokens, run.model.remat)
  print(
    f'training takes about {report.duration(seconds * config.train.steps)} or '
    'more, by the speed of one matrix product here',
    flush=True,
  )


def _summary(
  run: Run, batches: Batches, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """The run in numbers."""
  seconds = sorted(row['seconds'] for row in rows)
  tokens = sum(row['tokens'] for row in rows)
  rated = [row for row in rows if 'held_out_loss' in row]
  scaled = 'overflowed' in rows[-1]
  best = min(rated, key=lambda row: row['held_out_loss'], default=None)
  if best is not None and run.config.train.keep_best:
    best = {key: best[key] for key in ('step', 'held_out_loss')}
  else:
    best = None
  return {
    'steps': len(rows),
    # What --checkpoint best takes.
    'best_checkpoint': best,
    'skipped_steps': rows[-1]['skipped'],
    # Of a run in float16: steps that only lowered the loss scale.
    'overflowed_steps': rows[-1]['overflowed'] if scaled else None,
    'tokens': tokens,
    # The first step compiles: the median is what a step takes.
    'seconds_per_step': round(seconds[len(seconds) // 2], 3),
    'tokens_per_second': round(tokens / sum(seconds), 1),
    'trained_parameters': report.count(run.trained),
    'bytes': report.by_kind(run.base, run.trained),
    'data': {
      **dataclasses.asdict(batches.counts),
      'filled': round(batches.counts.filled, 4),
    },
    'held_out_rows': len(run.data.held_out),
    'devices': [device.device_kind for device in jax.devices()],
    'versions': {
      'python': platform.python_version(),
      **{
        name: importlib.metadata.version(name)
        for name in ('qdora_jax', 'jax', 'flax', 'optax')
      },
    },
  }


def _show_results(
  summary: Mapping[str, Any], scores: Mapping[str, Score], workdir: Path
) -> None:
  for name, score in scores.items():
    print(f'{name:>10}: {score}')
  before = [s.interval[1] for name, s in scores.items() if name != AFTER]
  if before and scores[AFTER].total:
    best = max(before)
    gain = 100 * (scores[AFTER].interval[0] - best)
    print(f'gain beyond both intervals: {gain:.1f} points')
  skipped, overflowed = summary['skipped_steps'], summary['overflowed_steps']
  if best := summary['best_checkpoint']:
    print(
      f'the best checkpoint is of step {best["step"]}, held-out loss '
      f'{best["held_out_loss"]:.4f}; --checkpoint best takes it'
    )
  peak = summary['peak_memory_bytes']
  print(
    f'{summary["steps"]:,} steps, {summary["tokens"]:,} tokens, '
    + (f'{skipped} steps skipped (not finite), ' if skipped else '')
    + (f'{overflowed} only lowered the loss scale, ' if overflowed else '')
    + f'{summary["tokens_per_second"]:.0f} tokens/s; '
    f'{report.duration(summary["seconds"])} in all'
    + (f', peak {peak / 1e9:.2f} GB' if peak else '')
    + f'; results in {workdir}'
  )


def _before(run: Run) -> dict[str, Score]:
  """The untrained model's scores, bare and with solved examples."""
  path = run.workdir / 'scores.json'
  if path.exists():
    scores = folder.load_scores(path)
    scores.pop(AFTER, None)
    return scores
  scores = {}
  if not run.data.held_out or not run.config.eval.before:
    return scores
  # A fresh adapter changes nothing: this is the base.
  params = run.params()
  for shots in dict.fromkeys((0, run.config.eval.shots)):
    label = f'{shots}-shot' if shots else 'zero-shot'
    score = run.evaluate(params, shots, label)
    if shots and not score.total:
      continue
    scores[label] = score
    print(f'before, {label}: {score}', flush=True)
  folder.save_scores(run.workdir, scores)
  return scores


def _fit(
  run: Run, batches: Batches, followers: trackers.Guarded
) -> train.Fitted:
  """Trains run.trained from the last checkpoint to the last step."""
  config = run.config
  trained = run.trained
  # Given away, so that full fine-tuning holds its parameters once.
  run.trained = {}
  return train.fit(
    run.model,
    run.base,
    trained,
    batches,
    steps=config.train.steps,
    lr=optim.schedule(config.optim, config.train.steps),
    optimizer=functools.partial(optim.from_config, config.optim),
    microbatches=config.train.microbatches,
    seed=config.seed + 1,
    mesh=run.mesh,
    workdir=run.workdir,
    save_every=config.train.save_every,
    keep_last=config.train.keep_last,
    keep_best=config.train.keep_best,
    identity=run.identity,
    callbacks=[functools.partial(_watch, run)] if config.eval.every else [],
    call_every=config.eval.every or 1,
    writers=[followers.write],
    max_skipped=config.train.max_skipped,
    donate=True,
    paged=config.optim.paged,
    room=plan.room(config),
  )


def _watch(
  run: Run, step: int, row: dict[str, Any], trained: Tree
) -> Mapping[str, Any] | None:
  """Held-out loss and a few answers, now and then."""
  c = run.config
  if not run.data.held_out:
    return None
  # After the last step all of it is evaluated, but for comparison.
  if step == c.train.steps and not c.train.keep_best:
    return None
  params = run.params(trained)
  seen: dict[str, Any] = {'held_out_loss': run.held_out_loss(params)}
  tqdm.tqdm.write(f'step {step}: held-out loss {seen["held_out_loss"]:.4f}')
  rows = run.data.held_out[: c.eval.samples]
  if rows:
    seen['samples'] = run.evaluate(params, rows=rows).samples
    for sample in seen['samples']:
      tqdm.tqdm.write(report.answer_text(*sample))
  return seen
