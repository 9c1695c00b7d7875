"""Every test runs on eight CPU devices, with strict shapes."""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
# Commands that tests start leave no programs behind.
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
# Torch's threads spin while they wait: beside another worker's, a test of
# twenty steps took 280 s that takes 66 alone.
if 'PYTEST_XDIST_WORKER' in os.environ:
  os.environ.setdefault('OMP_NUM_THREADS', '1')

import jax
import pytest

# Tracing makes objects by the million, and to look through them was an eighth
# of the tests of training.
gc.set_threshold(100_000, 50, 100)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# What one test has compiled the next ones read, also those of other workers,
# and of the next `pytest` where QDORA_TESTS_COMPILED names a folder to keep.
if 'QDORA_TESTS_COMPILED' not in os.environ:
  # By whoever is first, and starts the workers.
  made = tempfile.mkdtemp(prefix='qdora-compiled-')
  os.environ['QDORA_TESTS_COMPILED'] = made
  atexit.register(shutil.rmtree, made, ignore_errors=True)
shared = Path(os.environ['QDORA_TESTS_COMPILED'])
shared.mkdir(parents=True, exist_ok=True)
# Its own, in which JAX writes: what another is writing cannot be read.
compiled = Path(tempfile.mkdtemp(prefix='process-', dir=shared))
atexit.register(shutil.rmtree, compiled, ignore_errors=True)
jax.config.update('jax_compilation_cache_dir', str(compiled))
# Their folder would be part of every program's name.
jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
jax.config.update('jax_enable_compilation_cache', True)


@pytest.fixture(scope='module', autouse=True)
def programs_are_shared():
  """Of each module, before and after it."""
  take(shared, compiled)
  yield
  take(compiled, shared)


def take(there: Path, here: Path):
  """Links what is there and not here: at once whole, or not at all."""
  for name in sorted({*os.listdir(there)} - {*os.listdir(here)}):
    if name.endswith('-cache'):
      with contextlib.suppress(FileExistsError):
        os.link(there / name, here / name)
