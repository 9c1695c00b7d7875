"""The real bitsandbytes, PEFT and transformers, as functions on numpy.

Results are in our layout (kernels and adapters (in, out)) except where the
bytes themselves are the result; everything runs in float32 on CPU.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from bitsandbytes.functional import (
  QuantState,
  dequantize_4bit,
  dequantize_blockwise,
  quantize_4bit,
)
from torch import nn

from golden import weights

DTYPES = {
  'float32': torch.float32,
  'bfloat16': torch.bfloat16,
  'float16': torch.float16,
}
ALL_LINEARS = [name.split('.')[1] for name in weights.LINEARS.values()]


def versions() -> dict[str, str]:
  """The versions that made the values."""
  modules = (bnb, peft, torch, transformers, np)
  return {module.__name__: module.__version__ for module in modules}


@contextmanager
def quiet() -> Iterator[None]:
  """The strangers warn about themselves; our tests make warnings errors."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    yield


def to_bytes(tensor: torch.Tensor) -> np.ndarray:
  """A tensor's bytes, also of dtypes numpy does not know."""
  return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


# Adam


def adamw(
  start: np.ndarray, grads: np.ndarray, bits: int, **options: float
) -> dict[str, np.ndarray]:
  """bitsandbytes' AdamW of 8 or 32 bits: the parameter, and its last state."""
  kind = bnb.optim.AdamW8bit if bits == 8 else bnb.optim.AdamW32bit
  parameter = nn.Parameter(torch.from_numpy(start.copy()))
  optimizer = kind([parameter], **options)
  for grad in grads:
    parameter.grad = torch.from_numpy(grad.copy())
    optimizer.step()
  state = optimizer.state[parameter]
  keys = ('state1', 'state2', 'absmax1', 'absmax2')
  found = {key: state[key].numpy() for key in keys if key in state}
  return {'parameter': parameter.detach().numpy(), **found}


# NF4


def quantize(
  w_OxI: np.ndarray,
  block_size: int = 64,
  double_quant: bool = False,
  dtype: str = 'float32',
) -> tuple[torch.Tensor, QuantState]:
  """bitsandbytes' own quantized weight of the matrix cast to dtype."""
  w = torch.from_numpy(w_OxI).to(DTYPES[dtype])
  return quantize_4bit(
    w,
    blocksize=block_size,
    compress_statistics=double_quant,
    quant_type='nf4',
  )


def dequantize(
  packed: torch.Tensor, state: QuantState, dtype: str = 'float32'
) -> torch.Tensor:
  """bitsandbytes' dequantized weight [O, I], coming out in dtype."""
  before, state.dtype = state.dtype, DTYPES[dtype]
  try:
    return dequantize_4bit(packed, state)
  finally:
    state.dtype = before


def stored(packed: torch.Tensor, state: QuantState) -> dict[str, np.ndarray]:
  """What a checkpoint stores of a quantized weight, flat."""
  out = {'codes': to_bytes(packed), 'absmax': state.absmax.numpy()}
  if state.nested:
    out['nested'] = state.state2.absmax.numpy()
    out['offset'] = np.float32(state.offset.item())
  return out


def plain_absmax(state: QuantState) -> np.ndarray:
  """The float32 absmax of every block, read out of double quantization."""
  if not state.nested:
    return state.absmax.numpy()
  return (
    dequantize_blockwise(state.absmax, state.state2) + state.offset
  ).numpy()


# One adapted linear


class FixedMask(nn.Module):
  """Dropout that always drops the same entries."""

  def __init__(self, mask: np.ndarray, rate: float) -> None:
    super().__init__()
    self.mask = torch.from_numpy(mask.astype(np.float32))
    self.rate = rate

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x * self.mask / (1 - self.rate)


class OneLinear(nn.Module):
  """A model PEFT accepts that is one linear."""

  def __init__(self, proj: nn.Linear, four_bit: bool) -> None:
    super().__init__()
    self.proj = proj
    self.is_loaded_in_4bit = four_bit

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.proj(x)


def linear4bit(
  weight: np.ndarray,
  bias: np.ndarray | None,
  double_quant: bool,
  block_size: int = 64,
) -> nn.Linear:
  """bitsandbytes' NF4 linear computing in float32."""
  o, i = weight.shape
  layer = bnb.nn.Linear4bit(
    i,
    o,
    bias is not None,
    compute_dtype=torch.float32,
    compress_statistics=double_quant,
    quant_type='nf4',
  )
  layer.weight = bnb.nn.Params4bit(
    torch.from_numpy(weight),
    requires_grad=False,
    blocksize=block_size,
    compress_statistics=double_quant,
    quant_type='nf4',
    module=layer,
  )
  if bias is not None:
    layer.bias = nn.Parameter(torch.from_numpy(bias), requires_grad=False)
  return tell_the_truth(layer.to('cpu'))


def stored_linear(
  weight: np.ndarray, double_quant: bool, storage: str, dtype: str
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
  """What a checkpoint holds of a Linear4bit, and what it dequantizes to."""
  o, i = weight.shape
  options = {
    'compress_statistics': double_quant,
    'quant_type': 'nf4',
    'quant_storage': getattr(torch, storage),
  }
  layer = bnb.nn.Linear4bit(i, o, False, **options)
  w = torch.from_numpy(weight).to(DTYPES[dtype])
  layer.weight = bnb.nn.Params4bit(
    w, requires_grad=False, blocksize=64, module=layer, **options
  )
  layer.to('cpu')
  state = layer.weight.quant_state
  dense = dequantize(layer.weight.data, state)
  return layer.state_dict(), dense.numpy()


def tell_the_truth(model: nn.Module) -> nn.Module:
  """Keeps Linear4bit from repacking itself to bf16 on AVX512-BF16 CPUs."""
  for module in model.modules():
    if isinstance(module, bnb.nn.Linear4bit):
      module.support_avx512bf16_for_cpu = False
  return model


def linear(
  case: weights.LinearCase,
  *,
  method: str = 'lora',
  alpha: float = 8.0,
  nf4: bool = False,
  double_quant: bool = False,
  rslora: bool = False,
  mask: np.ndarray | None = None,
  rate: float = 0.0,
) -> dict[str, np.ndarray]:
  """PEFT's output and its gradients of sum(y * dy), in our layout.

  Keys: y, x, lora_a, lora_b and, for DoRA, magnitude.
  """
  dora = method == 'dora'
  if nf4:
    base = linear4bit(case.weight, case.bias, double_quant)
  else:
    o, i = case.weight.shape
    base = nn.Linear(i, o, bias=case.bias is not None)
    base.weight.data = torch.from_numpy(case.weight.copy())
    if case.bias is not None:
      base.bias.data = torch.from_numpy(case.bias.copy())
  config = peft.LoraConfig(
    r=case.lora_a.shape[1],
    lora_alpha=alpha,
    lora_dropout=rate,
    target_modules=['proj'],
    use_dora=dora,
    use_rslora=rslora,
  )
  with quiet():
    model = peft.get_peft_model(OneLinear(base, nf4), config)
  model.train()
  layer = model.base_model.model.proj
  expected = 'Linear4bit' if nf4 else 'Linear'
  assert type(layer).__name__ == expected, type(layer)
  lora_a = layer.lora_A['default'].weight
  lora_b = layer.lora_B['default'].weight
  lora_a.data = torch.from_numpy(case.lora_a.T.copy())
  lora_b.data = torch.from_numpy(case.lora_b.T.copy())
  if dora:
    magnitude = layer.lora_magnitude_vector['default'].weight
    magnitude.data = torch.from_numpy(case.magnitude.copy())
  if mask is not None:
    layer.lora_dropout['default'] = FixedMask(mask, rate)
  x = torch.from_numpy(case.x.copy()).requires_grad_()
  y = model(x)
  (y * torch.from_numpy(case.dy)).sum().backward()
  out = {
    'y': y.detach().numpy(),
    'x': x.grad.numpy(),
    'lora_a': lora_a.grad.numpy().T,
    'lora_b': lora_b.grad.numpy().T,
  }
  if dora:
    out['magnitude'] = magnitude.grad.numpy()
  return out


# Whole models


def load(
  folder: Path,
  *,
  four_bit: bool = False,
  double_quant: bool = False,
  skip: tuple[str, ...] = (),
  **kwargs: Any,
) -> nn.Module:
  """transformers' model of a Hugging Face folder, float32, perhaps NF4."""
  if four_bit:
    kwargs['quantization_config'] = transformers.BitsAndBytesConfig(
      load_in_4bit=True,
      bnb_4bit_quant_type='nf4',
      bnb_4bit_use_double_quant=double_quant,
      bnb_4bit_compute_dtype=torch.float32,
      llm_int8_skip_modules=['lm_head', *skip],
    )
  with quiet():
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, **kwargs
    )
  return tell_the_truth(model).eval()


def logits(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
  """Logits float32 [B, L, V]."""
  with torch.no_grad():
    return model(torch.from_numpy(tokens).long()).logits.numpy()


def gradient_norms(model: nn.Module, tokens: np.ndarray) -> dict[str, float]:
  """The norm of each parameter's gradient of the mean next-token loss."""
  ids = torch.from_numpy(tokens).long()
  out = model(ids).logits[:, :-1]
  loss = F.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())
  loss.backward()
  named = dict(model.named_parameters())
  norms = {name: p.grad.norm().item() for name, p in named.items()}
  model.zero_grad()
  return norms


def adapted(
  model: nn.Module, method: str, rank: int, alpha: float, seed: int = 0
) -> nn.Module:
  """PEFT over all seven linears, A from `weights.initial_a`, B zero."""
  config = peft.LoraConfig(
    r=rank,
    lora_alpha=alpha,
    target_modules=ALL_LINEARS,
    use_dora=method == 'dora',
    task_type='CAUSAL_LM',
  )
  with quiet():
    model = peft.get_peft_model(model, config)
  for name, parameter in model.named_parameters():
    if name.endswith('.lora_A.default.weight'):
      module = name.removeprefix('base_model.model.').split('.lora_A')[0]
      shape = parameter.shape[1], parameter.shape[0]
      a_IxR = weights.initial_a(module, shape, seed)
      parameter.data = torch.from_numpy(a_IxR.T.copy())
  return model


def curve(
  folder: Path,
  method: str,
  tokens: np.ndarray,
  *,
  rank: int,
  alpha: float,
  lr: float,
  double_quant: bool = False,
  skip: tuple[str, ...] = (),
) -> np.ndarray:
  """The losses of AdamW training, one per batch of tokens [steps, B, L].

  method is lora, dora, qlora or qdora; the loss is the mean cross-entropy of
  every next token; decay is .01 on everything trained; no schedule, no clip.
  """
  four_bit = method.startswith('q')
  model = load(folder, four_bit=four_bit, double_quant=double_quant, skip=skip)
  model = adapted(model, method.removeprefix('q'), rank, alpha)
  return losses_of(model, tokens, lr)


def losses_of(model: nn.Module, tokens: np.ndarray, lr: float) -> np.ndarray:
  """The losses of AdamW training of an adapted model, as `curve` tells."""
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
  )
  losses = []
  for batch in torch.from_numpy(tokens).long():
    out = model(batch).logits[:, :-1]
    loss = F.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
  return np.float64(losses)


def perturb(model: nn.Module, seed: int) -> nn.Module:
  """Moves PEFT's B and magnitudes off their initial values."""
  rng = np.random.RandomState(seed)
  for name, parameter in sorted(model.named_parameters()):
    if 'lora_B' in name or 'lora_magnitude' in name:
      step = rng.standard_normal(parameter.shape).astype(np.float32)
      parameter.data += 0.05 * torch.from_numpy(step)
  return model
