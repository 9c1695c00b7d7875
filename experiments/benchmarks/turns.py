"""Programs in processes of their own, run in turns.

A process is what memory can be measured of. It makes its program and says that
it is ready with a line of JSON; from then on it runs once for every line that
it reads; told that there are no more, it says what it needed. What else it
prints goes to standard error.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Said = dict[str, Any]


class Other:
  """A process that takes turns, once it is `ready`."""

  def __init__(self, command: Sequence[str]):
    self.command = command
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  @functools.cached_property
  def ready(self) -> Said:
    """What it said at first; waits for it."""
    return self._hear()

  def turn(self) -> None:
    """Lets it run once, and waits."""
    self.process.stdin.write('\n')
    self.process.stdin.flush()
    self._hear()

  def end(self) -> Said:
    """Ends it; what it said at last."""
    self.process.stdin.close()
    said = self._hear()
    self.process.wait()
    return said

  def _hear(self) -> Said:
    line = self.process.stdout.readline()
    if not line:
      code = self.process.wait()
      raise RuntimeError(f'exit code {code}: {" ".join(self.command)}')
    return json.loads(line)


def serve(
  make: Callable[[], tuple[Callable[[], None], Said]],
  last: Callable[[], Said],
) -> None:
  """The other side.

  Args:
    make: gives what runs in a turn, and what is said of it.
    last: what is said in the end.
  """
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def say(said: Said) -> None:
    out.write(json.dumps(said) + '\n')
    out.flush()

  run, said = make()
  say(said)
  for _ in sys.stdin:
    run()
    say({})
  say(last())


def peak_memory() -> int:
  """Most bytes this process has held so far, by Linux's own count."""
  lines = Path('/proc/self/status').read_text().splitlines()
  (most,) = (line.split()[1] for line in lines if line.startswith('VmHWM:'))
  return 1024 * int(most)
