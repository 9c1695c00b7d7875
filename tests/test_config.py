"""The door: every key accounted for, every refusal says what and where."""

import dataclasses
from pathlib import Path

import pytest
import tiny

from qdora_jax import AdapterSpec, QuantSpec
from qdora_jax.config import (
  AdapterSection,
  DataSection,
  EvalSection,
  LogSection,
  ModelSection,
  OptimSection,
  RunConfig,
  TrainSection,
  later,
)


def test_base_py_lists_every_key():
  values = tiny.config('none')
  config = RunConfig.make(values)

  def compare(mine, theirs):
    assert {f.name for f in dataclasses.fields(mine)} == theirs.keys()
    for name, value in theirs.items():
      field = getattr(mine, name)
      if dataclasses.is_dataclass(field):
        compare(field, value)
      else:
        assert field == value

  compare(config, values)


def test_sections_become_specs():
  config = tiny.run_config('none', **{'adapter.rank_pattern': {'.*/q/.*': 2}})
  spec = config.adapter.spec()
  assert isinstance(spec, AdapterSpec)
  assert (spec.method, spec.rank, spec.alpha) == ('dora', 4, 8.0)
  assert spec.rank_of('layers/0/attn/q/kernel') == 2
  assert config.quant.spec() == QuantSpec()
  config = tiny.run_config(
    'none', **{'adapter.method': 'none', 'quant.format': 'none'}
  )
  assert config.adapter.spec() is None
  assert config.quant.spec() is None


def changed(key, value, drop=False):
  values = tiny.config('none')
  *section, last = key.split('.')
  node = values[section[0]] if section else values
  if drop:
    del node[last]
  else:
    node[last] = value
  return values


@pytest.mark.parametrize(
  'key, words',
  [
    ('adapter.rnak', r'config\.adapter\.rnak is no key; .*adapter\.rank\?'),
    (
      'optim.learning',
      r'config\.optim\.learning is no key .*keys: name, lr, sch',
    ),
    ('trian', r'config\.trian is no key; did you mean config\.train\?'),
  ],
)
def test_an_unknown_key_names_the_nearest(key, words):
  with pytest.raises(ValueError, match=words):
    RunConfig.make(changed(key, 1))


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('train.steps', '3', "config.train.steps='3' is of type str, expected int"),
    ('train.steps', 3.0, 'config.train.steps=3.0 is of type float, .* int'),
    ('train.steps', True, 'config.train.steps=True is of type bool, .* int'),
    ('optim.lr', True, 'config.optim.lr=True is of type bool, expected float'),
    ('quant.double_quant', 1, 'double_quant=1 is of type int, expected bool'),
    ('data.options', 'x', "data.options='x' is of type str, expected Mapping"),
    ('data.fields', {'a': 1}, 'fields.a=1 is of type int, expected str'),
    ('optim.lr_scale', {'x': 'y'}, "lr_scale.x='y' is of type str, .* float"),
    ('seed', None, 'config.seed=None is of type NoneType, expected int'),
    ('train', 3, 'config.train: expected a section, got 3'),
  ],
)
def test_a_wrong_type_is_named(key, value, words):
  with pytest.raises(ValueError, match=words):
    RunConfig.make(changed(key, value))


def test_a_whole_number_is_a_float_too():
  config = RunConfig.make(changed('adapter.alpha', 3))
  assert config.adapter.alpha == 3.0
  assert isinstance(config.adapter.alpha, float)


@pytest.mark.parametrize('key', ['seed', 'train', 'data.path', 'optim.lr'])
def test_a_missing_key_is_named(key):
  *section, last = key.split('.')
  where = '.'.join(['config', *section])
  with pytest.raises(ValueError, match=f'^{where} lacks {last}$'):
    RunConfig.make(changed(key, None, drop=True))


@pytest.mark.parametrize(
  'key, expected',
  [
    ('model.dtype', 'bfloat16'),
    ('model.remat', 'block'),
    ('model.attention', 'flash'),
    ('quant.format', 'nf4'),
    ('adapter.method', 'dora'),
    ('optim.schedule', 'cosine'),
  ],
)
def test_a_value_that_is_no_choice_lists_them(key, expected):
  words = f"config.{key}='int3': expected one of .*'{expected}'"
  with pytest.raises(ValueError, match=words):
    RunConfig.make(changed(key, 'int3'))


def test_full_fine_tuning_of_a_quantized_base_is_refused_with_the_reason():
  words = 'method=\'none\'.*a quantized weight cannot be trained.*format="none"'
  with pytest.raises(ValueError, match=words):
    RunConfig.make(changed('adapter.method', 'none'))


def test_microbatches_divide_the_batch():
  words = r'microbatches=3 does not divide config\.train\.batch_size=8'
  with pytest.raises(ValueError, match=words):
    RunConfig.make(changed('train.microbatches', 3))


@pytest.mark.parametrize(
  'key, value',
  [
    ('train.steps', -1),
    ('train.batch_size', 0),
    ('train.seq_len', -1),
    ('train.microbatches', 0),
    ('train.save_every', 0),
    ('eval.batch_size', 0),
    ('eval.max_new_tokens', 0),
    ('eval.shots', -1),
    ('data.eval_size', -1),
    ('data.train_size', -1),
    ('train.max_skipped', 0),
    ('train.keep_last', 0),
    ('train.keep_best', -1),
    ('optim.lr', float('nan')),
    ('mesh.fsdp', -2),
    ('mesh.data', 0),
    ('optim.warmup_steps', -1),
    ('quant.block_size', 0),
  ],
)
def test_a_number_out_of_range_is_refused(key, value):
  with pytest.raises(ValueError, match=rf'{key}={value}'):
    RunConfig.make(changed(key, value))


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('adapter.rank', 0, 'rank=0: expected at least 1'),
    ('adapter.alpha', 0.0, 'alpha=0.0: expected more than 0'),
    ('adapter.dropout', 1.0, 'dropout=1.0: expected 0 <= dropout < 1'),
  ],
)
def test_what_the_adapter_refuses_is_refused_at_the_door(key, value, words):
  with pytest.raises(ValueError, match=words):
    RunConfig.make(changed(key, value))


def test_patterns_by_name_come_through_a_config_file_in_order(tmp_path):
  from qdora_jax.config_file import read_config

  base = Path(__file__).parents[1] / 'experiments' / 'configs' / 'base.py'
  file = tmp_path / 'config.py'
  file.write_text(
    base.read_text().replace(
      '  return config\n',
      "  config.adapter.rank_pattern['.*/q/kernel'] = 8\n"
      "  config.adapter.rank_pattern['.*/attn/.*'] = 2\n"
      '  return config\n',
    )
  )
  spec = read_config(str(file), []).adapter.spec()
  assert spec.rank_pattern == (('.*/q/kernel', 8), ('.*/attn/.*', 2))
  assert spec.rank_of('layers/0/attn/q/kernel') == 8


def test_a_folder_of_an_earlier_version_is_the_same_run():
  """Keys added since mean what was done before there were any."""
  values = tiny.config('model')
  sections = {
    'model': ModelSection,
    'data': DataSection,
    'adapter': AdapterSection,
    'train': TrainSection,
    'optim': OptimSection,
    'eval': EvalSection,
  }
  added = {name: later(section) for name, section in sections.items()}
  assert added == {
    'model': {'attention': 'auto'},
    'data': {'learn_prompts': False, 'train_rows': 'first'},
    'adapter': {'init': 'kaiming', 'projection_seed': 0},
    'train': {'keep_last': 2, 'keep_best': 0, 'ignore_plan': False},
    'optim': {'paged': 'none'},
    'eval': {'benchmarks': {}, 'beams': 1},
  }
  now = RunConfig.make(values)
  for section, keys in added.items():
    for key in keys:
      del values[section][key]
  # Who follows a run is no part of it.
  assert now.log == LogSection(**values.pop('log'))
  followed = dataclasses.replace(now, log=LogSection(tensorboard=True))
  assert followed.settings() == now.settings()
  before = RunConfig.make(values)
  assert before == now
  assert before.settings() == now.settings() == values
  values['adapter']['init'] = 'pissa'
  assert RunConfig.make(values).settings() != now.settings()
  # A typo is one still, and what never had a default is needed.
  values['adapter']['inti'] = 'pissa'
  with pytest.raises(ValueError, match=r'inti is no key; did you mean .*init'):
    RunConfig.make(values)
  del values['adapter']['inti'], values['adapter']['rank']
  with pytest.raises(ValueError, match=r'config\.adapter lacks rank'):
    RunConfig.make(values)
