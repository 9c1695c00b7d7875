"""Quantizing on the host: ours against bitsandbytes' CPU quantizer.

  python experiments/benchmarks/quantize_host.py    (needs the extra `parity`)

Same weights, one process, in turns; medians and the median of paired ratios.
"""

import statistics
import time
from collections.abc import Callable

import bitsandbytes.functional
import numpy as np
import torch

from qdora_jax import nf4


def seconds(f: Callable[[], object]) -> float:
  start = time.perf_counter()
  f()
  return time.perf_counter() - start


def main(rounds: int = 9) -> None:
  draw = np.random.RandomState(0).standard_normal
  print('weight (out, in)   double   ours M/s   bitsandbytes M/s   ratio')
  for shape in ((1536, 576), (4096, 4096)):
    w = draw(shape).astype(np.float32)
    tensor = torch.from_numpy(w)
    for double in (False, True):

      def ours(w=w, double=double):
        nf4.quantize_host(w.T, 64, double)

      def theirs(tensor=tensor, double=double):
        bitsandbytes.functional.quantize_4bit(
          tensor,
          blocksize=64,
          compress_statistics=double,
          quant_type='nf4',
        )

      ours(), theirs()
      pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
      mine, other = (statistics.median(t) for t in zip(*pairs, strict=True))
      ratio = statistics.median(b / a for a, b in pairs)
      print(
        f'{shape!s:<18} {double!s:<7} {w.size / mine / 1e6:9.0f} '
        f'{w.size / other / 1e6:18.0f} {ratio:8.1f}'
      )


if __name__ == '__main__':
  main()
