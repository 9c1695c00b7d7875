"""A tiny llama against transformers' logits and PEFT's training curves."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tiny
from golden import cases, ours, weights
from tiny import quick_compiles  # noqa: F401

from qdora_jax import QuantSpec, load_pretrained, save_adapter

GOLDEN = json.loads((cases.HERE / 'llama.json').read_text())
ARRAYS = np.load(cases.HERE / 'llama.npz')
# The other curves are slow tests.
PLAIN = ('lora', 'dora', 'qdora_double')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('llamas')
  return {
    name: weights.write_hf(root / name, *weights.tiny_llama(cases.SEED, tied))
    for name, tied in cases.LLAMAS.items()
  }


def base(folder, method: str, double_quant: bool):
  """Model and parameters; double-quantized absmax is bitsandbytes' own."""
  quant = QuantSpec(double_quant=double_quant)
  if not method.startswith('q'):
    quant = None
  model, params, *_ = load_pretrained(folder, quant=quant, dtype=jnp.float32)
  for linear in weights.LINEARS if double_quant else ():
    q = ours.kernel(params, linear)
    ib, o = q.absmax.shape[1:]
    at = [f'double/{n}/{linear}' for n in range(cases.LAYERS)]
    absmax = [ARRAYS[f'{a}/absmax'].reshape(o, ib).T for a in at]
    q = q.replace(
      absmax=jnp.asarray(np.stack(absmax)),
      nested=jnp.asarray(np.stack([ARRAYS[f'{a}/nested'] for a in at])),
      offset=jnp.asarray(np.stack([ARRAYS[f'{a}/offset'] for a in at])),
    )
    params = ours.with_kernel(params, linear, q)
  return model, params


@pytest.mark.parametrize('name', cases.LLAMAS)
def test_logits(folders, name):
  model, params = base(folders[name], 'lora', False)
  got = ours.logits(model, params, cases.prompt())
  assert got.dtype == np.float32
  assert ours.relative(got, ARRAYS[f'logits/{name}']) <= 1e-5


def test_logits_of_a_double_quantized_model(folders):
  model, params = base(folders['tied'], 'qlora', True)
  got = ours.logits(model, params, cases.prompt())
  assert ours.relative(got, ARRAYS['logits/double']) <= 1e-5
  assert ours.relative(got, ARRAYS['logits/tied']) > 1e-2


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in PLAIN else tiny.AGAIN)
    for name in cases.CURVES
  ],
)
def test_twenty_steps(folders, name):
  method, double_quant = cases.CURVES[name]
  got = ours.curve(
    *base(folders['tied'], method, double_quant),
    method,
    cases.tokens(),
    rank=cases.RANK,
    alpha=cases.ALPHA,
    lr=cases.LR,
  )
  golden = np.float64(GOLDEN['curves'][name])
  assert golden[-1] < 0.6 * golden[0]  # it has learned
  assert ours.apart(got, golden) <= 1e-4
  # and is this method's own curve, not another's
  for other, curve in GOLDEN['curves'].items():
    if other != name:
      assert ours.apart(got, np.float64(curve)) > 4e-4, other


@pytest.mark.parametrize('method', ['lora', 'dora'])
def test_adapter_files_are_named_as_pefts(folders, method, tmp_path):
  _, params = base(folders['tied'], method, False)
  adapter = ours.adapter(params, method, cases.RANK, cases.ALPHA)
  save_adapter(tmp_path, adapter)
  golden = GOLDEN['peft'][method]
  file = tmp_path / 'adapter_model.safetensors'
  with safetensors.safe_open(file, 'np') as tensors:
    shapes = {k: tensors.get_slice(k).get_shape() for k in tensors.keys()}
    dtypes = {tensors.get_slice(k).get_dtype() for k in tensors.keys()}
    assert tensors.metadata() == golden['metadata']
  assert shapes == golden['tensors']
  assert dtypes == {'F32'}
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  # How modules are named is free; these decide what PEFT computes.
  free = {'target_modules', 'base_model_name_or_path'}
  assert set(config) <= set(golden['config'])
  for key in set(config) - free:
    assert config[key] == golden['config'][key], key
