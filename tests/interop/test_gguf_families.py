"""GGUF files of every family are the directories they were made from."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip('gguf', reason="pip install 'qdora_jax[demo]'")

import gguf
from golden import families, gguf_files

from qdora_jax.interop.families import model_config
from qdora_jax.interop.gguf import GGUFCheckpoint

# What a GGUF has no words for: llama.cpp knows it by heart, or does not use it.
CHANGES = {
  'gemma2': {'query_pre_attn_scalar': 24},
  'gemma3': {'query_pre_attn_scalar': 24, 'layer_types': None},
  'smollm3': {'no_rope_layers': None, 'no_rope_layer_interval': 4},
  'mistral': {'sliding_window': None},
  'qwen2': {'use_sliding_window': False},
  'qwen3': {
    'rope_parameters': families.CONFIGS['llama_yarn']['rope_parameters']
  },
}


def made(name):
  config, tensors = families.make(name)
  changed = CHANGES.get(name, {})
  return {**config, **changed}, tensors


@pytest.mark.parametrize('name', families.CONFIGS)
def test_a_file_of_every_family(name, tmp_path):
  config, tensors = made(name)
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
  config, tensors = made('llama2')
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
  config, tensors = made('llama2')
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
