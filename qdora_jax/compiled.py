"""Compiled programs: kept on disk, so that the next start need not compile.

It is JAX's own cache (https://docs.jax.dev/en/latest/persistent_compilation_cache.html),
which knows programs by what they are, on what device and by which version; what
comes out of it is the same program, and gives the same bits. Given a bound, it
locks its folder, so that no run reads what another is still writing. And what
the compiler leaves in memory goes back to the system.
"""

import ctypes
import functools
import os
from pathlib import Path

import filelock
import jax

from qdora_jax.interop.pypi import default_cache

# Programs that took less are compiled again: there are many of them, and JAX's
# own limit, one second, leaves out most of a small model's.
SECONDS = 0.1
# Bytes of all programs; beyond them those go that were not used for longest.
MOST = 2**30
# Compiling that took less leaves little behind.
LONG = 1.0


def keep() -> None:
  """Keeps programs in `compiled/` of $QDORA_CACHE, or of ~/.cache/qdora_jax.

  Before JAX compiles its first one. Whoever has told JAX otherwise is heard:
  by JAX_COMPILATION_CACHE_DIR, another folder; by
  JAX_ENABLE_COMPILATION_CACHE=false, none. Where the folder cannot be written,
  or its file system knows no locks, nothing is kept.
  """
  config = jax.config
  if config.jax_compilation_cache_dir is not None:
    return
  if not config.jax_enable_compilation_cache:
    return
  folder = default_cache() / 'compiled'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / '.lockfile', timeout=10):
      _clear(folder)
  except (OSError, NotImplementedError):
    return
  config.update('jax_compilation_cache_dir', str(folder))
  if 'JAX_COMPILATION_CACHE_MAX_SIZE' not in os.environ:
    config.update('jax_compilation_cache_max_size', MOST)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    config.update('jax_persistent_cache_min_compile_time_secs', SECONDS)


def _clear(folder: Path) -> None:
  """Removes programs that JAX began to write and was killed over.

  It writes the time of use last. What has none may be cut short, and would be a
  warning at every start; nobody writes while we have the lock.
  """
  for program in folder.glob('*-cache'):
    used = program.with_name(program.name.removesuffix('-cache') + '-atime')
    if not used.exists():
      program.unlink()


@functools.cache
def tidy() -> None:
  """From now on, gives back what compiling leaves free in this process.

  glibc keeps what LLVM has freed, and a step needs its room beside that: .2 GB
  of 1.8 (SmolLM2-135M on a CPU). Other C libraries are left alone. Calls
  after the first do nothing.
  """
  try:
    trim = ctypes.CDLL(None).malloc_trim
  except (OSError, AttributeError, TypeError):
    return

  def listen(event: str, seconds: float, **_) -> None:
    if event.endswith('/backend_compile_duration') and seconds >= LONG:
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(listen)
