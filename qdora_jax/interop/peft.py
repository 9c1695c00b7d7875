"""PEFT adapter directories: adapter_config.json + adapter_model.safetensors.

PEFT stores lora_A (R, I), lora_B (O, R) and the magnitude (O,) of each module
under `base_model.model.<module>`, in float32; a stack of layers is one entry a
layer, ranks trimmed to their true size.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qdora_jax import paths
from qdora_jax.adapter import Adapter, stack_ranks
from qdora_jax.interop import hf
from qdora_jax.specs import TAKEN

PREFIX = 'base_model.model.'
WEIGHTS = 'adapter_model.safetensors'
CONFIG = 'adapter_config.json'


def save_adapter(
  directory: str | Path,
  adapter: dict[str, Any],
  base_model: str = '',
  *,
  tied: bool | None = None,
  initial: dict[str, Any] | None = None,
) -> None:
  """Writes an adapter tree as files that `peft` loads.

  Args:
    directory: made if absent; each file in it is replaced only when complete.
    adapter: what `init_adapter` made, trained: LoRA or DoRA.
    base_model: what PEFT's base_model_name_or_path should say.
    tied: whether the model's head is its embedding; must be known if the
      embedding is trained.
    initial: the adapter as it started, if its init ('pissa', 'olora', 'loftq')
      took it out of the base. The files are then for the original model: what
      was learned is A B - A0 B0, of twice the rank. Only over an unquantized
      base; else write adapter and base (`export_folded`).

  What is trained in full beside the adapter goes into modules_to_save.

  Raises:
    ValueError: for a magnitude-only adapter, which PEFT does not know, one
      whose options differ between kernels, or a bias trained beside it.
  """
  flat = paths.flatten(adapter)
  whole = {p: leaf for p, leaf in flat.items() if not isinstance(leaf, Adapter)}
  nodes = [node for path, node in flat.items() if path not in whole]
  if not nodes:
    raise ValueError(
      'there is no adapter in the tree: PEFT saves LoRA and DoRA'
    )
  specs = {
    dataclasses.replace(node.spec, targets='', trainable='') for node in nodes
  }
  if len(specs) != 1:
    raise ValueError(f'one adapter_config.json cannot hold {specs}')
  (spec,) = specs
  if spec.method == 'magnitude':
    raise ValueError(
      "PEFT has no magnitude-only adapter; train method='dora' with rank 1 and "
      'a frozen, zero lora_b, or merge it into the base'
    )
  if spec.shared:
    raise ValueError(
      f"method={spec.method!r}: PEFT's VeRA draws other random matrices, and "
      'it has no DVoRA. Export it folded (as the LoRA it is) or merged'
    )
  if spec.init in TAKEN:
    if initial is None:
      raise ValueError(
        f'the adapter began with init={spec.init!r}, which changed the base: '
        'pass initial=, the adapter as it started, to write files for the '
        'original model; over a quantized base, write both (export_folded)'
      )
    nodes = [_learned(node, initial) for node in nodes]
    spec = nodes[0].spec
  tensors, modules = _whole(whole)
  embedded = f'{PREFIX}model.embed_tokens.weight'
  if embedded in tensors:
    if tied is None:
      raise ValueError(
        'embed/embedding is trained: say whether the model is tied to it '
        '(tied=model.config.tied)'
      )
    if tied:
      # As PEFT writes a head that is trained as the embedding.
      tensors[f'{PREFIX}lm_head.weight'] = tensors[embedded]
  ranks: dict[str, int] = {}
  alphas: dict[str, float] = {}
  for node in nodes:
    for n, (name, rank) in enumerate(zip(node.names, node.ranks, strict=True)):
      if not rank:
        continue
      module = hf.module_name(name.rsplit('/', 1)[0])
      ranks[module], alphas[module] = rank, node.spec.alpha_of(name)
      a, b, m = (
        np.asarray(x[n] if x is not None and x.ndim > k else x)
        for x, k in ((node.lora_a, 2), (node.lora_b, 2), (node.magnitude, 1))
      )
      parts = {'A.weight': a[:, :rank].T, 'B.weight': b[:rank].T}
      if node.magnitude is not None:
        parts['magnitude_vector'] = m
      for key, part in parts.items():
        part = np.ascontiguousarray(part, np.float32)
        tensors[f'{PREFIX}{module}.lora_{key}'] = part
  if not ranks:
    raise ValueError('every rank is 0: there is nothing to save')
  rank, alpha = commonest(ranks.values()), commonest(alphas.values())
  config = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_model,
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': spec.dropout,
    'target_modules': _targets(nodes),
    'rank_pattern': {m: r for m, r in ranks.items() if r != rank},
    'alpha_pattern': {m: a for m, a in alphas.items() if a != alpha},
    'use_dora': spec.method == 'dora',
    'use_rslora': spec.rslora,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'inference_mode': True,
    'modules_to_save': modules or None,
    'ensure_weight_tying': bool(tied and embedded in tensors),
  }
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  data = safetensors.numpy.save(tensors, metadata={'format': 'pt'})
  _replace(directory / WEIGHTS, data)
  text = json.dumps(config, indent=2, sort_keys=True) + '\n'
  _replace(directory / CONFIG, text.encode())


def _learned(node: Adapter, initial: dict[str, Any]) -> Adapter:
  """The same update relative to the original weight: s (A B - A0 B0)."""
  nodes = paths.flatten(initial).values()
  nodes = [n for n in nodes if isinstance(n, Adapter)]
  start = next(n for n in nodes if n.names == node.names)
  spec = node.spec
  # s stays: alpha grows as the rank does (or, for rsLoRA, its root).
  grow = 2**0.5 if spec.rslora else 2
  spec = dataclasses.replace(
    spec,
    init='kaiming',
    rank=2 * spec.rank,
    alpha=grow * spec.alpha,
    rank_pattern={k: 2 * r for k, r in spec.rank_pattern},
    alpha_pattern={k: grow * a for k, a in spec.alpha_pattern},
  )
  # Per layer, so that a smaller rank's padding stays at the end.
  stacked = node.lora_a.ndim > 2
  pairs = []
  for n, rank in enumerate(node.ranks):
    at = n if stacked else ...
    a = [x.lora_a[at][:, :rank] for x in (node, start)]
    b = [node.lora_b[at][:rank], -start.lora_b[at][:rank]]
    pairs.append((jnp.concatenate(a, axis=1), jnp.concatenate(b, axis=0)))
  a, b = stack_ranks(pairs)
  return node.replace(
    lora_a=a if stacked else a[0], lora_b=b if stacked else b[0], spec=spec
  )


def _whole(
  leaves: dict[str, Any],
) -> tuple[dict[str, np.ndarray], list[str]]:
  """PEFT's tensors and modules_to_save of what is trained in full."""
  tensors, modules = {}, []
  for path, leaf in leaves.items():
    if path.endswith('/bias'):
      raise ValueError(
        f'{path}: these files hold no bias beside an adapter; merge it'
      )
    names = paths.names(path, leaf)
    for n, name in enumerate(names):
      part = np.asarray(leaf if names == [path] else leaf[n], np.float32)
      part = part.T if path.endswith('/kernel') else part
      key = f'{PREFIX}{hf.tensor_name(name)}'
      tensors[key] = np.ascontiguousarray(part)
    module = hf.module_name(names[0].rsplit('/', 1)[0])
    # PEFT compares ends of names: 'norm' alone would be every norm.
    modules.append(module if names == [path] else module.rsplit('.', 1)[-1])
  return tensors, modules


def _targets(nodes: Iterable[Adapter]) -> list[str]:
  """PEFT's target_modules: 'q_proj' where every layer is adapted, else the
  whole names of those that are."""
  targets = set()
  for node in nodes:
    modules = [hf.module_name(n.rsplit('/', 1)[0]) for n in node.names]
    if all(node.ranks):
      targets.add(modules[0].rsplit('.', 1)[-1])
    else:
      targets |= {m for m, r in zip(modules, node.ranks, strict=True) if r}
  return sorted(targets)


def commonest(values: Iterable[Any]) -> Any:
  """The value that most have: what a config says once."""
  return collections.Counter(values).most_common(1)[0][0]


def _replace(path: Path, data: bytes) -> None:
  """Writes a file whole or not at all."""
  part = path.with_name(path.name + '.part')
  part.write_bytes(data)
  os.replace(part, path)
