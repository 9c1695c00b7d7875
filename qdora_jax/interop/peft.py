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

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qdora_jax import paths
from qdora_jax.interop import hf
from qdora_jax.specs import TAKEN, AdapterSpec
from qdora_jax.transforms import Adapter, stack_ranks

_PREFIX = 'base_model.model.'
_WEIGHTS = 'adapter_model.safetensors'
_CONFIG = 'adapter_config.json'
# Stands between module and part; no name holds it.
_SPLIT = '\0'


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
  embedded = f'{_PREFIX}model.embed_tokens.weight'
  if embedded in tensors:
    if tied is None:
      raise ValueError(
        'embed/embedding is trained: say whether the model is tied to it '
        '(tied=model.config.tied)'
      )
    if tied:
      # As PEFT writes a head that is trained as the embedding.
      tensors[f'{_PREFIX}lm_head.weight'] = tensors[embedded]
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
    'modules_to_save': modules or None,
    'ensure_weight_tying': bool(tied and embedded in tensors),
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
  if not directory.is_dir():
    raise FileNotFoundError(
      f'{directory}: no such directory{paths.beside(directory)}'
    )
  for file in (_CONFIG, _WEIGHTS):
    if not (directory / file).is_file():
      raise FileNotFoundError(
        f'{directory} has no {file}; expected a PEFT adapter in safetensors '
        'form. A pickled one (.bin) may run code and is not loaded: where you '
        'trust it, peft itself converts it (PeftModel.from_pretrained, then '
        'save_pretrained)'
      )
  config = hf.read_json(directory / _CONFIG)
  supported = {
    'peft_type': ('LORA',),
    'bias': ('none',),
    'fan_in_fan_out': (False,),
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
    value = config[option] if option in config else None
    if not isinstance(value, int | float):
      raise ValueError(
        f'{directory}: {_CONFIG} has {option}={value!r}: expected a number'
      )
  reader = hf.open_safetensors(directory / _WEIGHTS)
  hf.check_floats(directory / _WEIGHTS, reader, reader.keys())
  tensors = {k: reader.get_tensor(k) for k in reader.keys()}
  # On disk the magnitude has no '.weight'; older files have it.
  tensors = {
    k.removeprefix(_PREFIX)
    .removesuffix('.weight')
    .replace('.lora_', _SPLIT): v.astype(np.float32)
    for k, v in tensors.items()
  }
  flat = paths.flatten(base)
  trained = _trainable(config, flat)
  whole: dict[str, np.ndarray] = {}
  found: dict[str, dict[str, np.ndarray]] = {}
  for key, value in tensors.items():
    module, _, part = key.partition(_SPLIT)
    if not part and module in trained:
      whole[module] = value
      continue
    if part not in ('A', 'B', 'magnitude_vector'):
      raise ValueError(
        f'{directory}: {_WEIGHTS} holds {key.replace(_SPLIT, ".lora_")!r}, '
        'which is not understood; expected names that end in lora_A.weight, '
        'lora_B.weight and lora_magnitude_vector'
      )
    found.setdefault(module, {})[part] = value
  if not any('A' in parts for parts in found.values()):
    raise ValueError(f'{directory}: {_WEIGHTS} holds no lora_A')
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
  names = {trained[module][1] for module in whole}
  spec = dataclasses.replace(
    _spec(config, present, where),
    trainable='|'.join(map(re.escape, sorted(names))),
  )
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
  for path in dict.fromkeys(trained[module][0] for module in whole):
    adapter[path] = _stacked(directory, path, flat[path], whole)
  return paths.unflatten(adapter)


def _learned(node: Adapter, initial: dict[str, Any]) -> Adapter:
  """The same update relative to the original weight: s (A B - A0 B0)."""
  flat = paths.flatten(initial)
  start = next(n for n in flat.values() if n.names == node.names)
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
      key = f'{_PREFIX}{hf.tensor_name(name)}'
      tensors[key] = np.ascontiguousarray(part)
    module = hf.module_name(names[0].rsplit('/', 1)[0])
    # PEFT compares ends of names: 'norm' alone would be every norm.
    modules.append(module if names == [path] else module.rsplit('.', 1)[-1])
  return tensors, modules


def _trainable(
  config: dict[str, Any], flat: dict[str, Any]
) -> dict[str, tuple[str, str]]:
  """{module: (path, name)} of the base's modules that modules_to_save names."""
  listed = config['modules_to_save'] if 'modules_to_save' in config else None
  found = {
    hf.module_name(name.rsplit('/', 1)[0]): (path, name)
    for path, leaf in flat.items()
    if not path.endswith('/bias')
    for name in paths.names(path, leaf)
  }
  trained = {m: w for m, w in found.items() if m.endswith(tuple(listed or ()))}
  embedding = 'model.embed_tokens'
  if embedding in trained and 'lm_head' not in found:
    # A tied head is written beside what it is.
    trained['lm_head'] = trained[embedding]
  return trained


def _stacked(
  directory: Path, path: str, leaf: Any, whole: dict[str, np.ndarray]
) -> jax.Array:
  """A parameter trained in full, in all its layers, as the base has it."""
  parts = []
  for name in paths.names(path, leaf):
    module = hf.module_name(name.rsplit('/', 1)[0])
    if module not in whole:
      raise ValueError(
        f'{directory}: {module} is missing; other layers have it'
      )
    part = whole[module]
    parts.append(part.T if path.endswith('/kernel') else part)
  array = np.stack(parts) if paths.names(path, leaf) != [path] else parts[0]
  if array.shape != leaf.shape:
    raise ValueError(
      f'{directory}: {path} is {array.shape}, the base has {leaf.shape}; is '
      'the adapter of another model?'
    )
  return jnp.asarray(array)


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
