"""Fields of a config.json, read one by one and every one accounted for.

A field that is read is handled or checked; one that is not must be known to
change no logits (`HARMLESS`), or say nothing (null, false, 0, empty). Anything
else is refused: a model is never loaded a little wrong.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from qdora_jax import rope
from qdora_jax.rope import Rope

# Of no effect on logits, or checked where weights are read. Dropout is a matter
# of pretraining; adapters have their own (config.adapter.dropout).
HARMLESS = re.compile(
  r'architectures|auto_map|.*dtype|transformers_version|transformers\.js_config'
  r'|use_cache|cache_implementation|_.*|name_or_path|tokenizer_class|unsloth_.*'
  r'|(bos|eos|pad|sep|unk|decoder_start)_token_id|initializer_range'
  r'|attention_dropout|hidden_dropout|embd_pdrop|resid_pdrop|classifier_dropout'
  r'|pretraining_tp|id2label|label2id'
  r'|task_specific_params|problem_type|finetuning_task|output_.*|return_dict'
  r'|torchscript|gradient_checkpointing|is_llama_config|chunk_size_feed_forward'
  r'|quantization_config'
  # Of generation, and what transformers' classes know nothing of.
  r'|(max|min)_(sequence_)?length|model_max_length|tokenizer_model_max_length'
  r'|do_sample|temperature|top_[kp]|repetition_penalty|num_beams'
  r'|full_attn_mod|interpolate_factor|sliding_window_size|rope_interleaved'
)


# Beyond all that means something: float32's range, and 32-bit shapes.
_MOST, _MOST_INT = 3e38, 2**31


class Fields:
  """A config.json that remembers which of its fields were read."""

  def __init__(self, config: Mapping[str, Any], where: str):
    self.config, self.where = config, where
    self.read: set[str] = set()

  def need(self, key: str, kind: type = int) -> Any:
    """A field that must be there."""
    self.read.add(key)
    if key not in self.config:
      raise ValueError(f'{self.where}: config.json has no {key!r}')
    return self._typed(key, self.config[key], kind)

  def take(self, key: str, kind: type, absent: Any, null: Any = None) -> Any:
    """A field, or its default where it is absent; null where it is null."""
    self.read.add(key)
    if key not in self.config:
      return absent
    if self.config[key] is None:
      return null
    return self._typed(key, self.config[key], kind)

  def above_zero(self, key: str, absent: float | None) -> Any:
    """A number above 0, its default where it is absent, or null."""
    value = self.take(key, float, absent)
    if value is not None and value <= 0:
      raise ValueError(
        f'{self.where}: config.json: {key}={value}: expected a number above 0'
      )
    return value

  def must(self, key: str, *known: Any) -> None:
    """A field whose other values are not supported; absent is the first."""
    self.read.add(key)
    if key in self.config and self.config[key] not in known:
      self.refuse(f'{key}={self.config[key]!r}', known[0])

  def refuse(self, what: str, known: Any) -> None:
    raise ValueError(
      f'{self.where}: {what} is not supported; supported: {known!r}'
    )

  def check_rest(self, family: str) -> None:
    """Every field that was not read must be harmless."""
    for key, value in self.config.items():
      empty = value is None or value is False or value in (0, '', [], {})
      if key in self.read or empty or HARMLESS.fullmatch(key):
        continue
      raise ValueError(
        f'{self.where}: config.json has {key}={str(value)[:60]!r}, which is '
        f"not understood for model_type {family!r} and may change the model's "
        'mathematics; if transformers ignores it, take it out of config.json'
      )

  def _typed(self, key: str, value: Any, kind: type) -> Any:
    return typed(value, kind, f'{self.where}: config.json: {key}')


def typed(value: Any, kind: type, what: str) -> Any:
  """The value, if it is of that type; whole numbers count something."""
  kinds = {int: 'a whole number above 0', float: 'a number'}
  fits = type(value) is kind or (kind is float and type(value) is int)
  if fits and kind is float:
    # Whole numbers may be beyond any float.
    fits = abs(value) < _MOST and math.isfinite(value)
  if not fits or (kind is int and not 1 <= value < _MOST_INT):
    expected = kinds[kind] if kind in kinds else kind.__name__
    raise ValueError(f'{what}={value!r}: expected {expected}')
  return value


def rope_of(f: Fields, head_dim: int, theta: float = 1e4) -> Rope:
  """rope_parameters of transformers 5, or rope_theta and rope_scaling."""
  return rope_from(f, rope_settings(f, theta), head_dim)


def rope_settings(f: Fields, theta: float) -> dict[str, Any]:
  """The settings of a model whose layers turn alike, in one place."""
  theta = f.take('rope_theta', float, theta, theta)
  parameters = f.take('rope_parameters', dict, {}, {})
  # transformers: where both stand, rope_scaling counts.
  scaling = f.take('rope_scaling', dict, {}, {})
  found = {'rope_theta': theta, **(scaling or parameters)}
  partial = f.take('partial_rotary_factor', float, 1.0, 1.0)
  return {'partial_rotary_factor': partial, **found}


def rope_from(
  f: Fields,
  settings: Mapping[str, Any],
  head_dim: int,
  partial: bool = False,
  pretrained: int = 0,
) -> Rope:
  """The frequencies that rope settings stand for.

  Args:
    f: for messages, and for the fields that lie beside the settings.
    settings: rope_type, rope_theta and what the type needs.
    head_dim: Dh.
    partial: whether the family turns a part of each head only.
    pretrained: the family's original_max_position_embeddings where the field is
      absent; 0 if its class has no such field.
  """
  left = {k: v for k, v in settings.items() if v is not None}
  kind = left.pop('rope_type', left.pop('type', 'default'))
  left.pop('type', None)

  def number(key: str, default: Any = None, kind: type = float) -> Any:
    where = f'{f.where}: config.json: rope_parameters: {key}'
    if key not in left:
      if default is None:
        raise ValueError(f'{where} is missing')
      return default
    value = typed(left.pop(key), kind, where)
    if kind is float and value <= 0:
      raise ValueError(f'{where}={value}: expected a number above 0')
    return value

  theta, share = number('rope_theta'), number('partial_rotary_factor', 1.0)
  if theta <= 1 or not 0 < share <= 1 or (share < 1 and not partial):
    f.refuse(f'rope_theta={theta}, partial_rotary_factor={share}', (1e4, 1.0))
  width = int(head_dim * share)
  if width % 2:
    f.refuse(f'a rotary width of {width}', 'an even one')
  longest = f.take('max_position_embeddings', int, 0)
  key = 'original_max_position_embeddings'
  beside = f.take(key, int, 0)
  original = beside or pretrained
  if kind in ('llama3', 'yarn', 'longrope'):
    # Families differ in the default.
    longest = f.need('max_position_embeddings')
    # transformers: the one beside the settings counts, be it the default of the
    # family's class.
    inside = number(key, original or longest, int)
    if pretrained and not beside and inside != pretrained:
      raise ValueError(
        f'{f.where}: config.json: rope_parameters: {key}={inside}, of which '
        'transformers takes no notice: it takes the one beside '
        f'rope_parameters, {pretrained} where that is absent. Write '
        f'{key}={inside} beside them, or {pretrained} among them'
      )
    original = original or inside
  if kind == 'default':
    made = rope.plain(theta, width)
  elif kind == 'linear':
    made = rope.linear(theta, width, number('factor'))
  elif kind == 'llama3':
    low, high = number('low_freq_factor'), number('high_freq_factor')
    made = rope.llama3(theta, width, number('factor'), low, high, original)
  elif kind == 'yarn':
    made = _yarn(number, theta, width, longest, original)
  elif kind == 'longrope':
    divisors = [number(f'{n}_factor', None, list) for n in ('short', 'long')]
    for values in divisors:
      if len(values) != width // 2:
        f.refuse(f'{len(values)} longrope factors', f'{width // 2} of them')
      for value in values:
        where = f'{f.where}: config.json: longrope factor'
        if typed(value, float, where) <= 0:
          raise ValueError(f'{where} {value}: expected a number above 0')
    factor = number('factor', longest / original)
    amplitude = number('attention_factor', 0.0) or None
    made = rope.longrope(
      theta, width, factor, original, *divisors, amplitude=amplitude
    )
  else:
    known = 'default, linear, llama3, yarn, longrope'
    f.refuse(f'rope_type={kind!r}', known)
  if left:
    f.refuse(f'rope_parameters: {left}', f'what rope_type={kind!r} needs')
  return made


def _yarn(
  number: Callable[..., Any],
  theta: float,
  width: int,
  longest: int,
  original: int,
) -> Rope:
  factor = number('factor', longest / original)
  amplitude = number('attention_factor', 0.0) or None
  scales = number('mscale', 0.0), number('mscale_all_dim', 0.0)
  if amplitude is None and all(scales):
    amplitude = rope.stretch(factor, scales[0]) / rope.stretch(
      factor, scales[1]
    )
  return rope.yarn(
    theta,
    width,
    factor,
    original,
    amplitude=amplitude,
    fast=number('beta_fast', 0.0) or 32.0,
    slow=number('beta_slow', 0.0) or 1.0,
    truncate=number('truncate', True, bool),
  )
