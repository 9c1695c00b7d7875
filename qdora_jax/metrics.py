"""What a run shows while it runs: JSONL log, progress bar, memory."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import tqdm


class Log:
  """metrics.jsonl: one JSON object a line, steps without gaps or doubles."""

  def __init__(self, path: Path, resume_at: int = 0):
    """Opens the log, dropping lines of steps that will be run again."""
    self.path = path
    if path.exists():
      kept = [
        row
        for row in read_log(path)
        if 'step' not in row or row['step'] <= resume_at
      ]
      lines = ''.join(json.dumps(row) + '\n' for row in kept)
      part = path.with_suffix('.part')
      part.write_text(lines)
      part.replace(path)

  def write(self, **row: Any) -> None:
    with self.path.open('a') as file:
      file.write(json.dumps(row) + '\n')


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

  def show(self, step: int, row: dict[str, float]) -> None:
    """One step done; row as it is logged."""
    text = (
      f'loss {row["loss"]:.4f}, lr {row["lr"]:.1e}, '
      f'{row["tokens_per_second"]:.0f} tok/s, '
      f'{row["memory_bytes"] / 1e9:.1f} GB'
    )
    if self.bar.disable and (step % 10 == 0 or step == self.steps):
      seconds = time.perf_counter() - self.began
      print(f'step {step}/{self.steps}: {text}, {seconds:.0f} s', flush=True)
    self.bar.set_postfix_str(text, refresh=False)
    self.bar.update()

  def close(self) -> None:
    self.bar.close()
