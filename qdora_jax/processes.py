"""Many processes, one training: joined, agreeing, and watched over.

Every process runs the same program on devices of its own and holds its part of
each array; the first alone writes and prints. What would make them part ways -
a signal to one of them, a file that one cannot read - is agreed on first.

A training that has lost a process cannot go on: the others wait in a
collective, or C++ ends them with a trace. So each has a parent, which no
collective holds up: `watch` starts the processes of this machine, tells in one
sentence what became of the first that failed, and ends the others.
"""

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

# Tells a worker where it stands.
_PLACE = 'QDORA_PROCESS'
# Seconds until a process that says nothing counts as lost. (With JAX's default,
# 100, the others wait longer than a minute.)
HEARTBEAT = 20
# Seconds for the others to end by themselves, once one has failed.
GRACE = 10
# Exit code of a process that failed because another did: "try again" in BSD's
# sysexits.h.
LOST = 75


class Place(NamedTuple):
  """A process among others: where the first listens, how many, and which.

  Attributes:
    coordinator: HOST:PORT of process 0.
    count: of all processes.
    index: of this one.
  """

  coordinator: str
  count: int
  index: int


def here() -> Place | None:
  """Where `watch` has put this process; None if it stands alone."""
  if _PLACE not in os.environ:
    return None
  coordinator, count, index, _ = os.environ[_PLACE].split(maxsplit=3)
  return Place(coordinator, int(count), int(index))


def first() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def agree(number: int) -> int:
  """The largest of all processes' numbers; every one of them must ask."""
  return int(largest(number))


def largest(number: int) -> int | jax.Array:
  """What `agree` gives, not waited for: devices compute it in their turn."""
  if jax.process_count() == 1:
    return number
  place, maximum = _everywhere()
  mine = np.full(jax.local_device_count(), number, np.int32)
  return maximum(jax.make_array_from_process_local_data(place, mine))


@functools.cache
def _everywhere() -> tuple[jax.sharding.Sharding, Any]:
  """A number on each device of all processes, and what finds the largest."""
  mesh = jax.sharding.Mesh(jax.devices(), ('every',))
  spec = jax.sharding.PartitionSpec
  one, all_ = (
    jax.sharding.NamedSharding(mesh, spec(*a)) for a in (['every'], [])
  )
  return one, jax.jit(jnp.max, out_shardings=all_)


def join(place: Place) -> None:
  """Makes this process one of many: JAX then has the devices of all.

  Before any other use of JAX; then `part` and `leave`. What this process says
  on stderr is passed on by `watch`, if it is to blame.
  """
  folder = Path(os.environ[_PLACE].split(maxsplit=3)[3])
  # Not file descriptors 1 and 2, on which C++ writes: both are a log.
  sys.stderr = (folder / f'{place.index}.words').open('w')
  sys.stdout.flush()
  sys.stdout = open(os.devnull if place.index else os.dup(1), 'w')  # noqa: SIM115
  os.dup2(2, 1)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  # Signals are agreed on by the training loop.
  jax.config.update('jax_enable_preemption_service', False)
  local = place.coordinator.startswith('localhost:')
  jax.distributed.initialize(
    *place,
    # Every device that is visible, also where Slurm would have it take one.
    cluster_detection_method='deactivate',
    heartbeat_timeout_seconds=HEARTBEAT,
    # By default it listens on every address of the machine.
    coordinator_bind_address=place.coordinator if local else None,
  )


def part() -> None:
  """Waits for all, each having done its work; the opposite of `join`."""
  # The first may have things to write yet: as long as that takes.
  agree(0)
  jax.distributed.shutdown()


def leave(code: int) -> NoReturn:
  """Ends a process that has joined, at once: JAX's own end waits for all."""
  sys.stderr.flush()
  sys.stdout.flush()
  os._exit(code)


def _end_with_parent() -> None:
  """A parent that is killed cannot end its workers; they see stdin close."""
  sys.stdin.buffer.read()
  os._exit(LOST)


def watch(command: Sequence[str], places: Sequence[Place]) -> int:
  """Runs one training in many processes, some or all of them here.

  Args:
    command: what each of them runs; it calls `join(here())`.
    places: of the processes to start here.

  Returns:
    The exit code: 0, or that of the process which failed first. What it said,
    or what became of it, is then on stderr.
  """
  folder = Path(tempfile.mkdtemp(prefix='qdora-'))
  workers = []
  try:
    with _passed_on(workers) as received:
      for place, share in zip(places, _shares(len(places)), strict=True):
        workers.append(_start(command, place, share, folder))
      stopped = _until_ended(workers)
    code, words = _verdict(workers, places, folder, stopped, received)
  finally:
    for worker in workers:
      worker.kill()
  if words:
    print(words, file=sys.stderr)
  if str(folder) not in words:
    shutil.rmtree(folder)
  return code


def local(count: int) -> list[Place]:
  """Places for so many processes on this machine."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    coordinator = f'localhost:{free.getsockname()[1]}'
  return [Place(coordinator, count, n) for n in range(count)]


def call(command: Sequence[str]) -> int:
  """Runs a command in a process that hears our signals; its exit code.

  Raises:
    KeyboardInterrupt: once it has ended, if there was one.
  """
  workers: list[subprocess.Popen] = []
  with _passed_on(workers) as received:
    workers.append(subprocess.Popen(command, start_new_session=True))
    code = workers[0].wait()
  if received:
    raise Interrupted(received[0])
  return code


def _start(
  command: Sequence[str], place: Place, share: dict[str, str], folder: Path
) -> subprocess.Popen:
  where = ' '.join(map(str, (*place, folder)))
  with (folder / f'{place.index}.log').open('w') as log:
    return subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stderr=log,
      env={**os.environ, **share, _PLACE: where},
      # Ctrl-C reaches the parent alone, which passes it on once.
      start_new_session=True,
    )


def _shares(count: int) -> list[dict[str, str]]:
  """The environment that gives each of so many processes its GPUs."""
  if count == 1 or not (gpus := _gpus()):
    return [{}] * count
  if len(gpus) % count:
    raise ValueError(
      f'--processes={count}: {len(gpus)} GPUs cannot be shared equally; '
      f'expected a divisor of {len(gpus)}'
    )
  each = len(gpus) // count
  parts = [gpus[n * each : (n + 1) * each] for n in range(count)]
  return [{'CUDA_VISIBLE_DEVICES': ','.join(part)} for part in parts]


def _gpus() -> list[str]:
  """What CUDA_VISIBLE_DEVICES names, or would; none where JAX uses others."""
  wanted = os.environ['JAX_PLATFORMS'] if 'JAX_PLATFORMS' in os.environ else ''
  if wanted and not {'cuda', 'gpu'} & set(wanted.split(',')):
    return []
  if 'CUDA_VISIBLE_DEVICES' in os.environ:
    return [x for x in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if x]
  if shutil.which('nvidia-smi') is None:
    return []
  listed = subprocess.run(
    ['nvidia-smi', '--query-gpu=index', '--format=csv,noheader'],
    capture_output=True,
    text=True,
  )
  return listed.stdout.split() if listed.returncode == 0 else []


class Interrupted(KeyboardInterrupt):
  """A signal ended what was running; what it had saved is kept."""

  def __init__(self, number: int, how: str = ''):
    self.signal = signal.Signals(number)
    super().__init__(f'{self.signal.name}: {how}' if how else self.signal.name)


@contextlib.contextmanager
def _passed_on(workers: list[subprocess.Popen]) -> Iterator[list[int]]:
  """Passes SIGTERM, SIGINT and SIGHUP on to all workers, noting them.

  They are in sessions of their own, and hear of a terminal through us alone.
  """
  received: list[int] = []

  def pass_on(number: int, _: object) -> None:
    received.append(number)
    for worker in workers:
      worker.send_signal(number)

  numbers = [signal.SIGTERM, signal.SIGINT]
  # Whoever began us with nohup wants us to outlive the terminal.
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    numbers.append(signal.SIGHUP)
  before = {number: signal.signal(number, pass_on) for number in numbers}
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _until_ended(workers: Sequence[subprocess.Popen]) -> set[int]:
  """Waits for all of them; which had to be killed after another had failed."""
  until = None
  while any(worker.poll() is None for worker in workers):
    if until is None and any(worker.poll() for worker in workers):
      until = time.monotonic() + GRACE
    if until is not None and time.monotonic() > until:
      late = {n for n, w in enumerate(workers) if w.poll() is None}
      for n in late:
        workers[n].kill()
        workers[n].wait()
      return late
    time.sleep(0.05)
  return set()


def _verdict(
  workers: Sequence[subprocess.Popen],
  places: Sequence[Place],
  folder: Path,
  stopped: set[int],
  received: Sequence[int],
) -> tuple[int, str]:
  """(exit code, what to say) of processes that have all ended."""

  def blame(n: int) -> tuple[int, int]:
    # JAX aborts processes, and ours give up, that have lost another.
    order = {0: 4, LOST: 3, -signal.SIGABRT: 2}
    code = workers[n].returncode
    return order[code] if code in order else int(code > 0), n

  n = min((n for n in range(len(workers)) if n not in stopped), key=blame)
  code, place = workers[n].returncode, places[n]
  words = folder / f'{place.index}.words'
  said = words.read_text() if words.exists() else ''
  if code == 0 or (said and code > 0):
    return code, said.rstrip('\n')
  if -code in received:
    name = signal.Signals(-code).name
    return 128 - code, f'{said}{name}; the same command continues'
  how = f'ended with code {code}'
  if code < 0:
    how = f'was ended by {signal.Signals(-code).name}'
  if code == -signal.SIGABRT:
    how += ', as JAX does when another process is lost'
  if code != -signal.SIGKILL:
    how += f' (see {folder / f"{place.index}.log"})'
  return max(code, 1), (
    f'{said}qdora: process {place.index} of {place.count} {how}, and all have '
    'been stopped; the same command continues'
  )
