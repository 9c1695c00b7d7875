"""NF4 alone: quantize, dequantize, multiply, beside bitsandbytes and a copy.

  python experiments/benchmarks/nf4.py [--shapes 576x1536,...] [--rows 1,16,...]

Each work is done on several weights of one shape (I x O), more bytes than
caches hold where that is possible, one after the other, as a model does; times
are of one weight. Ours is one jitted program and waits at its end, torch is a
loop that waits at its end; on a GPU its launches count, as they do in a model,
and what kernels take without them is given, too.
float32 on a CPU, bfloat16 on a GPU; 'bitsandbytes, bfloat16' is what its layers
turn into on CPUs with AVX512-BF16 (weights repacked, scales and products in
bfloat16). Without torch and bitsandbytes (the extra `parity`) ours is measured
alone.

'of copy' is the bandwidth of the bytes that have to move, over the best copy of
a dense weight (bytes read and written): for a product of few rows, whose packed
weight is nearly all there is to move, it is the fraction of the 4-bit bandwidth
bound. The figures that decide whether XLA is good enough or a kernel has to be
written are printed last.
"""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
import result

from qdora_jax import nf4
from qdora_jax.linear import linear

# Kernels of SmolLM2-135M and of Llama-3-8B.
SHAPES = '576x1536,1536x576,4096x4096,4096x14336'
# Below these a kernel of our own would pay.
ENOUGH = {'dequantize': 0.8, 'product, M = 1': 0.6, 'product, M = 16': 0.6}
# By a profile of one call: launches and gaps do not count.
MS, OF = 'ms of GPU time', 'of copy, in GPU time'
# Rows from which on arithmetic takes longer than reading.
MANY = 256
TORCH = all(map(importlib.util.find_spec, ('torch', 'bitsandbytes')))


class Ours:
  """Weights of one shape, dense and packed, and what is done to them."""

  def __init__(self, dense: list[np.ndarray], double: bool, dtype: Any):
    self.host, self.double, self.dtype = dense[0], double, dtype
    self.dense = [jnp.asarray(w, dtype) for w in dense]
    quantize = jax.jit(nf4.quantize, static_argnums=(1, 2))
    self.packed = [quantize(w, 64, double) for w in self.dense]

  def copy(self) -> Callable[[], object]:
    return _waiting(lambda ws: [-w for w in ws], self.dense)

  def quantize(self) -> Callable[[], object]:
    return _waiting(
      lambda ws: [nf4.quantize(w, 64, self.double) for w in ws], self.dense
    )

  def quantize_host(self) -> None:
    """Of the first weight alone: it takes long."""
    nf4.quantize_host(self.host, 64, self.double)

  def dequantize(self) -> Callable[[], object]:
    return _waiting(
      lambda qs: [nf4.dequantize(q, self.dtype) for q in qs], self.packed
    )

  def product(self, x: np.ndarray, weights: list[Any]) -> Callable[[], object]:
    """x times each weight, one after the other."""

    def products(x: jax.Array, weights: list[Any]) -> list[jax.Array]:
      outs = []
      for w in weights:
        outs.append(linear(x, w))
        # What is next waits for it.
        x = x.at[0, 0].set(outs[-1][0, 0])
      return outs

    return _waiting(products, jnp.asarray(x, self.dtype), weights)


def _waiting(program: Callable, *args: Any) -> Callable[[], object]:
  """The jitted program, called and waited for."""
  program = jax.jit(program)
  return lambda: jax.block_until_ready(program(*args))


class Theirs:
  """The same by torch and bitsandbytes, on torch's transposes."""

  def __init__(self, dense: list[np.ndarray], double: bool, gpu: bool):
    import torch
    from bitsandbytes import functional

    self.torch, self.functional, self.double = torch, functional, double
    torch.set_num_threads(os.cpu_count())
    self.where = {
      'device': 'cuda' if gpu else 'cpu',
      'dtype': torch.bfloat16 if gpu else torch.float32,
    }
    self.repacks = not gpu and functional.has_avx512bf16()
    self.dense = [torch.from_numpy(w.T).to(**self.where) for w in dense]
    self.room = torch.empty_like(self.dense[0])
    self.packed = list(map(self._quantize, self.dense))

  def copy(self) -> None:
    for w in self.dense:
      self.room.copy_(w)
    self.wait()

  def quantize(self) -> None:
    for w in self.dense:
      self._quantize(w)
    self.wait()

  def dequantize(self) -> None:
    for w, state in self.packed:
      self.functional.dequantize_4bit(w, state)
    self.wait()

  def products(self, x: np.ndarray, count: int) -> dict[str, Callable]:
    """x times each weight, in all the ways there are."""
    import bitsandbytes

    linear, packed = self.torch.nn.functional.linear, self.packed[:count]
    x = self.torch.from_numpy(x).to(**self.where)

    def four_bits(w: tuple[Any, Any], x: Any = x) -> None:
      bitsandbytes.matmul_4bit(x, w[0], quant_state=w[1])

    ways = {
      'bitsandbytes': self._each(four_bits, packed),
      'dense, torch': self._each(lambda w: linear(x, w), self.dense[:count]),
    }
    if self.repacks and self.dense[0].shape[0] % 32 == 0:
      repack = self.functional._convert_weight_packed_for_cpu
      half = x.to(self.torch.bfloat16)
      ways['bitsandbytes, bfloat16'] = self._each(
        lambda w: four_bits(w, half),
        [repack(*self._quantize(w)) for w in self.dense[:count]],
      )
    return ways

  def _each(
    self, product: Callable[[Any], None], weights: list[Any]
  ) -> Callable[[], object]:
    @self.torch.inference_mode()
    def products() -> None:
      for w in weights:
        product(w)
      self.wait()

    return products

  def codes(self) -> np.ndarray:
    """Of the first weight, as ours are laid out: [I/2, O]."""
    w, state = self.packed[0]
    return w.view(self.torch.uint8).cpu().numpy().reshape(state.shape[0], -1).T

  def wait(self) -> None:
    if self.where['device'] == 'cuda':
      self.torch.cuda.synchronize()

  def _quantize(self, w: Any) -> tuple[Any, Any]:
    return self.functional.quantize_4bit(
      w, blocksize=64, compress_statistics=self.double, quant_type='nf4'
    )


class Way(NamedTuple):
  """One way of a work: a call, of so many weights, and what it has to move."""

  call: Callable[[], object]
  weights: int
  moved: int | None  # Bytes of a weight; None: arithmetic takes longer.


def measure(
  shape: tuple[int, int], counts: list[int], args: argparse.Namespace
) -> list[dict[str, Any]]:
  """The rows of one shape."""
  i, o = shape
  gpu = jax.default_backend() == 'gpu'
  dtype = jnp.dtype(jnp.bfloat16 if gpu else jnp.float32)
  number = math.ceil(args.megabytes * 1e6 / (i * o / 2))
  number = min(max(number, 2), args.weights)
  rng = np.random.default_rng(args.seed)
  dense = [
    0.02 * rng.standard_normal((o, i), np.float32).T for _ in range(number)
  ]
  ours = Ours(dense, args.double_quant, dtype)
  theirs = Theirs(dense, args.double_quant, gpu) if TORCH else None
  if theirs:
    same = (np.asarray(ours.packed[0].codes) == theirs.codes()).mean()
    # Its kernel for GPUs rounds by constants of its own.
    assert same == 1 or (gpu and same > 0.9999), f'{shape}: {same} of codes'
  whole, packed = i * o * dtype.itemsize, ours.packed[0].nbytes
  copies = {'JAX': Way(ours.copy(), number, 2 * whole)}
  if theirs:
    copies['torch'] = Way(theirs.copy, number, 2 * whole)
  rows = []
  taken = {}

  def add(work: str, ways: dict[str, Way]) -> None:
    every = copies | ways
    calls = {name: way.call for name, way in every.items()}
    seconds = {
      name: [t / every[name].weights for t in times]
      for name, times in result.interleave(
        calls, args.rounds, args.turn
      ).items()
    }
    copy = min((seconds[name] for name in copies), key=np.median)
    if gpu:
      new = ways if taken else every
      taken.update({n: result.busy(way.call) for n, way in new.items()})
    for name in ways if rows else every:
      times, moved = seconds[name], every[name].moved
      row = {
        'I x O': f'{i} x {o}',
        'work': work if name in ways else 'copy',
        'by': name if name in ways else f'dense, {name}',
        'ms': result.spread(times, 1e3),
        'GB/s': None,
        'of copy': None,
        'times as fast as bitsandbytes': None,
      }
      if moved:
        row['GB/s'] = result.spread([moved / t for t in times], 1e-9)
        row['of copy'] = result.ratio(copy, times, moved / (2 * whole))
      if gpu:
        own, best = taken[name], taken['JAX']
        own = own and own / every[name].weights
        row[MS] = own and result.spread([own], 1e3)
        row[OF] = None
        if own and best and moved:
          least = best / number * moved / (2 * whole)
          row[OF] = result.ratio([least], [own])
      if theirs and name in ('ours', 'ours, host'):
        beside = result.ratio(seconds['bitsandbytes'], times)
        row['times as fast as bitsandbytes'] = beside
      rows.append(row)
    print(f'{i} x {o}: {work}', file=sys.stderr, flush=True)

  # These read one form of a weight and write the other.
  for work in ('quantize', 'dequantize'):
    ways = {'ours': Way(getattr(ours, work)(), number, whole + packed)}
    if work == 'quantize':
      ways['ours, host'] = Way(ours.quantize_host, 1, whole + packed)
    if theirs:
      call = getattr(theirs, work)
      ways['bitsandbytes'] = Way(call, number, whole + packed)
    add(work, ways)
  for m in counts:
    x = rng.standard_normal((m, i), np.float32)
    count = number if m < MANY else 1
    calls = {
      'ours': ours.product(x, ours.packed[:count]),
      'dense, JAX': ours.product(x, ours.dense[:count]),
    }
    calls |= theirs.products(x, count) if theirs else {}
    thin = m * (i + o) * dtype.itemsize
    ways = {}
    for name, call in calls.items():
      moved = thin + (whole if 'dense' in name else packed)
      ways[name] = Way(call, count, moved if m < MANY else None)
    add(f'product, M = {m}', ways)
  return rows


def verdict(rows: list[dict[str, Any]]) -> list[str]:
  """Whether XLA is good enough, by the last shape measured."""
  shape = rows[-1]['I x O']
  lines = []
  for row in rows:
    if row['I x O'] == shape and row['by'] == 'ours' and row['work'] in ENOUGH:
      limit = ENOUGH[row['work']]
      got = (row.get(OF) or row['of copy'])['median']
      said = 'XLA is enough' if got >= limit else 'a kernel may pay'
      lines.append(
        f'{row["work"]}, {shape}: {got:.2f} of copy bandwidth, where '
        f'{limit:.2f} is asked for: {said}.'
      )
  return lines


def main() -> None:
  parser = result.parser(__doc__, rounds=5)
  parser.add_argument('--shapes', default=SHAPES, help='I x O; largest last')
  parser.add_argument('--rows', default='1,16,256,4096', help='M of products')
  parser.add_argument('--double-quant', type=int, default=1, help='0 or 1')
  parser.add_argument('--weights', type=int, default=16, help='at most')
  parser.add_argument(
    '--megabytes', type=float, default=None, help='of packed weights, at least'
  )
  parser.add_argument('--turn', type=float, default=0.1, help='seconds')
  args = parser.parse_args()
  args.double_quant = bool(args.double_quant)
  if args.megabytes is None:
    args.megabytes = 256 if jax.default_backend() == 'gpu' else 64
  counts = list(map(int, args.rows.split(',')))
  also = []
  if not TORCH:
    also.append('torch or bitsandbytes is not installed: ours alone.')
  if jax.default_backend() != 'gpu':
    also.append('These limits are for GPUs: no kernel is planned for a CPU.')
  rows = []
  for shape in args.shapes.split(','):
    i, o = map(int, shape.split('x'))
    rows += measure((i, o), counts, args)
    # After each shape: who stops it early has what was measured.
    what = 'NF4 of one weight: quantize, dequantize, product with M rows.'
    notes = verdict(rows) + also
    held = result.write('nf4', what, rows, args, 'of copy', notes)
  print(report.markdown(held))


if __name__ == '__main__':
  main()
