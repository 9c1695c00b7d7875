"""Commands about plans, many runs and weights: plan, sweep, runs, analyze."""

import argparse
import functools
import sys
from pathlib import Path

import jax
import tqdm

from qdora_jax import paths
from qdora_jax.config_file import (
  check_overrides,
  read_config,
  read_values,
  returned,
)
from qdora_jax.specs import ALL_LINEAR


def plan(argv: list[str]) -> None:
  """Says whether a run fits, before anything is loaded."""
  parser = argparse.ArgumentParser('qdora plan', allow_abbrev=False)
  parser.add_argument('--config', required=True)
  parser.add_argument(
    '--model', help='instead of the config: llama-3-8b, a directory, a hub id'
  )
  parser.add_argument('--mesh', default='', help='sizes: fsdp=4,data=2')
  parser.add_argument('--device', help='a GPU: t4, rtx-3090, a100-80, h100 ...')
  parser.add_argument(
    '--picture', type=Path, help='a PNG: memory by part, of five methods'
  )
  known, words = parser.parse_known_args(argv)
  words = check_overrides(words)
  if known.model:
    words.append(f'--config.model.name={known.model}')
  for size in filter(None, known.mesh.split(',')):
    axis, equals, count = size.partition('=')
    if axis not in ('data', 'fsdp', 'tensor') or not equals:
      raise ValueError(
        f'--mesh={known.mesh}: {size!r}: expected sizes of data, fsdp and '
        'tensor, such as fsdp=4,data=2'
      )
    words.append(f'--config.mesh.{axis}={count}')
  config = read_config(known.config, words)
  from qdora_jax import devices, plan

  device = devices.find(known.device) if known.device else None
  job = plan.of_run(config)
  made = plan.plan(job)
  print(f'{config.model.name}, {made}')
  if known.picture:
    from qdora_jax import pictures

    parts = {name: one.parts for name, one in plan.methods(job).items()}
    title = f'{config.model.name}, {job.batch} x {job.seq_len} tokens'
    pictures.memory(parts, title, known.picture)
    print(f'memory by part: {known.picture}')
  if device is not None:
    print(plan.verdict(made, device))
    return
  for device in devices.DEVICES.values():
    if plan.fits(made, device.usable):
      print(plan.verdict(made, device))
    else:
      print(
        f'{device.name}: does not fit ({device.usable / 1e9:.1f} GB); what '
        f'would help: --device {device.name}'
      )


def sweep(argv: list[str]) -> int:
  """Runs a sweep, or makes its table anew."""
  parser = argparse.ArgumentParser('qdora sweep', allow_abbrev=False)
  parser.add_argument('file')
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--only', help='the point of this name alone')
  parser.add_argument(
    '--isolate',
    action='store_true',
    help='each point in a process of its own: its peak memory is its own',
  )
  parser.add_argument(
    '--table', action='store_true', help='nothing is run: table and plot'
  )
  known, words = parser.parse_known_args(argv)
  words = check_overrides(words)
  if not Path(known.file).is_file():
    raise FileNotFoundError(
      f'{known.file}: no such file{paths.beside(known.file)}'
    )
  from qdora_jax import findings, sweep

  found = returned(known.file, 'get_sweep', sweep.Sweep)
  beside = Path(known.file).parent / found.config
  points = sweep.build(found, read_values(str(beside), words))
  report = functools.partial(findings.report, found, known.out)
  if known.table:
    print(report())
    return 0
  isolated = None
  mine = {n: c for n, c in points.items() if known.only in (None, n)}
  if known.isolate:
    # Its points need the devices, and JAX would take a GPU's memory here.
    jax.config.update('jax_platforms', 'cpu')
    isolated = [sys.executable, '-m', 'qdora_jax.cli', 'sweep', known.file]
    isolated += ['--out', str(known.out), *words]
  sweep.check(mine, known.out, mesh=not known.isolate)
  return sweep.run(found, points, known.out, known.only, isolated, report)


def runs(argv: list[str]) -> None:
  """Lists run folders."""
  parser = argparse.ArgumentParser('qdora runs', allow_abbrev=False)
  parser.add_argument('folders', nargs='+', type=Path)
  parser.add_argument(
    '--compare',
    action='store_true',
    help='what differs in their configs, and their curves in one plot',
  )
  parser.add_argument(
    '--history',
    action='store_true',
    help='evaluations during training, and the last answers looked at',
  )
  parser.add_argument('--out', type=Path, default=Path('compared.png'))
  known = parser.parse_args(argv)
  from qdora_jax import runs

  found = runs.find(known.folders)
  print(runs.table(found, known.compare))
  if known.compare:
    runs.plot(found, known.out)
    print(f'curves: {known.out}')
  if known.history:
    print(*map(runs.history, found), sep='\n')


def analyze(argv: list[str]) -> None:
  """What became of weights, or what formats do to them."""
  parser = argparse.ArgumentParser('qdora analyze', allow_abbrev=False)
  parser.add_argument(
    'folders',
    nargs='*',
    type=Path,
    help='run folders, or folders of such: what training did to their weights',
  )
  parser.add_argument(
    '--model', help='instead: what four bits do to the weights of a model'
  )
  parser.add_argument('--text', default='', help='whose perplexity is measured')
  parser.add_argument(
    '--limit', type=int, default=0, help='characters of it; 0 for all'
  )
  parser.add_argument(
    '--own',
    type=int,
    default=0,
    help='so many texts that the model writes itself, instead of --text',
  )
  parser.add_argument('--targets', default=ALL_LINEAR)
  parser.add_argument('--out', type=Path, required=True)
  known = parser.parse_args(argv)
  if bool(known.folders) == bool(known.model):
    parser.error('expected run folders, or --model NAME')
  if known.folders and (known.text or known.limit or known.own):
    parser.error('--text, --limit and --own are of --model NAME')
  if known.limit < 0 or known.own < 0:
    parser.error(f'--limit={known.limit}, --own={known.own}: at least 0')
  if known.limit and not known.text:
    parser.error('--limit is of --text FILE')
  from qdora_jax import study

  if known.folders:
    text = study.of_runs(known.folders, known.out)
  else:
    text = study.of_weights(
      known.model,
      known.out,
      known.text,
      targets=known.targets,
      limit=known.limit,
      own=known.own,
      progress=functools.partial(tqdm.tqdm, leave=False, disable=None),
    )
  print(f'{text}\ntables and pictures: {known.out}')
