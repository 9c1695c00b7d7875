"""Adapters taken out of the weights: PiSSA, OLoRA, LoftQ.

All three start from A and B that are not zero together, and from a base that is
what they leave of the weight, so that the whole still is the model:

  PiSSA  A, B are the R largest singular directions of W; base = W - s A B
         (arXiv 2404.02948)
  OLoRA  B^T, A^T are the first R columns of Q and rows of R in W^T = Q R;
         base = W - s A B (arXiv 2406.01775)
  LoftQ  A, B are the R largest directions of what quantizing loses: base =
         nf4(W - s A B) and A, B from W - base in turns (arXiv 2310.08659)

With a quantized base, PiSSA and OLoRA quantize the rest (QPiSSA). PEFT's LoftQ
leaves s out of its residual and so starts from a worse model unless alpha = R;
here s is in it. Each runs on one kernel at a time, on the host.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

# LoftQ's default in its paper's code; PEFT's is 1.
LOFTQ_TURNS = 5


def split(
  w_IxO: np.ndarray,
  init: str,
  rank: int,
  scale: float,
  store: Callable[[np.ndarray], tuple[Any, np.ndarray]],
) -> tuple[Any, np.ndarray, np.ndarray]:
  """A weight as base + s A B.

  Args:
    w_IxO: kernel.
    init: 'pissa', 'olora' or 'loftq'.
    rank: R.
    scale: s.
    store: makes the stored base of a dense one, and gives it with the float32
      values that it stands for.

  Returns:
    (stored base, A [I, R], B [R, O]), A and B float32.
  """
  w = np.asarray(w_IxO, np.float32)
  if init == 'loftq':
    rest = w
    for _ in range(LOFTQ_TURNS):
      base, values = store(rest)
      a, b = _largest((w - values) / scale, rank)
      rest = w - scale * (a @ b)
    return base, a, b
  a, b = _largest(w / scale, rank) if init == 'pissa' else _qr(w, rank)
  base, _ = store(w - scale * (a @ b))
  return base, a, b


def _largest(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """A and B of the nearest matrix of that rank, its weight shared evenly."""
  u, s, vt = np.linalg.svd(w, full_matrices=False)
  root = np.sqrt(s[:rank])
  return u[:, :rank] * root, root[:, None] * vt[:rank]


def _qr(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """PEFT's choice: of the QR decomposition of the (out, in) matrix."""
  q, r = np.linalg.qr(w.T)
  return r[:rank].T, q[:, :rank].T
