"""Writes the committed golden files from the real libraries.

Run in an environment with the `parity` extra, from the repository root:

    PYTHONPATH=tests python -m golden.make

Takes some three minutes on two cores. The files are

  nf4.json, nf4.npz            sha256 of bitsandbytes' bytes, double-quantized
                               absmax
  bnb.safetensors, bnb.npz     linears as bitsandbytes stores them; dequantized
  linear.npz                   PEFT's outputs and gradients
  adam8bit.npz                 bitsandbytes' AdamW after ten steps
  llama.json, llama.npz        transformers' logits, AdamW curves, PEFT's files
  families.json, families.npz  gradient norms and logits of every model family;
                               logits of what a GGUF file can tell of it

Each JSON carries the versions that made it; `cases.py` and `families.py` say
what is asked.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import create_dynamic_map
from safetensors import safe_open
from safetensors.torch import save_file

from golden import cases, families, strangers, weights

HERE = Path(__file__).parent
COMMAND = 'PYTHONPATH=tests python -m golden.make'


def write(name: str, content: dict[str, Any]) -> None:
  """Writes a JSON file headed by how it was made."""
  made = {'command': COMMAND, 'versions': strangers.versions()}
  text = json.dumps({'made': made, **content}, indent=1)
  (HERE / name).write_text(text + '\n')


def nf4() -> None:
  """Hashes of codes, absmax and dequantized weights, per shape and block."""
  hashes: dict[str, Any] = {}
  arrays: dict[str, np.ndarray] = {}
  for case in cases.NF4:
    w_OxI = case.matrix()
    q = strangers.quantize(w_OxI, case.block_size)
    entry = {k: cases.sha(v) for k, v in strangers.stored(*q).items()}
    for dtype in strangers.DTYPES:
      w = strangers.dequantize(*q, dtype)
      entry[dtype] = cases.sha(strangers.to_bytes(w))
    hashes[case.name] = entry
    for dtype in ('bfloat16', 'float16'):  # of a weight already in dtype
      q = strangers.quantize(w_OxI, case.block_size, dtype=dtype)
      entry = {k: cases.sha(v) for k, v in strangers.stored(*q).items()}
      w = strangers.dequantize(*q, dtype)
      entry[dtype] = cases.sha(strangers.to_bytes(w))
      hashes[f'{case.name}/from_{dtype}'] = entry
    q = strangers.quantize(w_OxI, case.block_size, True)
    double = strangers.stored(*q)
    for key in ('absmax', 'nested', 'offset'):
      arrays[f'{case.name}/{key}'] = double[key]
    entry = {'plain_absmax': cases.sha(strangers.plain_absmax(q[1]))}
    for dtype in strangers.DTYPES:
      w = strangers.dequantize(*q, dtype)
      entry[dtype] = cases.sha(strangers.to_bytes(w))
    hashes[f'{case.name}/double'] = entry
  q = strangers.quantize(weights.edges(), 64)
  stored = strangers.stored(*q)
  arrays['edges/codes'] = stored['codes'].reshape(9, 32)
  arrays['edges/absmax'] = stored['absmax']
  arrays['edges/float32'] = strangers.dequantize(*q).numpy()
  write('nf4.json', hashes)
  np.savez_compressed(HERE / 'nf4.npz', **arrays)


def linears() -> None:
  """PEFT's single linears."""
  arrays = {}
  for case in cases.LINEAR:
    for key, value in strangers.linear(case.inputs(), **case.options).items():
      arrays[f'{case.name}/{key}'] = value
    if case.options.get('double_quant'):
      stored = strangers.stored(
        *strangers.quantize(case.inputs().weight, 64, True)
      )
      for key in ('absmax', 'nested', 'offset'):
        arrays[f'{case.name}/stored/{key}'] = stored[key]
  np.savez_compressed(HERE / 'linear.npz', **arrays)


def adam() -> None:
  """bitsandbytes' AdamW, in 8 bits and in 32."""
  arrays = {}
  for name in cases.ADAM8:
    for bits in (8, 32):
      made = strangers.adamw(*cases.adam8(name), bits, **cases.ADAM8_OPTIONS)
      arrays |= {f'{name}/{bits}/{key}': value for key, value in made.items()}
  for signed in (True, False):
    levels = create_dynamic_map(signed=signed).numpy()
    arrays['signed' if signed else 'unsigned'] = levels
  arrays['versions'] = np.array(json.dumps(strangers.versions()))
  np.savez_compressed(HERE / 'adam8bit.npz', **arrays)


def adapter_files(folder: Path, method: str) -> dict[str, Any]:
  """Names and shapes of what PEFT saves, and its config."""
  model = strangers.adapted(
    strangers.load(folder), method, cases.RANK, cases.ALPHA
  )
  with tempfile.TemporaryDirectory() as out, strangers.quiet():
    model.save_pretrained(out)
    with safe_open(Path(out) / 'adapter_model.safetensors', 'np') as file:
      shapes = {k: file.get_slice(k).get_shape() for k in sorted(file.keys())}
      metadata = file.metadata()
    config = json.loads((Path(out) / 'adapter_config.json').read_text())
  config['base_model_name_or_path'] = None
  config['target_modules'] = sorted(config['target_modules'])
  return {'tensors': shapes, 'metadata': metadata, 'config': config}


def llamas(root: Path) -> None:
  """Logits and curves of the tiny llamas."""
  arrays: dict[str, np.ndarray] = {}
  folders = {}
  for name, tied in cases.LLAMAS.items():
    config, tensors = weights.tiny_llama(cases.SEED, tied)
    folders[name] = weights.write_hf(root / name, config, tensors)
    model = strangers.load(folders[name])
    arrays[f'logits/{name}'] = strangers.logits(model, cases.prompt())
  folder = folders['tied']
  model = strangers.load(folder, four_bit=True, double_quant=True)
  for layer, linear in cases.modules():
    module = model.get_submodule(weights.hf_module(layer, linear))
    state = module.weight.quant_state
    at = f'double/{layer}/{linear}'
    for key, value in strangers.stored(module.weight.data, state).items():
      if key != 'codes':
        arrays[f'{at}/{key}'] = value
  arrays['logits/double'] = strangers.logits(model, cases.prompt())
  curves = {
    name: strangers.curve(
      folder,
      method,
      cases.tokens(),
      rank=cases.RANK,
      alpha=cases.ALPHA,
      lr=cases.LR,
      double_quant=double_quant,
    ).tolist()
    for name, (method, double_quant) in cases.CURVES.items()
  }
  files = {method: adapter_files(folder, method) for method in ('lora', 'dora')}
  np.savez_compressed(HERE / 'llama.npz', **arrays)
  write('llama.json', {'curves': curves, 'peft': files})


def stored() -> None:
  """Linears as bitsandbytes stores them, and their dequantized values."""
  tensors, dense = {}, {}
  for case in cases.STORED:
    parts, w = strangers.stored_linear(
      case.matrix(), case.double_quant, case.storage, case.dtype
    )
    tensors |= {f'{case.name}.{part}': t for part, t in parts.items()}
    dense[case.name] = w
  save_file(tensors, HERE / 'bnb.safetensors', metadata={'format': 'pt'})
  np.savez_compressed(HERE / 'bnb.npz', **dense)


def every_family(root: Path) -> None:
  """Logits and gradient norms of a tiny model of every family."""
  arrays, norms = {}, {}
  for name in families.CONFIGS:
    folder = weights.write_hf(root / name, *families.make(name))
    model = strangers.load(folder)
    arrays[name] = strangers.logits(model, families.prompt())
    norms[name] = strangers.gradient_norms(model, families.prompt())
  for name in families.AS_GGUF:
    folder = weights.write_hf(root / f'{name}.gguf', *families.as_gguf(name))
    model = strangers.load(folder)
    arrays[f'{name}.gguf'] = strangers.logits(model, families.prompt())
  np.savez_compressed(HERE / 'families.npz', **arrays)
  write('families.json', {'gradient_norms': norms})


def main() -> None:
  """Makes every file."""
  torch.manual_seed(0)
  nf4()
  linears()
  adam()
  stored()
  with tempfile.TemporaryDirectory() as root:
    llamas(Path(root))
    every_family(Path(root))


if __name__ == '__main__':
  main()
