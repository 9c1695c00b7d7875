"""GGUF files of every family are the directories they were made from."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip('gguf', reason="pip install 'qdora_jax[demo]'")

import gguf
from golden import cases, families, gguf_files, ours
from tiny import quick_compiles  # noqa: F401

from qdora_jax import load_pretrained
from qdora_jax.interop.families import model_config
from qdora_jax.interop.gguf import GGUFCheckpoint

LOGITS = np.load(cases.HERE / 'families.npz')


def written(folder, name, more=None, rope=None):
  """The file of a family's model with more metadata and rotary settings."""
  config, tensors = families.as_gguf(name)
  if rope:
    config['rope_parameters'] = config['rope_parameters'] | rope
  return gguf_files.write(folder / 'model.gguf', config, tensors, more=more)


def logits_of(path):
  model, params, _ = load_pretrained(path, remat='none')
  return ours.logits(model, params, families.prompt())


@pytest.mark.parametrize('name', families.CONFIGS)
def test_a_file_of_every_family(name, tmp_path):
  config, tensors = families.as_gguf(name)
  path = gguf_files.write(tmp_path / 'model.gguf', config, tensors)
  checkpoint = GGUFCheckpoint(path)
  assert checkpoint.shapes == {k: w.shape for k, w in tensors.items()}
  for key, w in tensors.items():
    got = checkpoint.read(key)
    if 'gemma' in name and key.endswith('norm.weight'):
      # 1 was added and taken away again.
      np.testing.assert_allclose(got, w, atol=1e-7)
    else:
      np.testing.assert_array_equal(got, w)
  got, want = (model_config(c, 'here') for c in (checkpoint.config, config))
  assert without_rope(got) == without_rope(want)
  for mine, theirs in zip(got.kinds, want.kinds, strict=True):
    assert mine.window == theirs.window
    assert_same_turns(mine.rope, theirs.rope)


@pytest.mark.parametrize('name', families.CONFIGS)
def test_logits_are_those_of_the_directory_in_transformers(name, tmp_path):
  want = LOGITS[f'{name}.gguf' if name in families.AS_GGUF else name]
  assert ours.relative(logits_of(written(tmp_path, name)), want) <= 1e-5


def test_a_llama_with_a_window_is_a_mistral(tmp_path):
  """Which the converter does not write, and llama.cpp does not use."""
  path = written(tmp_path, 'mistral', {'attention.sliding_window': 6})
  config = GGUFCheckpoint(path).config
  assert config['model_type'] == 'mistral'
  assert config['architectures'] == ['MistralForCausalLM']
  assert ours.relative(logits_of(path), LOGITS['mistral']) <= 1e-5


def test_the_amplitude_of_yarn(tmp_path):
  """transformers' attention_factor: here what its mscales come to."""
  amplitude = (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1)
  path = written(tmp_path, 'qwen3', rope={'attention_factor': amplitude})
  assert ours.relative(logits_of(path), LOGITS['qwen3']) <= 1e-5


@pytest.mark.parametrize('change', [{'beta_fast': 1.0}, {'beta_slow': 0.25}])
def test_the_ramp_of_yarn(change, tmp_path):
  """The tiny qwen3's own is flat: so short a text turns no pair 8 times."""
  path = written(tmp_path, 'qwen3', rope=change)
  plain, _ = families.as_gguf('qwen3')
  rope = plain['rope_parameters'] | change
  got, want, other = (
    model_config(config, 'here').kinds[0].rope
    for config in (
      GGUFCheckpoint(path).config,
      plain | {'rope_parameters': rope},
      plain,
    )
  )
  assert_same_turns(got, want)
  assert got != other


def test_the_length_of_pretraining_lies_where_phi3_looks_for_it(tmp_path):
  config = GGUFCheckpoint(written(tmp_path, 'phi3_long')).config
  assert config['original_max_position_embeddings'] == 16
  inside = config['rope_parameters']['original_max_position_embeddings']
  assert inside == 16


@pytest.mark.parametrize(
  'more, pattern, theta',
  [
    ({}, 6, 1e4),
    ({'rope.freq_base_swa': 2e4}, 6, 2e4),
    ({'attention.sliding_window_pattern': 2}, 2, 1e4),
    ({'attention.sliding_window': 0}, 1, 1e4),
  ],
)
def test_layers_of_gemma3(more, pattern, theta, tmp_path):
  path = written(tmp_path, 'gemma3', more)
  config = GGUFCheckpoint(path).config
  assert config['sliding_window_pattern'] == pattern
  local = config['rope_parameters']['sliding_attention']
  assert local['rope_theta'] == theta
  kinds = model_config(config, 'here').kinds
  assert [kind.window for kind in kinds] == [
    None if (n + 1) % pattern == 0 else 6 for n in range(4)
  ]


def test_a_factor_of_no_type_is_linear(tmp_path):
  """As in llama.cpp."""
  path = written(tmp_path, 'llama2', {'rope.scaling.factor': 4.0})
  rope = GGUFCheckpoint(path).config['rope_parameters']
  assert rope == {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.0}


# What would change the logits, by family; refused by name and value.
FOREIGN = [
  ('llama2', 'attention.scale', 0.5),
  ('llama2', 'logit_scale', 2.0),
  ('llama2', 'final_logit_softcapping', 30.0),
  ('llama2', 'attn_logit_softcapping', 50.0),
  ('llama2', 'attention.causal', False),
  ('llama2', 'attention.max_alibi_bias', 8.0),
  ('llama2', 'attention.clamp_kqv', 8.0),
  ('llama2', 'use_parallel_residual', True),
  ('llama2', 'rope.freq_base_swa', 1e5),
  ('llama2', 'rope.scaling.attn_factor', 1.5),
  ('llama2', 'rope.scaling.yarn_beta_fast', 8.0),
  ('llama2', 'rope.scaling.type', 'longrope'),
  ('llama2', 'rope.dimension_count_swa', 8),
  ('llama2', 'attention.key_length_swa', 8),
  ('llama2', 'attention.value_length', 8),
  ('llama2', 'expert_used_count', 2),
  ('llama2', 'a_setting_of_next_year', 'on'),
  ('llama3', 'attention.sliding_window', 6),
  ('llama_yarn', 'rope.scaling.attn_factor', 1.5),
  ('llama_yarn', 'rope.scaling.yarn_ext_factor', 0.5),
  ('llama_yarn', 'rope.scaling.yarn_log_multiplier', 1.0),
  ('qwen2', 'attention.sliding_window', 6),
  ('qwen2', 'rope.dimension_count', 8),
  ('qwen3', 'attention.sliding_window', 6),
  ('gemma2', 'attention.sliding_window_pattern', 4),
  ('gemma2', 'attention.sliding_window', 0),
  ('olmo2', 'attention.sliding_window_pattern', [True, False]),
  ('granite', 'rope.scaling.finetuned', False),
]


@pytest.mark.parametrize('name, key, value', FOREIGN)
def test_what_would_change_the_logits_is_refused(name, key, value, tmp_path):
  # On files that are read without it.
  GGUFCheckpoint(written(tmp_path, name))
  path = written(tmp_path, name, {key: value})
  with pytest.raises(ValueError) as error:
    GGUFCheckpoint(path)
  said = str(error.value)
  assert f'.{key} is ' in said
  assert str(value) in said
  assert "Load the model's Hugging Face directory instead" in said


@pytest.mark.parametrize(
  'name, key, value',
  [
    ('llama2', 'tensor_data_layout', 'Meta AI original pth'),
    ('llama2', 'attention.causal', True),
    ('llama2', 'attention.layer_norm_epsilon', 1e-5),
    ('llama2', 'attention.sliding_window', 0),
    ('llama2', 'expert_used_count', 0),
    ('llama2', 'use_parallel_residual', False),
    ('llama_yarn', 'rope.scaling.finetuned', False),
    ('llama_yarn', 'rope.scaling.yarn_log_multiplier', 0.0),
    ('qwen3', 'pooling_type', 3),
    ('qwen3', 'vocab_size', 60),
    ('qwen3', 'rope.dimension_count', 24),
    ('granite', 'rope.scaling.finetuned', True),
  ],
)
def test_what_changes_no_logits_is_passed_over(name, key, value, tmp_path):
  config = GGUFCheckpoint(written(tmp_path, name)).config
  path = written(tmp_path, name, {key: value})
  assert GGUFCheckpoint(path).config == config


def without_rope(config):
  kinds = tuple(kind.window for kind in config.kinds)
  return dataclasses.replace(config, kinds=kinds)


def assert_same_turns(got, want):
  assert got.amplitude == pytest.approx(want.amplitude, rel=1e-6)
  np.testing.assert_allclose(got.frequencies, want.frequencies, rtol=1e-6)
  if want.long:
    assert got.beyond == want.beyond
    np.testing.assert_allclose(got.long, want.long, rtol=1e-6)
  elif got.long:
    # Llama 3's divisors are written as LongRoPE's, for any length.
    assert got.long == got.frequencies


KINDS = ['F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q8_0']


@pytest.mark.parametrize('kind', KINDS)
def test_storage_types(kind, tmp_path):
  config, tensors = families.as_gguf('llama2')
  path = gguf_files.write(tmp_path / 'model.gguf', config, tensors, kind)
  checkpoint = GGUFCheckpoint(path)
  key = 'model.layers.1.mlp.down_proj.weight'
  stored = gguf.GGMLQuantizationType[kind]
  want = gguf.dequantize(gguf.quantize(tensors[key], stored), stored)
  np.testing.assert_array_equal(checkpoint.read(key), want)
  error = np.abs(checkpoint.read(key) - tensors[key]).max()
  limits = {'F32': 0, 'F16': 1e-3, 'BF16': 4e-3, 'Q8_0': 6e-3}
  limit = limits.get(kind, 0.1)
  assert error <= limit * np.abs(tensors[key]).max()


@pytest.mark.parametrize('kind', ['Q4_K', 'Q5_K', 'Q6_K'])
def test_storage_types_that_gguf_only_reads(kind, tmp_path):
  """Blocks of 256 numbers of random bytes, with scales that are finite."""
  stored = gguf.GGMLQuantizationType[kind]
  config, tensors = families.as_gguf('llama2')
  config['intermediate_size'] = 256
  tensors = {
    k: np.resize(w, [256 if n == 128 else n for n in w.shape])
    for k, w in tensors.items()
  }
  key = 'model.layers.1.mlp.down_proj.weight'
  o, size = len(tensors[key]), gguf.GGML_QUANT_SIZES[stored][1]
  packed = np.random.RandomState(0).randint(0, 60, (o, size)).astype(np.uint8)
  path = gguf_files.write(
    tmp_path / 'model.gguf', config, tensors, raw={key: (packed, stored)}
  )
  checkpoint = GGUFCheckpoint(path)
  assert checkpoint.shapes[key] == (o, 256)
  got = checkpoint.read(key)
  assert np.isfinite(got).all()
  assert got.std() > 0
  np.testing.assert_array_equal(got, gguf.dequantize(packed, stored))


def test_an_unknown_architecture_names_the_nearest(tmp_path):
  path = tmp_path / 'model.gguf'
  writer = gguf.GGUFWriter(path, 'qwen2moe')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match=r"'qwen2moe' is not supported; near: q"):
    GGUFCheckpoint(path)
