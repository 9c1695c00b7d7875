"""bitsandbytes' 4-bit tensors: read to the bit, written as it reads them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import cases, weights
from safetensors import safe_open
from safetensors.numpy import save_file

from qdora_jax import QuantSpec, export_base, load_pretrained, nf4
from qdora_jax.finetune import fine_tune
from qdora_jax.interop import bnb, hf

STATE = 'weight.quant_state.bitsandbytes__nf4'
DENSE = np.load(cases.HERE / 'bnb.npz')
CASES = {case.name: case for case in cases.STORED}


@pytest.fixture(scope='module')
def stored() -> dict[str, np.ndarray]:
  with safe_open(cases.HERE / 'bnb.safetensors', 'np') as file:
    return {name: file.get_tensor(name) for name in file.keys()}


def write(folder, tensors):
  """A checkpoint of nothing but these tensors."""
  (folder / 'config.json').write_text('{}')
  save_file(tensors, folder / 'model.safetensors')
  return hf.HFCheckpoint(folder)


@pytest.mark.parametrize('name', CASES)
def test_stored_weights_are_read_to_the_bit(name, stored, tmp_path):
  checkpoint = write(tmp_path, stored)
  case, weight = CASES[name], f'{name}.weight'
  assert checkpoint.shapes[weight] == (case.out, case.into)
  how = checkpoint.stored[weight]
  assert how.double_quant == case.double_quant
  assert how.straddles == name.startswith('straddling')
  if how.straddles:
    # bitsandbytes 0.50.2's own dequantizer on CPU takes other scales for these:
    # it is off by .047 where rounding explains .0079. The weight itself judges.
    w = case.matrix()
    absmax = np.abs(w.reshape(-1, 64)).max(1).repeat(64).reshape(w.shape)
    off = np.abs(checkpoint.read(weight) - w)
    # Half the widest step between levels; 8-bit absmax is .8% off at most.
    assert (off <= (0.1519036 + 0.008) * absmax).all()
    assert np.abs(DENSE[name] - w).max() > 2 * off.max()
    return
  np.testing.assert_array_equal(checkpoint.read(weight), DENSE[name])
  q = checkpoint.packed(weight)
  assert q.shape == (case.into, case.out)
  dense = nf4.dequantize(q.replace(codes=jnp.asarray(q.codes)))
  np.testing.assert_array_equal(dense.T, DENSE[name])


@pytest.mark.parametrize('name', ['plain', 'nested'])
def test_what_is_written_is_what_was_read(name, stored, tmp_path):
  checkpoint = write(tmp_path, stored)
  weight = f'{name}.weight'
  written = bnb.write(weight, checkpoint.packed(weight), 'float32')
  theirs = {k: v for k, v in stored.items() if k.startswith(f'{name}.')}
  assert written.keys() == theirs.keys()
  for key, array in written.items():
    assert array.dtype == theirs[key].dtype
    if key.endswith(STATE):
      mine, yours = (json.loads(a.tobytes()) for a in (array, theirs[key]))
      assert mine == yours
      continue
    np.testing.assert_array_equal(array, theirs[key])


def without(key):
  return lambda tensors: tensors.pop(key)


def change(key, value):
  return lambda tensors: tensors.update({key: value})


def state(**changes):
  def apply(tensors):
    values = json.loads(tensors[f'nested.{STATE}'].tobytes()) | changes
    text = json.dumps(values).encode()
    tensors[f'nested.{STATE}'] = np.frombuffer(text, np.uint8)

  return apply


LEVELS = np.linspace(-1, 1, 16, dtype=np.float32)


@pytest.mark.parametrize(
  'harm, words',
  [
    (without('nested.weight.absmax'), r'nested.weight.absmax is missing'),
    (without('nested.weight.nested_absmax'), r'nested_absmax is missing'),
    (change('nested.weight.quant_map', LEVELS), 'not the NF4 code book'),
    (
      change('nested.weight.absmax', np.zeros(7, np.uint8)),
      r'absmax holds 7 of uint8; expected 480 of uint8',
    ),
    (
      change('nested.weight', np.zeros((9, 1), np.uint8)),
      r'nested.weight holds 9 of uint8; expected 15360',
    ),
    (
      change(f'nested.{STATE}', np.frombuffer(b'{"shape": [1', np.uint8)),
      'does not say how its weight is stored',
    ),
    (state(shape=[96]), 'does not say how its weight is stored'),
    (state(shape=[96, -320]), 'does not say how its weight is stored'),
    (state(shape=[2**40, 2**40]), 'expected'),
    (state(blocksize=0), 'does not say how its weight is stored'),
    (state(blocksize='64'), 'does not say how its weight is stored'),
    (state(nested_blocksize=128), 'nested_blocksize=128: expected 256'),
    (state(nested_offset=float('nan')), 'does not say how'),
    (state(shape=[95, 97]), 'ends within a block of 64'),
  ],
)
def test_a_damaged_weight_is_named(harm, words, stored, tmp_path):
  tensors = dict(stored)
  harm(tensors)
  with pytest.raises(ValueError, match=words) as error:
    write(tmp_path, tensors).read('nested.weight')
  assert str(tmp_path) in str(error.value)


def test_fp4_is_refused(stored, tmp_path):
  tensors = dict(stored)
  raw = tensors.pop(f'plain.{STATE}')
  tensors[f'plain.{STATE.replace("nf4", "fp4")}'] = raw
  with pytest.raises(ValueError, match=r'plain.weight is stored as fp4; exp'):
    write(tmp_path, tensors)


def test_no_quantization_is_said_with_null(stored, tmp_path):
  checkpoint = write(tmp_path, stored)
  (tmp_path / 'config.json').write_text('{"quantization_config": null}')
  assert hf.HFCheckpoint(tmp_path).shapes == checkpoint.shapes


@pytest.mark.parametrize(
  'config, words',
  [
    ([4], 'quantization_config=.*expected'),
    ({'quant_method': 'gptq', 'bits': 4}, "quant_method 'gptq'"),
    ({'quant_method': 'bitsandbytes', 'load_in_8bit': True}, 'load_in_4bit'),
    ({}, 'quant_method None'),
  ],
)
def test_other_quantizations_are_refused(config, words, tmp_path):
  text = json.dumps({'quantization_config': config})
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=words) as error:
    hf.HFCheckpoint(tmp_path)
  assert str(tmp_path) in str(error.value)


def straddling(name, w):
  """bitsandbytes' tensors of a weight whose rows are no whole blocks."""
  q = nf4.quantize_host(w.reshape(-1, 1))
  parts = bnb.write(name, q, 'float32')
  key = f'{name}.quant_state.bitsandbytes__nf4'
  values = json.loads(parts[key].tobytes()) | {'shape': list(w.shape)}
  parts[key] = np.frombuffer(json.dumps(values).encode(), np.uint8)
  return parts


@pytest.mark.slow
def test_a_run_says_what_it_reads_in_full(tmp_path, monkeypatch, capsys):
  """Rows of 96 in blocks of 64: no layout of ours holds them packed."""
  config, tensors = weights.tiny_llama(0)
  config['intermediate_size'] = 96
  cut = {
    k: np.ascontiguousarray(
      w[:, :96] if 'down' in k else w[:96] if '.mlp.' in k else w
    )
    for k, w in tensors.items()
  }
  dense = {k: w for k, w in cut.items() if 'down_proj' in k}
  for k, w in dense.items():
    cut |= straddling(k, w)
  model = tiny.write_tokenizer(weights.write_hf(tmp_path / 'm', config, cut))
  _, base, _ = load_pretrained(model)
  for n in range(3):
    w = dense[f'model.layers.{n}.mlp.down_proj.weight']
    off = base['layers']['mlp']['down']['kernel'][n].T - w
    assert 0 < np.abs(off).max() < 0.16 * np.abs(w).max()
  tiny.use_sums(monkeypatch)
  config = tiny.run_config(
    model,
    **{'train.steps': 1, 'eval.before': False, 'eval.exact_match': False},
    **{'quant.targets': '.*/q/kernel', 'adapter.targets': '.*/q/kernel'},
  )
  fine_tune(config, tmp_path / 'run')
  line = 'stored in 4 bits, read in full precision: layers/mlp/down/kernel: its'
  assert (
    f'{line} blocks of 64 straddle outputs of 96' in capsys.readouterr().out
  )


def test_full_fine_tuning_of_stored_codes_is_refused(tmp_path, monkeypatch):
  source = tiny.write(tmp_path / 'in')
  _, base, _ = load_pretrained(source, QuantSpec())
  export_base(tmp_path / 'out', base, source)
  tiny.use_sums(monkeypatch)
  config = tiny.run_config(
    tmp_path / 'out', **{'adapter.method': 'none', 'quant.format': 'none'}
  )
  with pytest.raises(ValueError, match='stored in 4 bits, which no gradient'):
    fine_tune(config, tmp_path / 'run')
