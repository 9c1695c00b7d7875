"""`linear` over every leaf against PEFT's outputs and gradients.

Adapters are away from their initialization: B random, magnitudes perturbed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases

from qdora_jax import DoraWeight, LoraWeight, linear, nf4

GOLDEN = np.load(cases.HERE / 'linear.npz')
CASES = pytest.mark.parametrize(
  'case', cases.LINEAR, ids=lambda case: case.name
)


def base_leaf(case: cases.LinearCase):
  """The kernel, or its NF4Array; double-quantized absmax is their own."""
  w_IxO = jnp.asarray(case.inputs().weight.T)
  if not case.options.get('nf4'):
    return w_IxO
  q = nf4.quantize(w_IxO)
  if not case.options.get('double_quant'):
    return q
  at = f'{case.name}/stored'
  ib, o = q.absmax.shape
  return q.replace(
    absmax=jnp.asarray(GOLDEN[f'{at}/absmax'].reshape(o, ib).T),
    nested=jnp.asarray(GOLDEN[f'{at}/nested']),
    offset=jnp.asarray(GOLDEN[f'{at}/offset']),
  )


def ours(case: cases.LinearCase, **kwargs) -> dict[str, np.ndarray]:
  """Output and gradients under the names of the golden file."""
  inputs = case.inputs()
  rank = inputs.lora_a.shape[1]
  rslora = case.options.get('rslora', False)
  scale = cases.LINEAR_ALPHA / (rank**0.5 if rslora else rank)
  trained = {'lora_a': inputs.lora_a, 'lora_b': inputs.lora_b}
  leaf = LoraWeight
  if case.options['method'] == 'dora':
    trained['magnitude'] = inputs.magnitude
    leaf = DoraWeight
  else:
    kwargs = {}
  base = base_leaf(case)

  @jax.jit
  def run(x, trained, bias):
    def forward(x, trained):
      w = leaf(base=base, scale=scale, **trained, **kwargs)
      return linear(x, w, bias)

    y, back = jax.vjp(forward, x, trained)
    dx, grads = back(jnp.asarray(inputs.dy))
    return {'y': y, 'x': dx, **grads}

  trained = {name: jnp.asarray(value) for name, value in trained.items()}
  return run(jnp.asarray(inputs.x), trained, inputs.bias)


def differences(case: cases.LinearCase, got) -> dict[str, float]:
  """max |difference| / max |theirs| of every value."""
  out = {}
  for key, value in got.items():
    golden = GOLDEN[f'{case.name}/{key}']
    assert value.shape == golden.shape, key
    assert value.dtype == golden.dtype, key
    out[key] = float(np.abs(value - golden).max() / np.abs(golden).max())
  return out


@CASES
def test_output_and_gradients(case):
  got = ours(case)
  held = {
    key.split('/')[1] for key in GOLDEN.files if key.startswith(case.name + '/')
  }
  assert set(got) == held - {'stored'}
  apart = differences(case, got)
  assert max(apart.values()) <= 1e-5, apart


@pytest.mark.parametrize('name', ['dora', 'qdora'])
def test_the_dense_norm_gives_the_same(name):
  case = next(case for case in cases.LINEAR if case.name == name)
  apart = differences(case, ours(case, factored=False))
  assert max(apart.values()) <= 1e-5, apart


def test_the_golden_values_tell_methods_apart():
  """Each case differs from its neighbours by far more than the tolerance."""
  by_name = {case.name: case for case in cases.LINEAR}
  dora = ours(by_name['dora'])
  for other in ('dora_no_bias', 'dora_rslora', 'qdora', 'qdora_double'):
    assert differences(by_name[other], dora)['y'] > 1e-3, other


def test_norm_is_held_constant_as_in_peft():
  """Differentiating the norm, which PEFT does not, is seen."""
  case = next(case for case in cases.LINEAR if case.name == 'dora')
  apart = differences(case, ours(case, detach=False))
  assert apart['y'] <= 1e-5
  assert apart['lora_b'] > 1e-3
