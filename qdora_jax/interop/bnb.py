"""bitsandbytes' 4-bit weights, as transformers stores them in safetensors.

A quantized linear is several tensors (bitsandbytes functional.py, QuantState):

  X.weight            the codes, two a byte, of the flattened (out, in) matrix;
                      as bytes [n, 1], or the same bytes called another dtype
                      (quant_storage, for FSDP)
  X.weight.absmax     f32 [blocks], or u8 if nested
  X.weight.quant_map  f32 [16], the levels
  X.weight.nested_absmax, X.weight.nested_quant_map      if nested
  X.weight.quant_state.bitsandbytes__nf4                 JSON in bytes: the rest

When block_size divides the in axis these are our codes and absmax, transposed.
When it does not, its blocks run over from one output into the next: our layout
has no place for that, and the weight is read in full precision.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qdora_jax import nf4
from qdora_jax.nf4 import NF4Array

_STATE = '.quant_state.bitsandbytes__'
_PARTS = ('absmax', 'quant_map', 'nested_absmax', 'nested_quant_map')
# Of the JSON we write; blanks at its end mean nothing.
_STATE_BYTES = 256
# What follows a quantized tensor's name in a file.
SUFFIXES = (*(f'.{part}' for part in _PARTS), f'{_STATE}nf4', f'{_STATE}fp4')


@dataclasses.dataclass(frozen=True)
class Stored:
  """How one weight is stored.

  Attributes:
    shape: (out, in).
    block_size: weights that share one absmax.
    nested_block_size: blocks that share one nested scale; 0 if not nested.
    offset: the mean absmax, if nested.
  """

  shape: tuple[int, int]
  block_size: int
  nested_block_size: int = 0
  offset: float = 0.0

  @property
  def double_quant(self) -> bool:
    return self.nested_block_size > 0

  @property
  def straddles(self) -> bool:
    """Whether blocks run over from one output into the next."""
    return self.shape[1] % self.block_size != 0


def find(names: Mapping[str, Any]) -> dict[str, str]:
  """{weight's name: name of its state} among the tensors of a checkpoint."""
  return {n.split(_STATE)[0]: n for n in names if _STATE in n}


def state(name: str, raw: np.ndarray, where: str) -> Stored:
  """Reads the state of one weight.

  Args:
    name: of its state's tensor.
    raw: the tensor: JSON in bytes.
    where: the checkpoint, for messages.

  Raises:
    ValueError: if it is not NF4, or not what bitsandbytes writes.
  """
  kind = name.split(_STATE)[1]
  if kind != 'nf4':
    raise ValueError(
      f'{where}: {name.split(_STATE)[0]} is stored as {kind}; expected nf4. '
      'Quantize the model again with bnb_4bit_quant_type="nf4", or load its '
      'unquantized checkpoint'
    )
  try:
    values = json.loads(raw.tobytes().decode('utf-8'))
    shape, block = tuple(values['shape']), values['blocksize']
    nested = values['nested_blocksize'] if 'nested_blocksize' in values else 0
    offset = float(values['nested_offset']) if nested else 0.0
    whole = (*shape, block, nested)
    if len(shape) != 2 or any(type(n) is not int or n < 0 for n in whole):
      raise ValueError(f'shape {shape}, blocksize {block}')
    if not math.prod(shape) or block < 2 or not math.isfinite(offset):
      raise ValueError(f'shape {shape}, blocksize {block}, offset {offset}')
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(
      f'{where}: {name} does not say how its weight is stored ({error!r}); '
      'copy or download the checkpoint again'
    ) from error
  return Stored(shape, block, nested, offset)


def read(
  name: str, stored: Stored, get: Callable[[str], np.ndarray], where: str
) -> NF4Array:
  """One weight as host arrays: kernel [I, O], or if it straddles [I * O, 1].

  Args:
    name: of the weight.
    stored: what `state` gave.
    get: gives a tensor by its name.
    where: the checkpoint, for messages.

  Raises:
    ValueError: if a part is absent or of another size than the state says, or
      the levels are not NF4's.
  """
  o, i = (1, math.prod(stored.shape)) if stored.straddles else stored.shape
  blocks = -(-o * i // stored.block_size)
  if o * i % stored.block_size:
    raise ValueError(
      f'{where}: {name} of shape {stored.shape} ends within a block of '
      f'{stored.block_size}; expected whole blocks. Load the unquantized model'
    )

  def part(suffix: str, size: int, dtype: Any) -> np.ndarray:
    try:
      raw = np.ascontiguousarray(get(f'{name}{suffix}')).reshape(-1)
    except KeyError:
      raise ValueError(
        f'{where}: {name} is stored in 4 bits, and {name}{suffix} is missing; '
        'are all its files there?'
      ) from None
    array = raw.view(np.uint8) if not suffix else raw
    if array.size != size or array.dtype != dtype:
      raise ValueError(
        f'{where}: {name}{suffix} holds {array.size} of {array.dtype}; '
        f'expected {size} of {np.dtype(dtype)}'
      )
    return array

  codes = part('', o * i // 2, np.uint8)
  if not np.array_equal(part('.quant_map', 16, np.float32), nf4.LEVELS):
    raise ValueError(f'{where}: {name}.quant_map is not the NF4 code book')
  nested = None
  if stored.double_quant:
    if stored.nested_block_size != nf4.NESTED_BLOCK:
      raise ValueError(
        f'{where}: {name}: nested_blocksize={stored.nested_block_size}: '
        f'expected {nf4.NESTED_BLOCK}'
      )
    levels = part('.nested_quant_map', 256, np.float32)
    if not np.array_equal(levels, nf4.DYNAMIC_MAP):
      raise ValueError(
        f'{where}: {name}.nested_quant_map is not the dynamic map'
      )
    count = -(-blocks // nf4.NESTED_BLOCK)
    nested = part('.nested_absmax', count, np.float32)
  absmax = part('.absmax', blocks, np.float32 if nested is None else np.uint8)
  return NF4Array(
    np.ascontiguousarray(codes.reshape(o, i // 2).T),
    np.ascontiguousarray(absmax.reshape(o, i // stored.block_size).T),
    nested,
    None if nested is None else np.float32(stored.offset),
    stored.block_size,
  )


def write(name: str, q: NF4Array, dtype: str) -> dict[str, np.ndarray]:
  """The tensors that stand for one kernel [I, O].

  Args:
    name: of the weight.
    q: one layer's.
    dtype: what bitsandbytes dequantizes to: 'float32', 'bfloat16', 'float16'.
  """
  i, o = q.shape
  values = {
    'quant_type': 'nf4',
    'blocksize': q.block_size,
    'dtype': dtype,
    'shape': [o, i],
  }
  tensors = {
    '': np.asarray(q.codes).T.reshape(-1, 1),
    '.absmax': np.asarray(q.absmax).T.reshape(-1),
    '.quant_map': nf4.LEVELS,
  }
  if q.nested is not None:
    tensors['.nested_absmax'] = np.asarray(q.nested)
    tensors['.nested_quant_map'] = nf4.DYNAMIC_MAP
    values |= {
      'nested_blocksize': nf4.NESTED_BLOCK,
      'nested_dtype': 'float32',
      'nested_offset': float(q.offset),
    }
  # Of one length, whatever the offset: sizes are known before values.
  text = json.dumps(values).encode().ljust(_STATE_BYTES)
  tensors[f'{_STATE}nf4'] = np.frombuffer(text, np.uint8)
  return {
    f'{name}{suffix}': np.ascontiguousarray(tensor)
    for suffix, tensor in tensors.items()
  }


def config(
  double_quant: bool, dtype: str, dense: Sequence[str] = ()
) -> dict[str, Any]:
  """config.json's quantization_config of such a checkpoint.

  Args:
    double_quant: whether any absmax is nested.
    dtype: of products.
    dense: modules of layers that are not in 4 bits. Told none, transformers
      takes all but the head for quantized.
  """
  return {
    'quant_method': 'bitsandbytes',
    'load_in_4bit': True,
    'load_in_8bit': False,
    'bnb_4bit_quant_type': 'nf4',
    'bnb_4bit_use_double_quant': double_quant,
    'bnb_4bit_compute_dtype': dtype,
    'bnb_4bit_quant_storage': 'uint8',
    'llm_int8_skip_modules': [*dense, 'lm_head'] if dense else None,
  }


def check_config(values: Any, where: str) -> None:
  """Raises ValueError for a quantization other than bitsandbytes' 4 bits."""
  if not isinstance(values, dict):
    raise ValueError(
      f'{where}: quantization_config={str(values)[:60]!r}: expected {{...}}'
    )
  method = values['quant_method'] if 'quant_method' in values else None
  four = 'load_in_4bit' in values and values['load_in_4bit']
  if method == 'bitsandbytes' and four:
    return
  if method == 'bitsandbytes':
    method = 'bitsandbytes without load_in_4bit'
  raise ValueError(
    f'{where}: quantization_config: quant_method {method!r} is not supported; '
    "supported: 'bitsandbytes' with load_in_4bit (NF4). Load the unquantized "
    'checkpoint: config.quant quantizes it'
  )
