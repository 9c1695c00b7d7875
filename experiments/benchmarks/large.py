"""QDoRA on a large model's shapes, with random weights: memory beside the plan.

  python experiments/benchmarks/large.py llama-3-8b 2048
  python experiments/benchmarks/large.py llama-65b 512
  python experiments/benchmarks/large.py llama-3-70b 512

Weights are drawn in NF4 on the devices: no full-precision kernel ever exists,
and nothing is read. Takes a few steps of one row a device, all devices in one
fsdp axis, products in bfloat16, rank 16 on all linear layers, AdamW. Says and
keeps the device's real peak, the plan's, and the median step; a CPU has no peak
of its own, there it only shows that it runs (`tiny 64`).
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import result

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  init_adapter,
  norms,
  quantize,
  rope,
  sharding,
  train,
)
from qdora_jax.job import Job
from qdora_jax.model import Decoder, LayerKind, ModelConfig
from qdora_jax.plan import plan
from qdora_jax.published import model_config
from qdora_jax.step import make_step

TINY = ModelConfig(
  vocab=512,
  width=128,
  ff=256,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=32,
  kinds=(LayerKind(rope.plain(1e4, 32)),) * 2,
  tied=False,
)


def drawn(key: jax.Array, abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """Random values for a tree of shapes, on the mesh.

  Bytes are uniform: codes of NF4 are then nearly normal weights. What is
  float32 are scales, and small; what is in half precision is normal.
  """
  places = sharding.shardings(abstract, mesh)
  leaves, structure = jax.tree.flatten(abstract)
  keys = jax.random.split(key, len(leaves))

  def draw(key: jax.Array, like: Any) -> jax.Array:
    if like.dtype == jnp.uint8:
      return jax.random.bits(key, like.shape, jnp.uint8)
    if like.dtype == jnp.float32:
      return jnp.full(like.shape, 0.02, like.dtype)
    return 0.02 * jax.random.normal(key, like.shape, like.dtype)

  arrays = [
    jax.jit(draw, static_argnums=1, out_shardings=place)(key, like)
    for key, like, place in zip(
      keys, leaves, jax.tree.leaves(places), strict=True
    )
  ]
  return sharding.gathering(jax.tree.unflatten(structure, arrays), mesh)


def run(
  name: str, length: int, rounds: int = 5, seed: int = 0
) -> dict[str, Any]:
  """The measurement: a step that compiles, and so many rounds of one."""
  config = TINY if name == 'tiny' else model_config(name)
  mesh = sharding.make_mesh()
  rows, spec, dtype = mesh.size, AdapterSpec('dora', rank=16), jnp.bfloat16
  model = Decoder(config, dtype, 'block', mesh)
  one = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), one)['params']
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), shapes)
  shapes = jax.eval_shape(lambda p: quantize(p, QuantSpec()), shapes)
  base = drawn(jax.random.key(seed), shapes, mesh)
  # One program: on many devices, and without a copy of any kernel.
  make = jax.jit(lambda base: init_adapter(jax.random.key(1), base, spec))
  trained = sharding.shard(make(base), mesh)
  optimizer = optax.adamw(1e-4)
  state = train.initial_state(trained, optimizer, 0, mesh)
  trained, moments = state['trained'], state['optimizer']
  fixed = jax.jit(norms)(base, trained)
  step = make_step(model, optimizer, like=(trained, moments))
  draw = np.random.RandomState(seed)
  tokens = draw.randint(0, config.vocab, (rows, length)).astype(np.int32)
  places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  batch = sharding.shard_batch(
    {
      'tokens': tokens,
      'positions': places,
      'segments': np.ones_like(tokens),
      'loss_at': places[:, :-1],
      'labels': tokens[:, 1:],
      'weights': np.ones((rows, length - 1), np.float32),
    },
    mesh,
  )
  seconds, losses = [], []
  for n in range(1 + rounds):
    began = time.perf_counter()
    trained, moments, seen = step(
      *(trained, moments, base, fixed, batch), jax.random.key(n)
    )
    losses.append(float(seen['loss']))
    seconds.append(time.perf_counter() - began)
  job = Job(
    config,
    QuantSpec(),
    spec,
    batch=rows,
    seq_len=length,
    learned=length - 1,
    fsdp=mesh.size,
  )
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = stats['peak_bytes_in_use'] if 'peak_bytes_in_use' in stats else None
  each = statistics.median(seconds[1:])
  return {
    'model': name,
    'tokens': rows * length,
    'losses': losses,
    'seconds_to_compile': round(seconds[0], 2),
    'seconds': seconds[1:],
    'seconds_per_step': round(each, 4),
    'tokens_per_second': round(rows * length / each, 1),
    'peak_bytes': peak,
    'planned_bytes': plan(job).total,
    'planned': dict(plan(job).memory),
  }


def main() -> None:
  parser = result.parser(__doc__, rounds=5)
  parser.add_argument('model', nargs='?', default='tiny')
  parser.add_argument('length', type=int, nargs='?', default=64)
  args = parser.parse_args()
  got = run(args.model, args.length, args.rounds, args.seed)
  peak, planned = got['peak_bytes'], got['planned_bytes']
  speeds = [got['tokens'] / t for t in got['seconds']]
  row = {
    'model': args.model,
    'tokens a step': got['tokens'],
    's a step': result.spread(got['seconds']),
    'tokens/s': result.spread(speeds),
    's to compile': got['seconds_to_compile'],
    'peak, GB': peak and peak / 1e9,
    'planned, GB': planned / 1e9,
    'peak of planned': peak and peak / planned,
    'last loss': got['losses'][-1],
  }
  parts = [f'{part} {n / 1e9:.2f}' for part, n in got['planned'].items()]
  notes = [f'Planned, GB: {", ".join(parts)}.']
  if peak is None:
    notes.append('This device says no peak: nothing is compared.')
  what = 'QDoRA on random weights: memory beside the plan.'
  held = result.write(f'large-{args.model}', what, [row], args, notes=notes)
  print(report.markdown(held))


if __name__ == '__main__':
  main()
