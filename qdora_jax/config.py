"""A run's configuration: frozen sections, checked once, at the door.

Configs are ml_collections files (`experiments/configs`); whatever they hold
must be exactly the fields below, of their types. Inside the package a config is
these dataclasses and nothing else.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_type_hints

from qdora_jax.specs import AdapterSpec, QuantSpec


@dataclasses.dataclass(frozen=True)
class ModelSection:
  name: str
  dtype: str
  remat: str


@dataclasses.dataclass(frozen=True)
class DataSection:
  name: str
  path: str
  options: Mapping[str, Any]
  instruction: str
  system: str
  answer_pattern: str
  seed: int
  train_size: int
  eval_size: int


@dataclasses.dataclass(frozen=True)
class QuantSection:
  format: str
  targets: str
  block_size: int
  double_quant: bool

  def spec(self) -> QuantSpec | None:
    if self.format == 'none':
      return None
    return QuantSpec(self.targets, self.block_size, self.double_quant)


@dataclasses.dataclass(frozen=True)
class AdapterSection:
  method: str
  rank: int
  alpha: float
  dropout: float
  targets: str
  rank_pattern: Mapping[str, Any]
  alpha_pattern: Mapping[str, Any]
  rslora: bool
  factored: bool
  detach: bool

  def spec(self) -> AdapterSpec | None:
    if self.method == 'none':
      return None
    return AdapterSpec(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class TrainSection:
  steps: int
  batch_size: int
  seq_len: int
  microbatches: int
  save_every: int


@dataclasses.dataclass(frozen=True)
class OptimSection:
  lr: float
  schedule: str
  warmup_steps: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip: float


@dataclasses.dataclass(frozen=True)
class EvalSection:
  shots: int
  batch_size: int
  max_new_tokens: int


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
  seed: int

  def __post_init__(self):
    choices = {
      'model.dtype': ('float32', 'bfloat16'),
      'model.remat': ('none', 'dots', 'block'),
      'quant.format': ('none', 'nf4'),
      'adapter.method': ('none', 'lora', 'dora', 'magnitude'),
      'optim.schedule': ('constant', 'linear', 'cosine'),
    }
    for key, allowed in choices.items():
      section, field = key.split('.')
      value = getattr(getattr(self, section), field)
      if value not in allowed:
        raise ValueError(f'config.{key}={value!r}: expected one of {allowed}')
    least = {
      'data.train_size': 1,
      'data.eval_size': 1,
      'quant.block_size': 2,
      'train.steps': 1,
      'train.batch_size': 1,
      'train.seq_len': 0,
      'train.microbatches': 1,
      'train.save_every': 1,
      'optim.lr': 0,
      'optim.warmup_steps': 0,
      'optim.weight_decay': 0,
      'optim.clip': 0,
      'eval.shots': 0,
      'eval.batch_size': 1,
      'eval.max_new_tokens': 1,
    }
    for key, low in least.items():
      section, field = key.split('.')
      value = getattr(getattr(self, section), field)
      if value < low:
        raise ValueError(f'config.{key}={value}: expected at least {low}')
    if self.adapter.method == 'none' and self.quant.format != 'none':
      raise ValueError(
        "config.adapter.method='none' trains every weight, and a quantized "
        'weight cannot be trained: set config.quant.format="none", or choose '
        "an adapter ('lora', 'dora')"
      )
    if self.train.batch_size % self.train.microbatches:
      raise ValueError(
        f'config.train.microbatches={self.train.microbatches} does not divide '
        f'config.train.batch_size={self.train.batch_size}'
      )
    self.adapter.spec()

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
  missing = [key for key in hints if key not in values]
  if missing:
    raise ValueError(f'{where} lacks {", ".join(missing)}')
  return cls(**{k: _value(hints[k], values[k], f'{where}.{k}') for k in hints})


def _value(hint: Any, value: Any, where: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return _section(hint, value, where)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  kind = getattr(hint, '__origin__', hint)
  if not isinstance(value, kind) or (hint is int and isinstance(value, bool)):
    raise ValueError(
      f'{where}={value!r} is of type {type(value).__name__}, expected '
      f'{kind.__name__}'
    )
  return value
