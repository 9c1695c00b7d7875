"""Every test runs on eight CPU devices, with strict shapes."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
# Commands that tests start leave no programs behind.
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
# Torch's threads spin while they wait: beside another worker's, a test of
# twenty steps took 280 s that takes 66 alone.
if 'PYTEST_XDIST_WORKER' in os.environ:
  os.environ.setdefault('OMP_NUM_THREADS', '1')

import jax

# Tracing makes objects by the million, and to look through them was an eighth
# of the tests of training.
gc.set_threshold(100_000, 50, 100)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# What one test has compiled the next ones read: a cache of this process alone,
# since what another is writing cannot be read.
compiled = tempfile.mkdtemp(prefix='qdora-compiled-')
atexit.register(shutil.rmtree, compiled, ignore_errors=True)
jax.config.update('jax_compilation_cache_dir', compiled)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
jax.config.update('jax_enable_compilation_cache', True)
