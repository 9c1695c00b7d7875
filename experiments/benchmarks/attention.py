"""Attention's forms side by side: all scores at once, in chunks, cuDNN's.

  python experiments/benchmarks/attention.py [ROUNDS] [LENGTH ...]

Forward and backward of one layer of SmolLM2-135M's heads (9 over 3 of 64),
packed rows of about 4,096 tokens together: of one text each, and of eight. In
float32 on a CPU, in bfloat16 on a GPU. One process, in turns; medians, and the
median of each round's ratio to the plain form, with the least and the largest.
The plain form is left out where its scores would take more than 4 GB.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax.attention import attention, best, fused
from qdora_jax.sight import best_chunk, look

LENGTHS = (128, 256, 1024, 4096, 16384)
HEADS, KV_HEADS, WIDTH = 9, 3, 64
TOKENS = 4096
LARGEST = 4e9


def runner(form: str, length: int, texts: int) -> Callable[[], None]:
  """A function that runs attention and its gradients, and waits for them."""
  on_cpu = jax.default_backend() == 'cpu'
  rows = max(1, TOKENS // length)
  draw = np.random.RandomState(0)
  q, k, v, dy = (
    jnp.asarray(
      draw.standard_normal((rows, length, heads, WIDTH)),
      jnp.float32 if on_cpu else jnp.bfloat16,
    )
    for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
  )
  each = -(-length // texts)
  place = np.arange(length, dtype=np.int32)
  places = jnp.asarray(np.tile(place % each, (rows, 1)))
  segments = jnp.asarray(np.tile(place // each, (rows, 1)))

  @jax.jit
  def run(q, k, v, dy, places, segments):
    seen = look(places, places, segments, segments)
    f = functools.partial(attention, sight=seen, form=form)
    y, pull = jax.vjp(f, q, k, v)
    return y, *pull(dy)

  def once() -> None:
    jax.block_until_ready(run(q, k, v, dy, places, segments))

  once()
  return once


def forms(length: int) -> list[str]:
  """Those that are there for rows of so many tokens."""
  rows = max(1, TOKENS // length)
  found = ['plain'] if 4 * rows * HEADS * length**2 <= LARGEST else []
  found.append('flash')
  q = jax.ShapeDtypeStruct((rows, length, HEADS, WIDTH), jnp.bfloat16)
  return [*found, 'auto'] if fused(q, length, None) else found


def main(rounds: int = 5, *lengths: int) -> None:
  device = jax.devices()[0].device_kind
  chunk = best_chunk(jax.default_backend())
  print(f'{device}, JAX {jax.__version__}, chunks of {chunk}')
  print('tokens  texts  form       median s   of plain (least, largest)')
  for length in lengths or LENGTHS:
    for texts in (1, 8):
      runs = {form: runner(form, length, texts) for form in forms(length)}
      seconds: dict[str, list[float]] = {form: [] for form in runs}
      for _ in range(rounds):
        for form, once in runs.items():
          began = time.perf_counter()
          once()
          seconds[form].append(time.perf_counter() - began)
      for form, times in seconds.items():
        line = f'{length:6} {texts:6}  {"cudnn" if form == "auto" else form:7}'
        line += f'{statistics.median(times):12.3f}'
        if form != 'plain' and 'plain' in seconds:
          pairs = zip(times, seconds['plain'], strict=True)
          ratios = sorted(a / b for a, b in pairs)
          middle = statistics.median(ratios)
          line += f'{middle:11.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})'
        taken = form == 'auto' or form == best(
          length, length, jax.default_backend()
        )
        print(line + (' *' if taken and 'auto' not in seconds else ''))
  print('* what attention takes by itself')


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
