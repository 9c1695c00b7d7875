"""PEFT adapter directories: adapter_config.json + adapter_model.safetensors.

PEFT stores lora_A (R, I), lora_B (O, R) and the magnitude (O,) of each module
under `base_model.model.<module>`, in float32; a stack of layers is one entry a
layer, ranks trimmed to their true size.
"""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qdora_jax import paths
from qdora_jax.interop import hf
from qdora_jax.specs import AdapterSpec
from qdora_jax.transforms import Adapter

_PREFIX = 'base_model.model.'
_WEIGHTS = 'adapter_model.safetensors'
_CONFIG = 'adapter_config.json'


def save_adapter(
  directory: str | Path, adapter: dict[str, Any], base_model: str = ''
) -> None:
  """Writes an adapter tree as files that `peft` loads.

  Args:
    directory: made if absent; each file in it is replaced only when complete.
    adapter: what `init_adapter` made, trained: LoRA or DoRA.
    base_model: what PEFT's base_model_name_or_path should say.

  Raises:
    ValueError: for a magnitude-only adapter, which PEFT does not know, or one
      whose options differ between kernels.
  """
  flat = paths.flatten(adapter)
  plain = [p for p, node in flat.items() if not isinstance(node, Adapter)]
  if plain:
    raise ValueError(
      f'{plain[0]} is a plain array, and these files hold LoRA and DoRA only: '
      'save it apart, or merge'
    )
  nodes = flat.values()
  specs = {dataclasses.replace(node.spec, targets='') for node in nodes}
  if len(specs) != 1:
    raise ValueError(f'one adapter_config.json cannot hold {specs}')
  (spec,) = specs
  if spec.method == 'magnitude':
    raise ValueError(
      "PEFT has no magnitude-only adapter; train method='dora' with rank 1 and "
      'a frozen, zero lora_b, or merge it into the base'
    )
  tensors: dict[str, np.ndarray] = {}
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
        tensors[f'{_PREFIX}{module}.lora_{key}'] = part
  if not ranks:
    raise ValueError('every rank is 0: there is nothing to save')
  rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
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
    'modules_to_save': None,
  }
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  data = safetensors.numpy.save(tensors, metadata={'format': 'pt'})
  _replace(directory / _WEIGHTS, data)
  text = json.dumps(config, indent=2, sort_keys=True) + '\n'
  _replace(directory / _CONFIG, text.encode())


def load_adapter(directory: str | Path, base: dict[str, Any]) -> dict[str, Any]:
  """Reads PEFT's files into an adapter tree for a base.

  Args:
    directory: with adapter_config.json and adapter_model.safetensors.
    base: the parameter tree it was trained on, quantized or not.

  Returns:
    Nested dicts of `Adapter`s, ready for `attach` and for more training.

  Raises:
    FileNotFoundError: if a file is absent.
    ValueError: if the adapter is of another kind or model, naming the first
      module or option that does not fit.
  """
  directory = Path(directory)
  for file in (_CONFIG, _WEIGHTS):
    if not (directory / file).is_file():
      raise FileNotFoundError(
        f'{directory} has no {file}; expected a PEFT adapter in safetensors '
        'form (pickled .bin adapters are not loaded)'
      )
  config = json.loads((directory / _CONFIG).read_text())
  supported = {
    'peft_type': ('LORA',),
    'bias': ('none',),
    'fan_in_fan_out': (False,),
    'modules_to_save': (None, []),
    # The others (PiSSA, OLoRA, LoftQ) belong to a base that they changed.
    'init_lora_weights': (True, False, 'gaussian', 'orthogonal', 'eva'),
  }
  for option, values in supported.items():
    if option in config and config[option] not in values:
      raise ValueError(
        f'{directory}: {option}={config[option]!r} is not supported; '
        f'supported: {values[0]!r}'
      )
  for option in ('lora_alpha', 'lora_dropout'):
    if option not in config:
      raise ValueError(f'{directory}: {_CONFIG} has no {option!r}')
  with safetensors.safe_open(directory / _WEIGHTS, framework='numpy') as reader:
    tensors = {k: reader.get_tensor(k) for k in reader.keys()}
  # On disk the magnitude has no '.weight'; older files have it.
  tensors = {
    k.removeprefix(_PREFIX)
    .removesuffix('.weight')
    .replace('.lora_', '\0'): v.astype(np.float32)
    for k, v in tensors.items()
  }
  found: dict[str, dict[str, np.ndarray]] = {}
  for key, value in tensors.items():
    module, _, part = key.partition('\0')
    if part not in ('A', 'B', 'magnitude_vector'):
      raise ValueError(
        f'{directory}: {module}.lora_{part} is not understood; expected '
        'lora_A, lora_B and lora_magnitude_vector'
      )
    found.setdefault(module, {})[part] = value
  if not any('A' in parts for parts in found.values()):
    raise ValueError(f'{directory}: {_WEIGHTS} holds no lora_A')
  flat = paths.flatten(base)
  where = {
    hf.module_name(name.rsplit('/', 1)[0]): (path, name)
    for path, leaf in flat.items()
    if path.endswith('/kernel')
    for name in paths.names(path, leaf)
  }
  unknown = sorted(found.keys() - where.keys())
  if unknown:
    raise ValueError(
      f'{directory}: the base has no module {unknown[0]!r}; near: '
      f'{", ".join(paths.near(unknown[0], where))}'
    )
  adapter = {}
  present = {where[module][1]: parts for module, parts in found.items()}
  spec = _spec(config, present, where)
  for path in dict.fromkeys(where[module][0] for module in found):
    names = paths.names(path, flat[path])
    *lead, i, o = flat[path].shape
    ranks = [spec.rank_of(name) for name in names]
    widest = max(ranks)
    a = np.zeros((len(names), i, widest), np.float32)
    b = np.zeros((len(names), widest, o), np.float32)
    # A layer that is not adapted has scale 0, whatever its magnitude.
    m = np.ones((len(names), o), np.float32)
    for n, (name, rank) in enumerate(zip(names, ranks, strict=True)):
      if not rank:
        continue
      parts = present[name]
      expected = {'A': (rank, i), 'B': (o, rank)}
      if spec.method == 'dora':
        expected['magnitude_vector'] = (o,)
      for part, shape in expected.items():
        have = parts[part].shape if part in parts else None
        if have != shape:
          raise ValueError(
            f'{directory}: lora_{part} of {name} is {have}, the base needs '
            f'{shape}; is the adapter of another model?'
          )
      a[n, :, :rank], b[n, :rank] = parts['A'].T, parts['B'].T
      if spec.method == 'dora':
        m[n] = parts['magnitude_vector']
    adapter[path] = Adapter(
      jnp.asarray(a.reshape(*lead, i, widest)),
      jnp.asarray(b.reshape(*lead, widest, o)),
      jnp.asarray(m.reshape(*lead, o)) if spec.method == 'dora' else None,
      tuple(names),
      spec,
    )
  return paths.unflatten(adapter)


def _spec(
  config: dict[str, Any],
  present: dict[str, dict[str, np.ndarray]],
  where: dict[str, tuple[str, str]],
) -> AdapterSpec:
  """The AdapterSpec that PEFT's config and tensors stand for."""
  modules = {name: module for module, (_, name) in where.items()}
  ranks = {
    name: parts['A'].shape[0] for name, parts in present.items() if 'A' in parts
  }
  alphas = {name: float(config['lora_alpha']) for name in ranks}
  patterns = config['alpha_pattern'] if 'alpha_pattern' in config else None
  for name in ranks:
    for key, value in (patterns or {}).items():
      # PEFT: a pattern matches a module's whole dotted name or its tail.
      if re.fullmatch(rf'(?:.*\.)?(?:{key})', modules[name]):
        alphas[name] = float(value)
        break
  rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
  return AdapterSpec(
    method='dora' if 'use_dora' in config and config['use_dora'] else 'lora',
    rank=rank,
    alpha=alpha,
    dropout=float(config['lora_dropout']),
    targets=_regex(present, set(modules)),
    rank_pattern={re.escape(n): r for n, r in ranks.items() if r != rank},
    alpha_pattern={re.escape(n): a for n, a in alphas.items() if a != alpha},
    rslora='use_rslora' in config and config['use_rslora'],
  )


def _regex(names: Iterable[str], every: set[str]) -> str:
  """A rule for exactly these names; short if they are in all layers."""
  names = set(names)
  inner = sorted(
    {name.split('/', 2)[2] for name in names if name.count('/') > 1}
  )
  short = rf'layers/\d+/(?:{"|".join(inner)})'
  if {name for name in every if re.fullmatch(short, name)} == names:
    return short
  return '|'.join(map(re.escape, sorted(names)))


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


def _commonest(values: Iterable[Any]) -> Any:
  return collections.Counter(values).most_common(1)[0][0]


def _replace(path: Path, data: bytes) -> None:
  """Writes a file whole or not at all."""
  part = path.with_name(path.name + '.part')
  part.write_bytes(data)
  os.replace(part, path)
