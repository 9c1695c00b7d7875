"""What a run shows while it runs: JSONL log, progress bar, memory."""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tqdm


class Log:
  """metrics.jsonl: one JSON object a line, steps without gaps or doubles."""

  def __init__(self, path: Path | None, position: int = 0):
    """Opens the log, dropping what was written after a position.

    Args:
      path: of the file; None logs nothing.
      position: in bytes, as a checkpoint noted it.
    """
    self._file = None
    if path is not None:
      self._file = path.open('ab')
      if path.stat().st_size > position:
        # What follows belongs to steps that will be run again.
        self._file.truncate(position)

  def __enter__(self) -> 'Log':
    return self

  def __exit__(self, *_: Any) -> None:
    if self._file is not None:
      # Every row was flushed; one that could not be has been reported.
      with contextlib.suppress(OSError):
        self._file.close()

  def write(self, row: dict[str, Any]) -> None:
    if self._file is None:
      return
    try:
      self._file.write((json.dumps(row, allow_nan=False) + '\n').encode())
      self._file.flush()
    except OSError as error:
      raise OSError(
        f'{self._file.name}: {error.strerror}; make room, and the same command '
        'continues'
      ) from error

  def position(self) -> int:
    """Bytes so far, all of them on the disk."""
    if self._file is None:
      return 0
    os.fsync(self._file.fileno())
    return os.fstat(self._file.fileno()).st_size


def read_log(path: Path) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl; a last line cut short is left out."""
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def peak_memory() -> int:
  """Bytes at the highest so far: of the device, or of the process on CPU."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Kibibytes on Linux, bytes on macOS (getrusage(2)).
  return peak if sys.platform == 'darwin' else peak * 1024


_told = 0


def own_peak() -> int | None:
  """`peak_memory`, where it is of what ran since this was last asked.

  It is the process's: None, if what ran before took as much.
  """
  global _told
  peak = peak_memory()
  if peak <= _told:
    return None
  _told = peak
  return peak


class Progress:
  """The training bar; in a pipe, a line now and then instead."""

  def __init__(self, start: int, steps: int):
    self.bar = tqdm.tqdm(
      total=steps,
      initial=start,
      desc='train',
      unit='step',
      disable=None,
      dynamic_ncols=True,
      bar_format='{desc} {n}/{total} |{bar}| {elapsed} + {remaining}{postfix}',
    )
    self.steps = steps
    self.began = time.perf_counter()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_: Any) -> None:
    self.bar.close()

  def show(self, step: int, row: dict[str, Any]) -> None:
    """One step done; row as it is logged."""
    loss = row['loss']
    text = (
      (f'loss {loss:.4f}' if loss is not None else 'loss not finite, skipped')
      + f', lr {row["lr"]:.1e}, {row["tokens_per_second"]:.0f} tok/s, '
      f'{row["memory_bytes"] / 1e9:.1f} GB'
      + (f', {row["skipped"]} skipped' if row['skipped'] else '')
      + (f', loss scale {row["loss_scale"]:g}' if 'loss_scale' in row else '')
    )
    last = step == self.steps
    if self.bar.disable and (step % 10 == 0 or last or loss is None):
      seconds = time.perf_counter() - self.began
      print(f'step {step}/{self.steps}: {text}, {seconds:.0f} s', flush=True)
    self.bar.set_postfix_str(text, refresh=False)
    self.bar.update()
