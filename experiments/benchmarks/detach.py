"""What holding DoRA's norm constant saves, read off compiled programs.

  python experiments/benchmarks/detach.py [MODEL] [BATCH] [TOKENS]

Compiles the training step of a published architecture from shapes alone, no
remat, float32 (a CPU's memory for bfloat16 says nothing), rank 16 on all linear
layers: with the dense norm and with the factored one, held constant and not.
The DoRA paper (arXiv 2402.09353, section 4.3) measured 24.4% less on LLaMA-7B.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp

from qdora_jax.job import Job, trees
from qdora_jax.model import Decoder
from qdora_jax.optim import make_optimizer
from qdora_jax.published import model_config
from qdora_jax.specs import AdapterSpec
from qdora_jax.step import make_step


def compiled(job: Job) -> int:
  """Bytes of the step's program: args + temp + out - alias."""
  made = trees(job)
  model = Decoder(job.model, jnp.dtype(job.dtype), job.remat)
  step = make_step(model, make_optimizer(1e-4), job.microbatches)
  whole = jax.ShapeDtypeStruct((job.batch, job.seq_len), jnp.int32)
  batch = dict.fromkeys(
    ('tokens', 'positions', 'segments', 'loss_at', 'labels'), whole
  )
  batch['weights'] = jax.ShapeDtypeStruct(whole.shape, jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  args = (made.trained, made.state, made.base, made.fixed, batch, key)
  memory = step.lower(*args).compile().memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


def saving(
  model: str, batch: int, tokens: int, factored: bool
) -> tuple[int, int]:
  """Bytes with the norm differentiated, and with it held constant."""
  sizes = []
  for detach in (False, True):
    spec = AdapterSpec('dora', rank=16, factored=factored, detach=detach)
    job = Job(model_config(model), None, spec, batch, tokens)
    job = dataclasses.replace(job, dtype='float32', remat='none')
    sizes.append(compiled(job))
  return sizes[0], sizes[1]


def main(model: str = 'llama-7b', batch: str = '4', tokens: str = '256'):
  for factored in (False, True):
    name = 'factored' if factored else 'dense'
    free, held = saving(model, int(batch), int(tokens), factored)
    print(
      f'{model}, {batch} x {tokens} tokens, {name} norm: differentiated '
      f'{free / 1e9:.2f} GB, held constant {held / 1e9:.2f} GB, '
      f'{1 - held / free:.1%} less',
      flush=True,
    )


if __name__ == '__main__':
  main(*sys.argv[1:])
