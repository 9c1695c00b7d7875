"""Plans: exact trees, the compiler's own count, published figures, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import AdapterSpec, QuantSpec, footprint, rope
from qdora_jax import devices as gpus
from qdora_jax.footprint import Job
from qdora_jax.model import Decoder, LayerKind, ModelConfig
from qdora_jax.optim import make_optimizer
from qdora_jax.plan import check, fits, nearest, of_run, plan, verdict
from qdora_jax.published import CONFIGS, model_config
from qdora_jax.train import make_step

GB = 1e9


def decoder(vocab=1000, width=192, ff=448, layers=3) -> ModelConfig:
  kinds = (LayerKind(rope.plain(1e4, 32)),) * layers
  return ModelConfig(vocab, width, ff, layers, 6, 2, 32, kinds)


def compiled_bytes(job: Job) -> int:
  """args + temp + out - alias of the real step's program, without weights."""
  made = footprint.trees(job)
  model = Decoder(job.model, jnp.dtype(job.dtype), job.remat)
  step = make_step(model, make_optimizer(1e-4), job.microbatches)
  shape = (job.batch, job.seq_len)
  whole = jax.ShapeDtypeStruct(shape, jnp.int32)
  batch = dict.fromkeys(
    ('tokens', 'positions', 'segments', 'loss_at', 'labels'), whole
  )
  batch['weights'] = jax.ShapeDtypeStruct(shape, jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  args = (made.trained, made.state, made.base, made.fixed, batch, key)
  # Fully optimized, whatever the module asks for: memory is the question.
  with jax.disable_most_optimizations(False) if hasattr(
    jax, 'disable_most_optimizations'
  ) else _optimized():
    memory = step.lower(*args).compile().memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
