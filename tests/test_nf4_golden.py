"""NF4 against bitsandbytes' bytes (golden files made by golden/make.py).

Ours, (in, out), transposed are theirs, (out, in), whenever the block size
divides the in axis.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import cases, weights

from qdora_jax import nf4

HASHES = json.loads((cases.HERE / 'nf4.json').read_text())
ARRAYS = np.load(cases.HERE / 'nf4.npz')
HALVES = {'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
DTYPES = {'float32': np.float32, **HALVES}


def device(w_IxO, block_size=64, double_quant=False):
  quantize = jax.jit(nf4.quantize, static_argnums=(1, 2))
  return quantize(jnp.asarray(w_IxO), block_size, double_quant)


WAYS = pytest.mark.parametrize(
  'quantize', [device, nf4.quantize_host], ids=['device', 'host']
)
JITTED = jax.jit(nf4.dequantize, static_argnums=1)
READERS = pytest.mark.parametrize(
  ('case', 'dequantize'),
  [
    *(pytest.param(c, JITTED, id=f'{c.name}-jit') for c in cases.NF4),
    *(pytest.param(c, nf4.dequantize, id=c.name) for c in cases.NF4[:5]),
  ],
)
CASES = pytest.mark.parametrize('case', cases.NF4, ids=lambda case: case.name)


def theirs(array) -> np.ndarray:
  """Our array as its bytes stand in bitsandbytes' order."""
  return np.asarray(array).T


def stored(case: cases.NF4Case, q: nf4.NF4Array) -> nf4.NF4Array:
  """Our codes with the absmax that bitsandbytes double-quantized."""
  at = ARRAYS[f'{case.name}/absmax']
  absmax = at.reshape(case.out, case.into // case.block_size).T
  return q.replace(
    absmax=jnp.asarray(absmax),
    nested=jnp.asarray(ARRAYS[f'{case.name}/nested']),
    offset=jnp.asarray(ARRAYS[f'{case.name}/offset']),
  )


def test_golden_of_reference():
  golden = HASHES['256x128/64']
  assert golden['codes'].startswith('96129c841833adead51906c0081d9bef881a')
  assert golden['absmax'].startswith('67a265474b646718fd25bfbe48a1b17b1330')
  assert golden['float32'].startswith('0140ebfe40e21e3d7fc1cabe7de98bc50d95')
  q = nf4.quantize(jnp.asarray(weights.matrix(0, (256, 128), 0.02).T))
  first = theirs(q.codes).reshape(-1)[:8]
  assert first.tolist() == [233, 191, 227, 182, 121, 141, 184, 153]


@WAYS
@CASES
def test_codes_and_absmax(case, quantize):
  q = quantize(case.matrix().T, case.block_size)
  golden = HASHES[case.name]
  assert cases.sha(theirs(q.codes)) == golden['codes']
  assert cases.sha(theirs(q.absmax)) == golden['absmax']


@READERS
def test_dequantized(case, dequantize):
  q = device(case.matrix().T, case.block_size)
  for name, dtype in DTYPES.items():
    w = dequantize(q, dtype)
    assert w.dtype == dtype
    assert cases.sha(theirs(w)) == HASHES[case.name][name], name


@WAYS
@pytest.mark.parametrize('name', HALVES)
@CASES
def test_of_half_precision_weights(case, name, quantize):
  w = case.matrix().astype(HALVES[name])
  q = quantize(w.T, case.block_size)
  golden = HASHES[f'{case.name}/from_{name}']
  assert cases.sha(theirs(q.codes)) == golden['codes']
  assert cases.sha(theirs(q.absmax)) == golden['absmax']
  assert nf4.dequantize(q).dtype == HALVES[name]
  assert cases.sha(theirs(nf4.dequantize(q))) == golden[name]


@WAYS
def test_edges(quantize):
  q = quantize(weights.edges().T)
  absmax = ARRAYS['edges/absmax']
  np.testing.assert_array_equal(theirs(q.absmax)[:, 0], absmax)
  live = absmax > 0  # a zero block may have any codes
  assert live.sum() == 8
  codes = theirs(q.codes)
  np.testing.assert_array_equal(codes[live], ARRAYS['edges/codes'][live])
  w = theirs(nf4.dequantize(q))
  np.testing.assert_array_equal(w, ARRAYS['edges/float32'])


@READERS
def test_double_quantization_is_read_exactly(case, dequantize):
  q = stored(case, device(case.matrix().T, case.block_size))
  golden = HASHES[f'{case.name}/double']
  absmax = jax.jit(nf4.absmax)(q)
  assert cases.sha(theirs(absmax)) == golden['plain_absmax']
  for name, dtype in DTYPES.items():
    w = dequantize(q, dtype)
    assert cases.sha(theirs(w)) == golden[name], name


@WAYS
@CASES
def test_double_quantization_is_written_as_well(case, quantize):
  w = case.matrix().T
  plain = np.asarray(quantize(w, case.block_size).absmax)
  q = quantize(w, case.block_size, double_quant=True)
  assert cases.sha(theirs(q.codes)) == HASHES[case.name]['codes']
  golden = stored(case, q)
  np.testing.assert_allclose(q.offset, golden.offset, rtol=1e-6)
  np.testing.assert_allclose(q.nested, golden.nested, rtol=1e-5)
  # Its CPU writer's table is coarse: a step of 256 here and there.
  step = np.abs(np.asarray(q.absmax, int) - np.asarray(golden.absmax, int))
  assert step.max() <= 1
  assert (step > 0).sum() <= max(1, 0.01 * step.size)
  error = np.abs(nf4.absmax(q) - plain) / plain
  their_error = np.abs(nf4.absmax(golden) - plain) / plain
  assert error.mean() <= 1.001 * their_error.mean()
  assert error.max() <= 1.001 * their_error.max()
