"""SIGTERM and Ctrl-C while training: what was begun is saved before the end."""

import collections
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qdora_jax import processes


@contextlib.contextmanager
def noted(active: bool) -> Iterator[Callable[[bool], str | None]]:
  """Notes SIGTERM and SIGINT while a step runs; a second SIGINT interrupts.

  An error that comes after one is its end: Interrupted, with the error's words.

  What is noted by one of many processes is told to all: at once, or when they
  ask again, which waits for nothing that was begun since.
  """
  seen: list[int] = []
  telling: collections.deque[Any] = collections.deque()
  # Only the main thread can be told of signals.
  active = active and threading.current_thread() is threading.main_thread()
  before = {}

  def note(number: int, frame: Any) -> None:
    if seen and number == signal.SIGINT:
      raise KeyboardInterrupt
    seen.append(number)

  def asked(at_once: bool) -> str | None:
    telling.append(processes.largest(seen[0] if seen else 0))
    at_once |= jax.process_count() == 1
    number = 0
    while len(telling) > (0 if at_once else 1):
      number = max(number, int(telling.popleft()))
    return signal.Signals(number).name if number else None

  if active:
    for number in (signal.SIGTERM, signal.SIGINT):
      before[number] = signal.signal(number, note)
  try:
    yield asked
  except Exception as error:
    # Who was told to end ends, and does not try what is next.
    if seen:
      raise processes.Interrupted(seen[0], f'not saved: {error}') from error
    raise
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
