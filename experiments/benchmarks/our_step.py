"""Our side of step.py: a training step in a process of its own."""

import argparse
import functools
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import large
import numpy as np
import optax
import turns

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  compiled,
  init_adapter,
  load_pretrained,
  norms,
  quantize,
  sharding,
)
from qdora_jax.chat import Example
from qdora_jax.data import Batches
from qdora_jax.interop.families import model_config
from qdora_jax.model import Decoder
from qdora_jax.step import make_step


def loaded(args: argparse.Namespace, quant: QuantSpec | None) -> Any:
  """The decoder and its base: read, or drawn on the device."""
  dtype = jnp.dtype(args.dtype)
  if args.folder:
    return load_pretrained(args.folder, quant, dtype=dtype, remat=args.remat)[
      :2
    ]
  model = Decoder(model_config(args.config, 'config.json'), dtype, args.remat)
  one = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), one)['params']
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), shapes)
  if quant is not None:
    shapes = jax.eval_shape(lambda p: quantize(p, quant), shapes)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  base = large.drawn(jax.random.key(args.seed), shapes, mesh)
  # One device needs no mesh; with one the program would be another.
  return model, jax.tree.map(
    lambda a: jax.device_put(a, jax.devices()[0]), base
  )


def make(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
  """A step that is waited for; seconds to compile it, and its first loss."""
  quant = QuantSpec(double_quant=True) if args.packed else None
  model, base = loaded(args, quant)
  if args.adapter is None:
    base, trained = {}, jax.tree.map(lambda a: a.astype(jnp.float32), base)
  else:
    spec = AdapterSpec(args.adapter, rank=args.rank, alpha=args.alpha)
    init = functools.partial(init_adapter, jax.random.key(args.seed), spec=spec)
    trained = jax.jit(init)(base)
  optimizer = optax.adamw(1e-4)
  step = make_step(model, optimizer)
  tokens = np.random.default_rng(args.seed).integers(
    0, args.config['vocab_size'], (args.batch, args.sequence), np.int32
  )
  learned = np.arange(args.sequence) >= 1
  batch = Batches([Example(row, learned) for row in tokens], args.batch)[0]
  state = [trained, optimizer.init(trained)]
  fixed, key = jax.jit(norms)(base, trained), jax.random.key(0)
  began = time.perf_counter()
  program = step.lower(*state, base, fixed, batch, key).compile()
  seconds = time.perf_counter() - began

  def once() -> float:
    state[0], state[1], seen = program(*state, base, fixed, batch, key)
    return float(seen['loss'])

  return once, {'loss': once(), 'compile': seconds}


def peak() -> dict[str, int]:
  stats = jax.devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return {'peak': stats['peak_bytes_in_use']}
  return {'peak': turns.peak_memory()}


if __name__ == '__main__':
  args = argparse.Namespace(**json.loads(sys.argv[1]))
  # As the command line does.
  compiled.tidy()
  turns.serve(lambda: make(args), peak)
