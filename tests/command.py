"""`qdora train` in processes of its own: to kill, to stop and to compare."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

from qdora_jax.metrics import read_log

# What a clock and a machine's load decide.
LOOSE = {'seconds', 'tokens_per_second', 'memory_bytes'}
# What C++ and Python say that nobody should have to read.
TRACES = (
  *('Traceback', 'Exception ignored'),
  *('F0000', 'terminate called', '*** Check', '[Gloo]'),
)
# Seconds in which anything happens, however busy the machine.
PATIENCE = 900.0
# Behind a config: a run rests after each step, or a tiny one may have ended
# before who waits for its first step comes to do something to it.
REST = """
import time
from qdora_jax.metrics import Progress
_show = Progress.show
def _show_and_rest(*args):
  _show(*args)
  time.sleep(0.1)
Progress.show = _show_and_rest
"""


@dataclasses.dataclass
class Command:
  """`qdora train` with one config, as often as asked.

  What one process has compiled the next ones read.
  """

  folder: Path
  config: Path

  @classmethod
  def make(cls, folder: Path, **overrides: Any) -> 'Command':
    """With the tiny model; overrides are 'section.key': value."""
    (folder / 'model').mkdir()
    model = tiny.write(folder / 'model')
    config = tiny.config_file(folder, model, **overrides)
    config.write_text(config.read_text() + REST)
    return cls(folder, config)

  def start(
    self, workdir: Path, *words: str, devices: int = 1
  ) -> subprocess.Popen:
    """Starts it; what it prints goes into files."""
    command = ['train', '--config', str(self.config), '--workdir', str(workdir)]
    out, err = self._outputs(workdir)
    with out.open('w') as stdout, err.open('w') as stderr:
      return subprocess.Popen(
        [sys.executable, '-m', 'qdora_jax.cli', *command, *words],
        stdout=stdout,
        stderr=stderr,
        env=self.environment(devices),
      )

  def environment(self, devices: int = 1) -> dict[str, str]:
    return {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'JAX_ENABLE_COMPILATION_CACHE': 'true',
      'QDORA_CACHE': str(self.folder / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'TMPDIR': str(self.folder),
      # Or it says that there is no torch.
      'TRANSFORMERS_NO_ADVISORY_WARNINGS': '1',
    }

  def run(
    self, workdir: Path, *words: str, devices: int = 1
  ) -> tuple[int, str, str]:
    return self.ended(self.start(workdir, *words, devices=devices), workdir)

  def ended(
    self, process: subprocess.Popen, workdir: Path
  ) -> tuple[int, str, str]:
    """(exit code, stdout, stderr), neither with a trace."""
    code = process.wait(timeout=PATIENCE)
    out, err = (path.read_text() for path in self._outputs(workdir))
    for text in (out, err):
      assert not any(words in text for words in TRACES), text
    return code, out, err

  def _outputs(self, workdir: Path) -> list[Path]:
    return [self.folder / f'{workdir.name}.{end}' for end in ('out', 'err')]


def steady(workdir: Path) -> list[dict[str, Any]]:
  """The log without what is LOOSE."""
  rows = read_log(workdir / 'metrics.jsonl')
  assert all(row.keys() > LOOSE for row in rows)
  return [{k: row[k] for k in row.keys() - LOOSE} for row in rows]


def assert_ends_like(workdir: Path, whole: Path) -> None:
  """Adapters and logs are the same, bit for bit and line for line."""
  for name in ('adapter_model.safetensors', 'adapter_config.json'):
    mine = (workdir / 'adapter' / name).read_bytes()
    assert mine == (whole / 'adapter' / name).read_bytes(), name
  assert steady(workdir) == steady(whole)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == len(steady(whole))


def wait_for(process: subprocess.Popen, found: Callable[[], Any]) -> bool:
  """Until found() is true or the process has ended; says whether it runs."""
  until = time.monotonic() + PATIENCE
  while process.poll() is None and not found():
    assert time.monotonic() < until, 'nothing happened'
    time.sleep(0.002)
  return process.poll() is None


def new_row(workdir: Path) -> Callable[[], bool]:
  """Is there a row since now? A log is first cut to where it continues."""
  path, least = workdir / 'metrics.jsonl', []

  def found() -> bool:
    size = path.stat().st_size if path.exists() else 0
    least[:] = [min([*least, size])]
    return size > least[0]

  return found


def half_saved(workdir: Path) -> set[tuple[str, int]]:
  """Directories that orbax is writing, each with its time."""
  found = set()
  for path in (workdir / 'checkpoints').glob('*orbax-checkpoint-tmp*'):
    with contextlib.suppress(FileNotFoundError):
      found.add((path.name, path.stat().st_mtime_ns))
  return found


def newest(workdir: Path) -> int:
  """The last step that is saved, or 0."""
  names = [path.name for path in (workdir / 'checkpoints').glob('*')]
  return max([0, *(int(name) for name in names if name.isdigit())])
