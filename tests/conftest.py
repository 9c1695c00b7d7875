"""Every test runs on eight CPU devices, with strict shapes."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Commands keep their programs for the next start; tests leave no trace.
jax.config.update('jax_enable_compilation_cache', False)
