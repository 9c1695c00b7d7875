"""A benchmark's result: what was measured, on what, of which commit.

How every benchmark here measures: what is compared runs in one process tree, in
turns, so that what disturbs one disturbs all; what counts are medians, and of
comparisons the median of each round's ratio, both with their quartiles.

A result is one JSON file. Its `rows` are those of a table: a row's keys are the
headings, units included ('ms a step', 'of PEFT'), its values strings, numbers,
None or spreads (`spread`, `ratio`). report.py makes tables and plots of them.

A script:

  parser = result.parser(__doc__)
  args = parser.parse_args()
  seconds = result.interleave({'ours': ours, 'theirs': theirs}, args.rounds)
  rows = [{'side': name, 's': result.spread(times)} for ...]
  result.write('step', 'One training step.', rows, args)
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read when JAX first looks for devices: without it torch finds a full GPU.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax

ROOT = Path(__file__).parents[2]
OUT = Path('runs/benchmarks')
PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'torch',
  'peft',
  'bitsandbytes',
  'transformers',
)


def parser(doc: str, rounds: int = 7) -> argparse.ArgumentParser:
  """A parser with the flags that every benchmark has; doc is its help."""
  made = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument('--out', type=Path, default=OUT, help='folder of results')
  made.add_argument('--rounds', type=int, default=rounds)
  made.add_argument('--seed', type=int, default=0)
  return made


def interleave(
  ways: Mapping[str, Callable[[], object]],
  rounds: int,
  at_least: float = 0.0,
) -> dict[str, list[float]]:
  """Runs functions in turns, each second round backwards.

  Each is called once before, uncounted: it compiles.

  Args:
    ways: functions by name; each waits for what it started.
    rounds: turns each has.
    at_least: seconds a turn takes: short functions are called many times in it.

  Returns:
    By name, the seconds of a call in each round.
  """
  if rounds < 1:
    raise ValueError(f'rounds={rounds}: expected at least 1')
  calls = dict.fromkeys(ways, 1)
  for name, way in ways.items():
    way()
    if at_least:
      calls[name] = math.ceil(at_least / max(_seconds(way, 1), 1e-6))
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for n in range(rounds):
    for name in reversed(ways) if n % 2 else ways:
      seconds[name].append(_seconds(ways[name], calls[name]))
  return seconds


def _seconds(way: Callable[[], object], calls: int) -> float:
  """Seconds of one of so many calls."""
  began = time.perf_counter()
  for _ in range(calls):
    way()
  return (time.perf_counter() - began) / calls


def busy(call: Callable[[], object]) -> float | None:
  """Seconds that GPUs spend on a call, by JAX's profile; None if it sees none.

  Gaps between kernels, and what it takes to launch them, do not count.
  """
  call()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      call()
    (path,) = Path(folder).rglob('*.xplane.pb')
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [
      event.duration_ns
      for plane in planes
      if 'GPU' in plane.name
      for line in plane.lines
      if line.name.startswith('Stream')
      for event in line.events
    ]
  return sum(events) * 1e-9 or None


def spread(values: Sequence[float], factor: float = 1.0) -> dict[str, Any]:
  """Median and quartiles of rounds; each value times `factor` (units)."""
  values = sorted(factor * value for value in values)
  low, median, high = (
    statistics.quantiles(values, method='inclusive')
    if len(values) > 1
    else values * 3
  )
  short = (float(f'{x:.6g}') for x in (median, low, high))
  names = ('median', 'low', 'high')
  return dict(zip(names, short, strict=True)) | {'rounds': len(values)}


def ratio(
  values: Sequence[float], beside: Sequence[float], factor: float = 1.0
) -> dict[str, Any]:
  """Spread of each round's value over the same round's other value."""
  pairs = zip(values, beside, strict=True)
  return spread([a / b for a, b in pairs], factor)


def write(
  name: str,
  what: str,
  rows: Sequence[Mapping[str, Any]],
  args: argparse.Namespace,
  plot: str | None = None,
  notes: Sequence[str] = (),
) -> dict[str, Any]:
  """Writes OUT/NAME.json and returns what it holds.

  No path, user or host of this machine is in it.

  Args:
    name: of the benchmark and its file.
    what: one sentence: what was measured, and how.
    rows: of the table, see above.
    args: from `parser`, with what the script added to it.
    plot: heading of the spread that is drawn as bars; None: no plot.
    notes: sentences that stand under the table.
  """
  arguments = {
    key: public(value) for key, value in vars(args).items() if key != 'out'
  }
  held = {
    'name': name,
    'what': what,
    'command': _command(),
    'arguments': arguments,
    'seeds': [args.seed],
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    'commit': commit(),
    'hardware': hardware(),
    'versions': versions(),
    'plot': plot,
    'notes': list(notes),
    'rows': list(rows),
  }
  args.out.mkdir(parents=True, exist_ok=True)
  text = json.dumps(held, indent=2, ensure_ascii=False) + '\n'
  (args.out / f'{name}.json').write_text(text)
  return held


def hardware() -> dict[str, Any]:
  """What the numbers were measured on."""
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  limit = stats['bytes_limit'] if 'bytes_limit' in stats else None
  gpu = device.platform != 'cpu'
  pages = os.sysconf('SC_PHYS_PAGES')
  return {
    'cpu': _cpu(),
    'cores': os.cpu_count(),
    'memory_gb': round(pages * os.sysconf('SC_PAGE_SIZE') / 1e9, 1),
    'gpu': device.device_kind if gpu else None,
    'gpus': len(jax.devices()) if gpu else 0,
    'gpu_memory_gb': round(limit / 1e9, 1) if limit else None,
  }


def versions() -> dict[str, str]:
  """Of Python and of the packages that are installed."""
  found = {'python': platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def commit() -> str | None:
  """The commit this file is of; '+' behind it: with changes. None: no git."""

  def git(*words: str) -> str:
    done = subprocess.run(
      ['git', *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return None


def _cpu() -> str:
  """The processor's name."""
  info = Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  named = [x.split(':', 1)[1].strip() for x in lines if 'model name' in x]
  return named[0] if named else platform.processor() or platform.machine()


def public(value: Any) -> Any:
  """A flag's value as it may be shown: of a path elsewhere, the last part."""
  if isinstance(value, str | Path):
    flag, equals, rest = str(value).rpartition('=')
    path = Path(rest)
    if path.is_absolute() or '..' in path.parts:
      return f'{flag}{equals}.../{path.name}'
    return str(value)
  if isinstance(value, list | tuple):
    return [public(item) for item in value]
  return value


def _command() -> str:
  """The command line, from the repository's root."""
  script = Path(sys.argv[0]).resolve()
  if script.is_relative_to(ROOT):
    script = script.relative_to(ROOT)
  return ' '.join(['python', public(script), *map(public, sys.argv[1:])])
