"""PEFT files: exact both ways, and nothing foreign is read as if known."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from golden import weights
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  init_adapter,
  load_adapter,
  paths,
  save_adapter,
)
from qdora_jax.adapter import Adapter

WEIGHTS = 'adapter_model.safetensors'
CONFIG = 'adapter_config.json'


def made(spec, tied=True):
  _, base, _ = tiny.loaded(tied)
  return base, tiny.perturbed(init_adapter(jax.random.key(1), base, spec))


def assert_equal(got, want):
  """Every adapted kernel has the same numbers and the same scale."""
  got, want = paths.flatten(got), paths.flatten(want)
  assert got.keys() == want.keys()
  for path, node in want.items():
    mine = got[path]
    assert mine.names == node.names
    assert mine.ranks == node.ranks
    stacked = path.startswith('layers')
    for n, (name, rank) in enumerate(zip(node.names, node.ranks, strict=True)):
      assert mine.spec.scale_of(name) == pytest.approx(node.spec.scale_of(name))
      if not rank:
        continue
      at = n if stacked else ...
      a, b = mine.lora_a[at], mine.lora_b[at]
      np.testing.assert_array_equal(a[:, :rank], node.lora_a[at][:, :rank])
      np.testing.assert_array_equal(b[:rank], node.lora_b[at][:rank])
      assert not a[:, rank:].any()
      assert not b[rank:].any()
      if node.magnitude is None:
        assert mine.magnitude is None
      else:
        np.testing.assert_array_equal(mine.magnitude[at], node.magnitude[at])


SPECS = {
  'plain': {},
  'rslora': {'rslora': True},
  'dropout': {'dropout': 0.1},
  'ranks by layer': {
    'rank_pattern': {r'layers/1/.*': 6, r'.*/down/kernel': 2},
    'alpha_pattern': {r'layers/[02]/attn/q/.*': 3.0, r'.*/up/kernel': 16.0},
  },
  'partial layers': {'targets': r'layers/[12]/(attn/q|mlp/down)/kernel'},
  'rank 0': {'rank_pattern': {r'layers/0/attn/.*': 0}},
}


@pytest.mark.parametrize('method', ['lora', 'dora'])
@pytest.mark.parametrize('options', SPECS.values(), ids=SPECS)
def test_saved_and_loaded_is_the_same(tmp_path, method, options):
  base, adapter = made(AdapterSpec(method, 4, 8.0, **options))
  save_adapter(tmp_path, adapter)
  loaded = load_adapter(tmp_path, base)
  assert_equal(loaded, adapter)
  node = next(iter(paths.flatten(loaded).values()))
  assert isinstance(node, Adapter)
  assert node.spec.method == method
  assert node.spec.dropout == options.get('dropout', 0.0)
  # And what was loaded is written as the same bytes again.
  save_adapter(tmp_path / 'again', loaded)
  for file in (WEIGHTS, CONFIG):
    again = (tmp_path / 'again' / file).read_bytes()
    assert again == (tmp_path / file).read_bytes()


def test_an_adapted_head_is_saved_and_loaded(tmp_path):
  spec = AdapterSpec('dora', 4, 8.0, targets=r'.*/q/kernel|lm_head/kernel')
  base, adapter = made(spec, tied=False)
  save_adapter(tmp_path, adapter)
  tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
  assert tensors['base_model.model.lm_head.lora_A.weight'].shape == (4, 64)
  assert_equal(load_adapter(tmp_path, base), adapter)


def test_files_are_named_and_shaped_as_pefts(tmp_path):
  spec = AdapterSpec(
    'dora',
    4,
    8.0,
    rank_pattern={r'layers/1/.*': 6},
    targets=r'.*/(q|up)/kernel',
  )
  _, adapter = made(spec)
  save_adapter(tmp_path, adapter, 'owner/model')
  with safetensors.safe_open(tmp_path / WEIGHTS, 'numpy') as file:
    assert file.metadata() == {'format': 'pt'}
    got = {k: file.get_tensor(k) for k in file.keys()}
  want, sizes = {}, {'attn/q': (64, 64), 'mlp/up': (64, 128)}
  for layer in range(3):
    rank = 6 if layer == 1 else 4
    for linear, (i, o) in sizes.items():
      at = f'base_model.model.{weights.hf_module(layer, linear)}.lora_'
      want[f'{at}A.weight'] = (rank, i)
      want[f'{at}B.weight'] = (o, rank)
      want[f'{at}magnitude_vector'] = (o,)
  assert {k: v.shape for k, v in got.items()} == want
  assert {v.dtype for v in got.values()} == {np.dtype('float32')}
  node = adapter['layers']['mlp']['up']['kernel']
  at = f'base_model.model.{weights.hf_module(1, "mlp/up")}.lora_'
  np.testing.assert_array_equal(got[f'{at}A.weight'], node.lora_a[1].T)
  np.testing.assert_array_equal(got[f'{at}B.weight'], node.lora_b[1].T)
  config = json.loads((tmp_path / CONFIG).read_text())
  modules = {weights.hf_module(n, m) for n in range(3) for m in sizes}
  assert config['target_modules'] == ['q_proj', 'up_proj']
  assert config['base_model_name_or_path'] == 'owner/model'
  second = {m: 6 for m in modules if '.1.' in m}
  assert config['rank_pattern'] == second
  fields = ('peft_type', 'r', 'lora_alpha', 'use_dora', 'use_rslora', 'bias')
  assert [config[f] for f in fields] == ['LORA', 4, 8.0, True, False, 'none']


def rewrite(folder, change):
  """The weights file again, each name through change (None drops it)."""
  tensors = safetensors.numpy.load_file(folder / WEIGHTS)
  changed = {change(k): v for k, v in tensors.items() if change(k)}
  safetensors.numpy.save_file(changed, folder / WEIGHTS)


def reconfigure(folder, **options):
  path = folder / CONFIG
  config = json.loads(path.read_text()) | options
  config = {k: v for k, v in config.items() if v is not ...}
  path.write_text(json.dumps(config))


@pytest.fixture
def saved(tmp_path):
  base, adapter = made(AdapterSpec('dora', 4, 8.0, targets='.*/(q|up)/kernel'))
  save_adapter(tmp_path, adapter)
  return tmp_path, base, adapter


def test_both_names_of_the_magnitude_are_read(saved):
  folder, base, adapter = saved
  rewrite(folder, lambda k: re.sub(r'(magnitude_vector)$', r'\1.weight', k))
  assert_equal(load_adapter(folder, base), adapter)


def test_pefts_patterns_by_the_tail_of_a_name_are_read(saved):
  """Ranks are the tensors' own; alphas are matched as PEFT matches them."""
  folder, base, _ = saved
  reconfigure(folder, alpha_pattern={'up_proj': 2, r'0\.self_attn\.q_proj': 4})
  node = load_adapter(folder, base)['layers']['attn']['q']['kernel']
  scales = [node.spec.scale_of(name) for name in node.names]
  assert scales == [1.0, 2.0, 2.0]
  node = load_adapter(folder, base)['layers']['mlp']['up']['kernel']
  assert node.spec.scale_of(node.names[0]) == 0.5


@pytest.mark.parametrize('file', [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(saved, file):
  folder, base, _ = saved
  (folder / file).unlink()
  with pytest.raises(FileNotFoundError, match=f'{folder} has no {file}'):
    load_adapter(folder, base)


@pytest.mark.parametrize(
  'option, value',
  [
    ('peft_type', 'LOHA'),
    ('bias', 'all'),
    ('fan_in_fan_out', True),
  ],
)
def test_unsupported_options_are_refused(saved, option, value):
  folder, base, _ = saved
  reconfigure(folder, **{option: value})
  with pytest.raises(ValueError, match='is not supported') as error:
    load_adapter(folder, base)
  assert f'{folder}: {option}={value!r}' in str(error.value)


def test_a_tensor_that_is_not_understood_is_refused(saved):
  """PEFT's lora_bias=True adds these; dropping them would change outputs."""
  folder, base, _ = saved
  tensors = safetensors.numpy.load_file(folder / WEIGHTS)
  at = f'base_model.model.{weights.hf_module(0, "attn/q")}.lora_B.bias'
  tensors[at] = np.ones(64, np.float32)
  safetensors.numpy.save_file(tensors, folder / WEIGHTS)
  with pytest.raises(ValueError, match=r'lora_B\.bias'):
    load_adapter(folder, base)


def test_a_module_the_base_has_not(saved):
  folder, base, _ = saved
  rewrite(folder, lambda k: k.replace('layers.2', 'layers.7'))
  with pytest.raises(ValueError) as error:
    load_adapter(folder, base)
  assert "no module 'model.layers.7.mlp.up_proj'; near: " in str(error.value)
  assert 'mlp.up_proj' in str(error.value).partition('near: ')[2]


def test_another_models_shapes(saved):
  folder, _, _ = saved
  _, base, _ = tiny.loaded(tied=False)
  words = r'lora_B of layers/0/attn/q/kernel is \(64, 4\), .*needs \(128, 4\)'
  with pytest.raises(ValueError, match=words):
    load_adapter(folder, base)


@pytest.mark.parametrize('part', ['A.weight', 'B.weight', 'magnitude_vector'])
def test_a_missing_tensor_is_named(saved, part):
  folder, base, _ = saved
  name = weights.hf_module(1, 'attn/q')
  rewrite(folder, lambda k: None if f'{name}.lora_{part}' in k else k)
  with pytest.raises(ValueError, match='layers/1/attn/q/kernel is None'):
    load_adapter(folder, base)


@pytest.mark.parametrize('option', ['lora_alpha', 'lora_dropout'])
def test_a_missing_option_is_named(saved, option):
  folder, base, _ = saved
  reconfigure(folder, **{option: ...})
  with pytest.raises(ValueError, match=option):
    load_adapter(folder, base)


def test_a_file_without_tensors(saved):
  folder, base, _ = saved
  rewrite(folder, lambda k: None)
  with pytest.raises(ValueError, match=str(folder)):
    load_adapter(folder, base)


def test_magnitudes_alone_have_no_peft_form(tmp_path):
  _, adapter = made(AdapterSpec('magnitude'))
  with pytest.raises(ValueError, match='PEFT has no magnitude-only adapter'):
    save_adapter(tmp_path / 'out', adapter)
  assert not (tmp_path / 'out').exists()


def test_a_failing_disk_leaves_the_old_files_whole(saved, monkeypatch):
  folder, base, adapter = saved
  before = (folder / WEIGHTS).read_bytes()

  def half(path, data):
    with path.open('wb') as file:
      file.write(data[: len(data) // 2])
    raise OSError('No space left on device')

  monkeypatch.setattr('pathlib.Path.write_bytes', half)
  with pytest.raises(OSError, match='No space'):
    save_adapter(folder, tiny.perturbed(adapter, 9))
  monkeypatch.undo()
  assert (folder / WEIGHTS).read_bytes() == before
  assert_equal(load_adapter(folder, base), adapter)
