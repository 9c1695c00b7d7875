"""The same model by transformers, PEFT and bitsandbytes (the extra `parity`).

Threads are as many as cores. On CPUs with AVX512-BF16 bitsandbytes' layers turn
themselves to bfloat16 at their first forward pass; here they are kept from it,
so that both sides compute alike. PEFT's DoRA is given its cache of norms
(peft.helpers.DoraCaching), without which it takes longer.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import peft
import torch
import transformers
from peft.helpers import DoraCaching

torch.set_num_threads(os.cpu_count())
transformers.logging.set_verbosity_error()
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def read(
  folder: Path, adapters: Mapping[str, Path], dtype: str
) -> peft.PeftModel:
  """A Hugging Face directory, 4-bit or not, with PEFT's adapters by name."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype), device_map=DEVICE
  )
  (first, where), *rest = adapters.items()
  with warnings.catch_warnings(action='ignore'):
    model = peft.PeftModel.from_pretrained(model, where, adapter_name=first)
    for name, where in rest:
      model.load_adapter(where, name)
  return _ready(model)


def random(
  config: Mapping[str, Any],
  four_bits: bool,
  adapters: Mapping[str, Mapping[str, Any]],
  dtype: str,
) -> peft.PeftModel:
  """Random weights, made on the device.

  Args:
    config: fields of a config.json.
    four_bits: linear layers, but for the head, are doubly quantized NF4.
    adapters: by name what LoraConfig takes.
    dtype: of weights and products.
  """
  model = _random(config, four_bits, dtype)
  (first, options), *rest = adapters.items()
  with warnings.catch_warnings(action='ignore'):
    model = peft.get_peft_model(model, peft.LoraConfig(**options), first)
    for name, options in rest:
      model.add_adapter(name, peft.LoraConfig(**options))
  return _ready(model)


def trainer(
  source: Path | Mapping[str, Any],
  four_bits: bool,
  adapter: Mapping[str, Any] | None,
  dtype: str,
  tokens: np.ndarray,
  checkpointing: bool,
) -> Callable[[], float]:
  """A step of AdamW that gives its loss, the mean of every next token's.

  Args:
    source: a Hugging Face directory, or a config.json's fields.
    four_bits: see `random`.
    adapter: what LoraConfig takes; None trains everything.
    dtype: of weights and products.
    tokens: [B, L].
    checkpointing: layers are computed again in the backward pass.
  """
  if isinstance(source, Path):
    model = _stored(source, four_bits, dtype)
  else:
    model = _random(source, four_bits, dtype)
  _exact(model)
  if adapter is not None:
    with warnings.catch_warnings(action='ignore'):
      model = peft.get_peft_model(model, peft.LoraConfig(**adapter))
  if checkpointing:
    model.gradient_checkpointing_enable({'use_reentrant': False})
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)
  ids = torch.as_tensor(tokens, dtype=torch.long, device=DEVICE)

  def step() -> float:
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.item()

  return step


def generate(
  model: peft.PeftModel, adapter: str | None, prompts: Any, count: int
) -> list[list[int]]:
  """So many likeliest tokens behind each prompt; None: without an adapter."""
  if adapter is not None and model.active_adapter != adapter:
    model.set_adapter(adapter)
  tokens = torch.as_tensor(prompts, device=DEVICE)
  options = {
    'input_ids': tokens,
    # Else a token that is the padding's, too, would be taken for padding.
    'attention_mask': torch.ones_like(tokens),
    'max_new_tokens': count,
    'do_sample': False,
    'use_cache': True,
  }
  with torch.inference_mode(), DoraCaching():
    if adapter is None:
      with model.disable_adapter():
        out = model.generate(**options)
    else:
      out = model.generate(**options)
  return out[:, tokens.shape[1] :].tolist()


def _stored(folder: Path, four_bits: bool, dtype: str) -> torch.nn.Module:
  """A directory of full precision, packed while it is read."""
  kind, options = getattr(torch, dtype), {}
  if four_bits:
    options['quantization_config'] = transformers.BitsAndBytesConfig(
      load_in_4bit=True,
      bnb_4bit_quant_type='nf4',
      bnb_4bit_use_double_quant=True,
      bnb_4bit_compute_dtype=kind,
      llm_int8_skip_modules=['lm_head'],
    )
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=kind, device_map=DEVICE, **options
  )


def _random(
  config: Mapping[str, Any], four_bits: bool, dtype: str
) -> torch.nn.Module:
  """Random weights in a config's shapes, packed or not."""
  fields = {k: v for k, v in config.items() if k != 'model_type'}
  made = transformers.AutoConfig.for_model(config['model_type'], **fields)
  with torch.device(DEVICE):
    model = transformers.AutoModelForCausalLM.from_config(
      made, dtype=getattr(torch, dtype)
    )
  if four_bits:
    _quantize(model, getattr(torch, dtype))
  return model


def _exact(model: torch.nn.Module) -> None:
  """Keeps bitsandbytes' layers from turning to bfloat16 on a CPU."""
  for module in model.modules():
    if isinstance(module, bitsandbytes.nn.Linear4bit):
      module.support_avx512bf16_for_cpu = False


def _ready(model: peft.PeftModel) -> peft.PeftModel:
  """For inference, with no token that ends a text early."""
  _exact(model)
  said = model.generation_config
  said.eos_token_id, said.pad_token_id = None, 0
  return model.eval()


def _quantize(model: torch.nn.Module, dtype: torch.dtype) -> None:
  """Puts a Linear4bit in each linear layer's place but the head's."""
  linears: Sequence[tuple[str, Any]] = [
    (name, module)
    for name, module in model.named_modules()
    if isinstance(module, torch.nn.Linear) and name != 'lm_head'
  ]
  for name, old in linears:
    # Else it draws numbers on the CPU that nobody wants.
    with torch.device('meta'):
      new = bitsandbytes.nn.Linear4bit(
        old.in_features, old.out_features, False, dtype, True, 'nf4'
      )
    new.weight = bitsandbytes.nn.Params4bit(
      old.weight.data,
      requires_grad=False,
      compress_statistics=True,
      quant_type='nf4',
      module=new,
    )
    parent, _, last = name.rpartition('.')
    setattr(model.get_submodule(parent), last, new.to(DEVICE))
  model.is_loaded_in_4bit = True
  if DEVICE == 'cuda':
    torch.cuda.empty_cache()  # Others measure here, too.
