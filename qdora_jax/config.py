"""A run's configuration: frozen sections, checked once, at the door.

Configs are ml_collections files (`experiments/configs`); whatever they hold
must be exactly the fields below, of their types. Inside the package a config is
these dataclasses and nothing else.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from qdora_jax.attention import Form
from qdora_jax.model import Remat
from qdora_jax.paged import Paged
from qdora_jax.prompts import Format, Template
from qdora_jax.rows import FORMS
from qdora_jax.specs import AdapterSpec, Init, QuantSpec


@dataclasses.dataclass(frozen=True)
class ModelSection:
  name: str
  dtype: Literal['auto', 'float32', 'bfloat16', 'float16']
  remat: Remat
  attention: Form = 'auto'


@dataclasses.dataclass(frozen=True)
class MeshSection:
  data: int
  fsdp: int
  tensor: int


@dataclasses.dataclass(frozen=True)
class DataSection:
  name: str
  path: str
  mix: Mapping[str, float]
  eval_path: str
  fields: Mapping[str, str]
  options: Mapping[str, Any]
  template: Template
  instruction: str
  system: str
  answer_pattern: str
  seed: int
  train_size: int
  eval_size: int
  packing: bool
  too_long: Literal['drop', 'truncate']
  learn_prompts: bool = False
  train_rows: Literal['first', 'random'] = 'first'

  def format(self) -> Format:
    return Format(self.template, self.system, self.instruction)


@dataclasses.dataclass(frozen=True)
class QuantSection:
  format: Literal['none', 'nf4']
  targets: str
  block_size: int
  double_quant: bool

  def spec(self) -> QuantSpec | None:
    if self.format == 'none':
      return None
    return QuantSpec(self.targets, self.block_size, self.double_quant)


@dataclasses.dataclass(frozen=True)
class AdapterSection:
  method: Literal['none', 'lora', 'dora', 'magnitude', 'vera', 'dvora']
  rank: int
  alpha: float
  dropout: float
  targets: str
  rank_pattern: Mapping[str, int]
  alpha_pattern: Mapping[str, float]
  rslora: bool
  factored: bool
  detach: bool
  trainable: str
  path: str
  init: Init = 'kaiming'
  projection_seed: int = 0

  def spec(self) -> AdapterSpec | None:
    if self.method == 'none':
      return None
    options = dataclasses.asdict(self)
    del options['path']
    return AdapterSpec(**options)


@dataclasses.dataclass(frozen=True)
class TrainSection:
  steps: int
  batch_size: int
  seq_len: int
  microbatches: int
  save_every: int
  max_skipped: int
  keep_last: int = 2
  keep_best: int = 0
  ignore_plan: bool = False


@dataclasses.dataclass(frozen=True)
class OptimSection:
  name: str
  lr: float
  schedule: Literal['constant', 'linear', 'cosine']
  warmup_steps: int
  weight_decay: float
  clip: float
  options: Mapping[str, Any]
  lr_scale: Mapping[str, float]
  paged: Paged = 'none'


@dataclasses.dataclass(frozen=True)
class EvalSection:
  before: bool
  exact_match: bool
  shots: int
  every: int
  samples: int
  batch_size: int
  max_new_tokens: int
  beams: int = 1
  benchmarks: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LogSection:
  """Who follows a run; it is the same run whoever does."""

  tensorboard: bool = False
  wandb: str = ''


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything a run depends on; `experiments/configs/base.py` says why."""

  model: ModelSection
  data: DataSection
  quant: QuantSection
  adapter: AdapterSection
  train: TrainSection
  optim: OptimSection
  eval: EvalSection
  mesh: MeshSection
  seed: int
  log: LogSection = LogSection()

  def __post_init__(self):
    least = {
      'data.train_size': 0,
      'data.eval_size': 0,
      'quant.block_size': 2,
      'train.steps': 1,
      'train.batch_size': 1,
      'train.seq_len': 0,
      'train.microbatches': 1,
      'train.save_every': 1,
      'train.max_skipped': 1,
      'train.keep_last': 1,
      'train.keep_best': 0,
      'optim.lr': 0,
      'optim.warmup_steps': 0,
      'optim.weight_decay': 0,
      'optim.clip': 0,
      'eval.shots': 0,
      'eval.every': 0,
      'eval.samples': 0,
      'eval.batch_size': 1,
      'eval.max_new_tokens': 1,
      'eval.beams': 1,
      'mesh.data': 1,
      'mesh.tensor': 1,
    }
    for key, low in least.items():
      section, field = key.split('.')
      value = getattr(getattr(self, section), field)
      # Not `value < low`: nan is refused too.
      if not value >= low:
        raise ValueError(f'config.{key}={value}: expected at least {low}')
    if self.mesh.fsdp != -1 and self.mesh.fsdp < 1:
      raise ValueError(
        f'config.mesh.fsdp={self.mesh.fsdp}: expected at least 1, or -1 for '
        'all devices that are left'
      )
    if self.adapter.method == 'none' and self.quant.format != 'none':
      raise ValueError(
        "config.adapter.method='none' trains every weight, and a quantized "
        'weight cannot be trained: set config.quant.format="none", or choose '
        "an adapter ('lora', 'dora')"
      )
    if self.train.keep_best and not (self.eval.every and self.data.eval_size):
      raise ValueError(
        f'config.train.keep_best={self.train.keep_best} keeps checkpoints by '
        'their held-out loss, which is not taken during training '
        f'(config.eval.every={self.eval.every}, config.data.eval_size='
        f'{self.data.eval_size}): set both above 0'
      )
    if self.train.batch_size % self.train.microbatches:
      raise ValueError(
        f'config.train.microbatches={self.train.microbatches} does not divide '
        f'config.train.batch_size={self.train.batch_size}'
      )
    if self.adapter.method == 'none':
      for key in ('path', 'trainable'):
        if getattr(self.adapter, key):
          raise ValueError(
            f'config.adapter.{key}={getattr(self.adapter, key)!r} needs an '
            "adapter: set config.adapter.method='lora' or 'dora'"
          )
    if self.data.mix and self.data.path:
      raise ValueError(
        f'config.data.path={self.data.path!r} beside config.data.mix, of '
        f'{len(self.data.mix)} sources: expected one of them; to train on the '
        f'file alone, --config.data.mix=\'{{"{self.data.path}": 1}}\' in place '
        'of the path'
      )
    for source, weight in self.data.mix.items():
      if not weight > 0:
        raise ValueError(
          f'config.data.mix: {source!r} has weight {weight}, expected more '
          'than 0'
        )
    for source, limit in self.eval.benchmarks.items():
      if limit < 0:
        raise ValueError(
          f'config.eval.benchmarks: {source!r} has {limit} rows; expected at '
          'least 1, or 0 for all'
        )
    for field in self.data.fields:
      known = [key for form in FORMS for key in form]
      if field not in known:
        near = difflib.get_close_matches(field, known, n=1)
        hint = f'; did you mean {near[0]!r}?' if near else ''
        raise ValueError(
          f'config.data.fields: {field!r} is none of {", ".join(known)}{hint}'
        )
    regexes = {
      'data.answer_pattern': [self.data.answer_pattern],
      'quant.targets': [self.quant.targets],
      'adapter.targets': [self.adapter.targets],
      'adapter.rank_pattern': self.adapter.rank_pattern,
      'adapter.alpha_pattern': self.adapter.alpha_pattern,
      'adapter.trainable': [self.adapter.trainable],
      'optim.lr_scale': self.optim.lr_scale,
    }
    for key, patterns in regexes.items():
      for pattern in patterns:
        try:
          re.compile(pattern)
        except re.error as error:
          raise ValueError(
            f'config.{key}: {pattern!r} is not a regular expression: {error}'
          ) from error
    try:
      self.adapter.spec()
    except ValueError as error:
      raise ValueError(f'config.adapter.{error}') from error

  def settings(self) -> dict[str, Any]:
    """All keys, but those an earlier version did not know and would not miss.

    Without config.log, which changes nothing.

    Two runs of equal settings are the same run, also across versions.
    """
    every = dataclasses.asdict(self)
    del every['log']
    for name, section in every.items():
      if isinstance(section, dict):
        added = later(getattr(self, name))
        every[name] = {
          k: v for k, v in section.items() if k not in added or added[k] != v
        }
    return every

  @classmethod
  def make(cls, values: Mapping[str, Any]) -> 'RunConfig':
    """From nested dicts (an ml_collections ConfigDict's `to_dict()`).

    Raises:
      ValueError: for an unknown or missing key (naming the nearest one), a
        wrong type, or a value out of range.
    """
    return _section(cls, values, 'config')


def _section(cls: Any, values: Any, where: str) -> Any:
  """One dataclass from one mapping, every key accounted for."""
  if not isinstance(values, Mapping):
    raise ValueError(f'{where}: expected a section, got {values!r}')
  hints = get_type_hints(cls)
  for key in values:
    if key not in hints:
      near = difflib.get_close_matches(key, hints, n=1)
      hint = f'; did you mean {where}.{near[0]}?' if near else ''
      raise ValueError(
        f'{where}.{key} is no key{hint} (keys: {", ".join(hints)})'
      )
  missing = [
    key for key in hints if key not in values and key not in later(cls)
  ]
  if missing:
    raise ValueError(f'{where} lacks {", ".join(missing)}')
  return cls(
    **{k: _value(hints[k], v, f'{where}.{k}') for k, v in values.items()}
  )


def later(section: Any) -> dict[str, Any]:
  """Keys that run folders of earlier versions have not, and what they meant."""
  missing = dataclasses.MISSING
  return {
    f.name: f.default if f.default is not missing else f.default_factory()
    for f in dataclasses.fields(section)
    if (f.default, f.default_factory) != (missing, missing)
  }


def _value(hint: Any, value: Any, where: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return _section(hint, value, where)
  if get_origin(hint) is Literal:
    if value not in get_args(hint):
      raise ValueError(f'{where}={value!r}: expected one of {get_args(hint)}')
    return value
  if get_origin(hint) is Mapping:
    _of_type(Mapping, value, where)
    inner = get_args(hint)[1]
    return {k: _value(inner, v, f'{where}.{k}') for k, v in value.items()}
  if hint is Any:
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  return _of_type(hint, value, where)


def _of_type(kind: type, value: Any, where: str) -> Any:
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ValueError(
      f'{where}={value!r} is of type {type(value).__name__}, expected '
      f'{kind.__name__}'
    )
  return value
