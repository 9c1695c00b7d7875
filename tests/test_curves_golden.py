"""A tiny llama against transformers' logits and PEFT's training curves."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases, ours, weights

from qdora_jax import QuantSpec, load_pretrained

GOLDEN = json.loads((cases.HERE / 'llama.json').read_text())
ARRAYS = np.load(cases.HERE / 'llama.npz')


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


@pytest.mark.parametrize('name', cases.CURVES)
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
