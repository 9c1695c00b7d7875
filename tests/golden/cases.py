"""What the golden files hold: the questions, shared by maker and tests."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from golden import weights

HERE = Path(__file__).parent


def sha(array: np.ndarray) -> str:
  """sha256 of an array's bytes in row-major order."""
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


class NF4Case(NamedTuple):
  """A matrix (out, in) and a block size that divides its in axis."""

  out: int
  into: int
  block_size: int

  @property
  def name(self) -> str:
    return f'{self.out}x{self.into}/{self.block_size}'

  def matrix(self) -> np.ndarray:
    seed = 0 if self.name == '256x128/64' else self.out + self.block_size
    return weights.matrix(seed, (self.out, self.into), 0.02)


# Every block size bitsandbytes knows, on shapes where one, some and many
# blocks make a row, and where the blocks of an output cross a nested block.
NF4 = [
  *(NF4Case(256, 128, b) for b in (32, 64, 128)),
  *(NF4Case(49, 192, b) for b in (32, 64)),
  *(NF4Case(24, 4096, 32 * 2**n) for n in range(8)),
  *(NF4Case(3, 8192, b) for b in (64, 2048)),
]


class LinearCase(NamedTuple):
  """A name, the shape of the linear, and what to make of it."""

  name: str
  options: dict[str, Any]
  bias: bool = True

  def inputs(self) -> weights.LinearCase:
    return weights.linear_case(100, 128, 48, 4, self.bias)


LINEAR = [
  LinearCase('lora', {'method': 'lora'}),
  LinearCase('dora', {'method': 'dora'}),
  LinearCase('dora_no_bias', {'method': 'dora'}, bias=False),
  LinearCase('dora_rslora', {'method': 'dora', 'rslora': True}),
  LinearCase('qlora', {'method': 'lora', 'nf4': True}),
  LinearCase('qdora', {'method': 'dora', 'nf4': True}),
  LinearCase(
    'qlora_double', {'method': 'lora', 'nf4': True, 'double_quant': True}
  ),
  LinearCase(
    'qdora_double', {'method': 'dora', 'nf4': True, 'double_quant': True}
  ),
]
LINEAR_ALPHA = 8.0


class StoredCase(NamedTuple):
  """A linear (out, in) as bitsandbytes stores it in a checkpoint."""

  name: str
  out: int
  into: int
  double_quant: bool = False
  storage: str = 'uint8'
  dtype: str = 'float32'

  def matrix(self) -> np.ndarray:
    return weights.matrix(300, (self.out, self.into), 0.02)


STORED = [
  StoredCase('plain', 32, 128),
  StoredCase('nested', 96, 320, double_quant=True),
  StoredCase('bfloat16', 32, 128, storage='bfloat16', dtype='bfloat16'),
  StoredCase('float16', 32, 128, True, storage='float16', dtype='float16'),
  StoredCase('float32', 32, 128, True, storage='float32'),
  StoredCase('float64', 32, 128, True, storage='float64'),
  StoredCase('int8', 32, 128, storage='int8'),
  # Blocks of 64 over rows of 96.
  StoredCase('straddling', 64, 96),
  StoredCase('straddling_nested', 64, 96, double_quant=True),
]

# The tiny llamas and their training.
SEED = 7
LAYERS = 3
LLAMAS = {'tied': True, 'untied': False}
RANK, ALPHA, LR = 4, 8.0, 3e-3
CURVES = {
  'lora': ('lora', False),
  'dora': ('dora', False),
  'qlora': ('qlora', False),
  'qdora': ('qdora', False),
  'qlora_double': ('qlora', True),
  'qdora_double': ('qdora', True),
}


def prompt() -> np.ndarray:
  """Tokens [2, 16] whose logits are kept."""
  return weights.batches(1, 256, 1, 2, 16)[0]


def tokens() -> np.ndarray:
  """Twenty batches [20, 4, 32], two of them in turns."""
  return weights.batches(2, 256, 20, 4, 32, distinct=2)


def modules() -> list[tuple[int, str]]:
  """Every (layer, linear) of a tiny llama."""
  return [(n, name) for n in range(LAYERS) for name in weights.LINEARS]


# 8-bit AdamW: arrays whose blocks lie in rows and across them, and a small one.
ADAM8 = {'rows': (16, 256), 'across': (61, 77), 'small': (10, 20)}
ADAM8_STEPS = 10
ADAM8_OPTIONS = {'lr': 1e-2, 'weight_decay': 0.1}


def adam8(name: str) -> tuple[np.ndarray, np.ndarray]:
  """A parameter, and a gradient for every step; columns of unequal sizes."""
  shape = ADAM8[name]
  start = weights.matrix(400, shape, 1.0)
  sizes = np.float32(10.0) ** np.linspace(-3, 0, shape[1], dtype=np.float32)
  grads = [
    weights.matrix(401 + n, shape, 1.0) * sizes for n in range(ADAM8_STEPS)
  ]
  return start, np.stack(grads)
