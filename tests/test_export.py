"""What is exported is the model that was trained."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from golden import families, ours, weights
from safetensors import safe_open
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  export_base,
  export_folded,
  export_merged,
  init_adapter,
  load_adapter,
  load_pretrained,
  paths,
)

TOKENS = np.arange(3, 19, dtype=np.int32).reshape(2, 8)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tiny.write(tmp_path_factory.mktemp('source'))
  (folder / 'generation_config.json').write_text('{"eos_token_id": 2}')
  (folder / 'pytorch_model.bin').write_bytes(b'a pickle')
  return folder


def trained(source, method='dora', double=True, **options):
  quant = QuantSpec(double_quant=double)
  model, base, _ = load_pretrained(source, quant, remat='none')
  spec = AdapterSpec(method, rank=4, **options)
  adapter = init_adapter(jax.random.key(0), base, spec)
  return model, base, tiny.perturbed(adapter)


def relative(got, want):
  return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize('method', ['lora', 'dora'])
def test_merged(source, method, tmp_path):
  model, base, adapter = trained(source, method)
  export_merged(tmp_path / 'out', base, adapter, source, 'float32')
  other, params, tokenizer = load_pretrained(tmp_path / 'out', remat='none')
  assert other == model
  assert tokenizer.encode('1+2=') == tiny.loaded()[2].encode('1+2=')
  got = ours.logits(other, params, TOKENS)
  want = ours.logits(model, attach(base, adapter), TOKENS)
  assert relative(got, want) <= 1e-5
  names = {file.name for file in (tmp_path / 'out').iterdir()}
  assert names == {
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
    'tokenizer_config.json',
  }


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_merged_in_half_precision(source, dtype, tmp_path):
  _, base, adapter = trained(source)
  export_merged(tmp_path / 'a', base, adapter, source, 'float32')
  export_merged(tmp_path / 'b', base, adapter, source, dtype)
  kind = {'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}[dtype]
  config = json.loads((tmp_path / 'b' / 'config.json').read_text())
  assert config['dtype'] == dtype
  with (
    safe_open(tmp_path / 'a' / 'model.safetensors', 'np') as a,
    safe_open(tmp_path / 'b' / 'model.safetensors', 'np') as b,
  ):
    assert set(a.keys()) == set(b.keys())
    for name in a.keys():
      got = b.get_tensor(name)
      assert got.dtype == kind
      np.testing.assert_array_equal(got, a.get_tensor(name).astype(kind))


def test_full_fine_tuning_is_exported_merged(source, tmp_path):
  model, params, _ = load_pretrained(source, remat='none')
  moved = jax.tree.map(lambda a: a * 1.25, params)
  export_merged(tmp_path / 'out', {}, moved, source, 'float32')
  other, got, _ = load_pretrained(tmp_path / 'out', remat='none')
  assert other == model
  tiny.assert_same(got, moved)


def test_a_large_model_is_cut_into_files(source, tmp_path):
  _, base, adapter = trained(source)
  limit = 70_000
  args = (base, adapter, source, 'float32')
  export_merged(tmp_path / 'out', *args, max_file_bytes=limit)
  export_merged(tmp_path / 'one', *args)
  files = sorted((tmp_path / 'out').glob('*.safetensors'))
  assert len(files) > 2
  assert files[0].name == f'model-00001-of-{len(files):05}.safetensors'
  # Headers come on top of the tensors.
  assert all(file.stat().st_size < limit + 5000 for file in files)
  index = json.loads(
    (tmp_path / 'out' / 'model.safetensors.index.json').read_text()
  )
  assert {*index['weight_map'].values()} == {file.name for file in files}
  tiny.assert_same(
    load_pretrained(tmp_path / 'out')[1], load_pretrained(tmp_path / 'one')[1]
  )


@pytest.mark.parametrize('double', [False, True])
def test_the_base_comes_back_to_the_bit(source, double, tmp_path):
  _, base, _ = trained(source, double=double)
  export_base(tmp_path / 'out', base, source, 'float32')
  _, got, _ = load_pretrained(tmp_path / 'out')
  tiny.assert_same(got, base)


@pytest.mark.parametrize(
  ('targets', 'dense'),
  [(r'.*/(q|down)/kernel', ('k', 'v', 'o', 'gate', 'up')), (None, ())],
)
def test_linear_layers_that_are_not_in_four_bits_are_named(
  source, targets, dense, tmp_path
):
  """Told none, transformers takes all of them for quantized."""
  quant = QuantSpec(targets) if targets else QuantSpec()
  _, base, _ = load_pretrained(source, quant, remat='none')
  export_base(tmp_path / 'out', base, source, 'float32')
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  skipped = config['quantization_config']['llm_int8_skip_modules']
  if not dense:
    assert skipped is None
    return
  group = {'k': 'self_attn', 'v': 'self_attn', 'o': 'self_attn'}
  assert sorted(skipped) == sorted(
    [
      f'model.layers.{n}.{group[m] if m in group else "mlp"}.{m}_proj'
      for n in range(3)
      for m in dense
    ]
    + ['lm_head']
  )


@pytest.mark.parametrize('method', ['lora', 'dora'])
def test_folded(source, method, tmp_path):
  model, base, adapter = trained(source, method)
  export_folded(tmp_path / 'out', base, adapter, source)
  other, folded, _ = load_pretrained(tmp_path / 'out' / 'model', remat='none')
  plain = load_adapter(tmp_path / 'out' / 'adapter', folded)
  for path, leaf in paths.flatten(folded).items():
    if hasattr(leaf, 'codes'):
      before = paths.flatten(base)[path]
      np.testing.assert_array_equal(leaf.codes, before.codes)
  assert all(n.magnitude is None for n in paths.flatten(plain).values())
  got = ours.logits(other, attach(folded, plain), TOKENS)
  want = ours.logits(model, attach(base, adapter), TOKENS)
  assert relative(got, want) <= 1e-5


def test_folded_with_a_norm_and_a_head_beside(source, tmp_path):
  model, base, adapter = trained(source, trainable=r'.*norm/scale')
  adapter['final_norm']['scale'] *= 1.5
  export_folded(tmp_path / 'out', base, adapter, source)
  _, folded, _ = load_pretrained(tmp_path / 'out' / 'model', remat='none')
  plain = load_adapter(tmp_path / 'out' / 'adapter', folded)
  got = ours.logits(model, attach(folded, plain), TOKENS)
  want = ours.logits(model, attach(base, adapter), TOKENS)
  assert relative(got, want) <= 1e-5


def test_a_negative_magnitude_is_not_folded(source, tmp_path):
  _, base, adapter = trained(source)
  node = adapter['layers']['attn']['q']['kernel']
  flipped = node.magnitude.at[1, :3].multiply(-1)
  adapter['layers']['attn']['q']['kernel'] = node.replace(magnitude=flipped)
  words = "3 of layers/attn/q/kernel.*'merged'"
  with pytest.raises(ValueError, match=words):
    export_folded(tmp_path / 'out', base, adapter, source)
  assert not list(tmp_path.iterdir())


def test_merging_into_four_bits_is_refused(source, tmp_path):
  _, base, adapter = trained(source)
  with pytest.raises(ValueError, match=r'loses what was trained.*folded'):
    export_merged(tmp_path / 'out', base, adapter, source, 'nf4')
  assert not list(tmp_path.iterdir())


def test_nothing_good_is_written_over(source, tmp_path):
  _, base, adapter = trained(source)
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'thesis.txt').write_text('good')
  for call in (
    lambda: export_merged(tmp_path / 'out', base, adapter, source),
    lambda: export_folded(tmp_path / 'out', base, adapter, source),
    lambda: export_base(tmp_path / 'out', base, source),
  ):
    with pytest.raises(FileExistsError, match='out exists and is not empty'):
      call()
  assert (tmp_path / 'out' / 'thesis.txt').read_text() == 'good'


def test_a_failure_leaves_nothing_behind(source, tmp_path, monkeypatch):
  _, base, adapter = trained(source)

  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('qdora_jax.export.write_tensors', fail)
  with pytest.raises(OSError, match='No space'):
    export_merged(tmp_path / 'out', base, adapter, source)
  assert not list(tmp_path.iterdir())


def test_without_a_quantized_base_there_is_none_to_export(source, tmp_path):
  _, params, _ = load_pretrained(source)
  with pytest.raises(ValueError, match='nothing in the tree is quantized'):
    export_base(tmp_path / 'out', params, source)


@pytest.mark.parametrize('name', families.CONFIGS)
def test_every_family_comes_back(name, tmp_path):
  """Written and read again: the same tensors, the same config."""
  folder = weights.write_hf(tmp_path / 'in', *families.make(name))
  model, params, _ = load_pretrained(folder)
  export_merged(tmp_path / 'out', {}, params, folder, 'float32')
  other, got, _ = load_pretrained(tmp_path / 'out')
  assert other == model
  tiny.assert_same(got, params)
  _, want = families.make(name)
  with safe_open(tmp_path / 'out' / 'model.safetensors', 'np') as file:
    assert set(file.keys()) == want.keys()
    for key, tensor in want.items():
      np.testing.assert_array_equal(file.get_tensor(key), tensor)


def test_what_is_trained_on_four_bits_stays_four_bits(source, tmp_path):
  """A bitsandbytes checkpoint is loaded as it is, whatever QuantSpec says."""
  _, base, _ = trained(source, double=False)
  export_base(tmp_path / 'out', base, source, 'float32')
  for quant in (None, QuantSpec(block_size=32, double_quant=True)):
    _, got, _ = load_pretrained(tmp_path / 'out', quant)
    leaf = got['layers']['mlp']['up']['kernel']
    assert leaf.codes.dtype == jnp.uint8
    assert (leaf.block_size, leaf.nested) == (64, None)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
  """numpy's memory while 24 MB are written, by Python's own count."""
  config, tensors = weights.tiny_llama(0)
  config |= {'intermediate_size': 8192, 'num_hidden_layers': 4}
  tensors |= {
    k.replace('.0.', f'.{n}.'): w
    for k, w in tensors.items()
    for n in range(4)
    if '.layers.0.' in k
  }
  tensors |= {
    k: weights.matrix(1, (64, 8192) if 'down' in k else (8192, 64))
    for k in tensors
    if '.mlp.' in k
  }
  source = weights.write_hf(tmp_path / 'in', config, tensors)
  _, params, _ = load_pretrained(source)
  largest = 8192 * 64 * 4
  export_merged(tmp_path / 'first', {}, params, source, 'float32')
  tracemalloc.start()
  export_merged(tmp_path / 'out', {}, params, source, 'float32')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  written = (tmp_path / 'out' / 'model.safetensors').stat().st_size
  assert written > 10 * largest
  # Its transpose, and what Python needs.
  assert peak < 2.5 * largest
