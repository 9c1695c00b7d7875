"""PEFT adapter directories in: adapters as trees, ready for more training.

`peft.py` says how they are laid out.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import paths
from qdora_jax.adapter import Adapter
from qdora_jax.interop import hf
from qdora_jax.interop.peft import CONFIG, PREFIX, WEIGHTS, commonest
from qdora_jax.specs import AdapterSpec

# Stands between module and part; no name holds it.
_SPLIT = '\0'


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
  for file in (CONFIG, WEIGHTS):
    if not (directory / file).is_file():
      raise FileNotFoundError(
        f'{directory} has no {file}; expected a PEFT adapter in safetensors '
        'form. A pickled one (.bin) may run code and is not loaded: where you '
        'trust it, peft itself converts it (PeftModel.from_pretrained, then '
        'save_pretrained)'
      )
  config = hf.read_json(directory / CONFIG)
  supported = {
    'peft_type': ('LORA',),
    'bias': ('none',),
    'fan_in_fan_out': (False,),
    # The others (PiSSA, OLoRA, LoftQ) belong to a base that they changed.
    'init_lora_weights': (True, False, 'gaussian', 'orthogonal', 'eva'),
  }
  # Variants of LoRA that compute something else: unset, or not read.
  unset = ('alora_invocation_tokens', 'use_qalora', 'use_bdlora', 'kasa_config')
  unset += ('arrow_config', 'layer_replication', 'lora_bias', 'velora_config')
  supported |= dict.fromkeys(unset, (None, False, [], {}))
  for option, values in supported.items():
    if option in config and config[option] not in values:
      raise ValueError(
        f'{directory}: {option}={config[option]!r} is not supported; '
        f'supported: {values[0]!r}'
      )
  _check_types(directory, config)
  reader = hf.open_safetensors(directory / WEIGHTS)
  hf.check_floats(directory / WEIGHTS, reader, reader.keys())
  tensors = {k: reader.get_tensor(k) for k in reader.keys()}
  # On disk the magnitude has no '.weight'; older files have it.
  tensors = {
    k.removeprefix(PREFIX)
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
        f'{directory}: {WEIGHTS} holds {key.replace(_SPLIT, ".lora_")!r}, '
        'which is not understood; expected names that end in lora_A.weight, '
        'lora_B.weight and lora_magnitude_vector'
      )
    found.setdefault(module, {})[part] = value
  if not any('A' in parts for parts in found.values()):
    raise ValueError(f'{directory}: {WEIGHTS} holds no lora_A')
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
  try:
    spec = _spec(config, present, where)
  except ValueError as error:
    raise ValueError(f'{directory / CONFIG}: {error}') from error
  spec = dataclasses.replace(
    spec, trainable='|'.join(map(re.escape, sorted(names)))
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


def _check_types(directory: Path, config: dict[str, Any]) -> None:
  """Raises ValueError for an option that is not what PEFT writes there."""

  def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

  def pattern(value: Any) -> bool:
    try:
      return bool(re.compile(value))
    except (re.error, TypeError, RecursionError, OverflowError):
      return False

  def alphas(value: Any) -> bool:
    if not isinstance(value, dict):
      return value is None
    return all(map(pattern, value)) and all(map(number, value.values()))

  def names(value: Any) -> bool:
    if not isinstance(value, list):
      return value is None
    return all(isinstance(name, str) for name in value)

  def switch(value: Any) -> bool:
    return isinstance(value, bool)

  expected = {
    'lora_alpha': (number, 'a number'),
    'lora_dropout': (number, 'a number'),
    'alpha_pattern': (alphas, '{regular expression: number}'),
    'modules_to_save': (names, 'a list of names'),
    'use_dora': (switch, 'true or false'),
    'use_rslora': (switch, 'true or false'),
  }
  needed = ('lora_alpha', 'lora_dropout')
  for option, (fits, what) in expected.items():
    value = config[option] if option in config else None
    if option not in config and option not in needed:
      continue
    if not fits(value):
      raise ValueError(
        f'{directory}: {CONFIG} has {option}={repr(value)[:80]}: expected '
        f'{what}'
      )


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
  rank, alpha = commonest(ranks.values()), commonest(alphas.values())
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
