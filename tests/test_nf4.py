"""NF4 beyond the goldens: transformations, errors, bounds, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdora_jax import nf4


def normal(shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('double_quant', [False, True])
@pytest.mark.parametrize('shape', [(128, 32), (3, 128, 32), (2, 3, 64, 8)])
def test_host_path_gives_the_same_bits(shape, double_quant):
  w = normal(shape)
  device = jax.jit(nf4.quantize, static_argnums=(1, 2))(w, 32, double_quant)
  host = nf4.quantize_host(np.asarray(w), 32, double_quant)
  assert device.shape == host.shape == shape
  assert_same(device, host)


@pytest.mark.parametrize('double_quant', [False, True])
def test_jit_vmap_scan_and_eager_agree(double_quant):
  w = normal((4, 128, 48))

  def quantize(w):
    return nf4.quantize(w, 64, double_quant)

  whole = jax.jit(quantize)(w)
  assert_same(whole, jax.jit(jax.vmap(quantize))(w))
  scanned = jax.jit(lambda w: jax.lax.scan(lambda c, w: (c, quantize(w)), 0, w))
  assert_same(whole, scanned(w)[1])
  back = jax.jit(nf4.dequantize)(whole)
  assert_same(back, jax.jit(jax.vmap(nf4.dequantize))(whole))
  assert_same(back, jax.jit(lambda q: jax.lax.map(nf4.dequantize, q))(whole))
  assert_same(back, nf4.dequantize(whole))


def test_eval_shape_predicts_bytes():
  def quantize(w):
    return nf4.quantize(w, 64, True)

  w = normal((30, 576, 1536))
  q = jax.jit(quantize)(w)
  abstract = jax.eval_shape(quantize, w)
  assert (
    abstract.nbytes == q.nbytes == sum(a.nbytes for a in jax.tree.leaves(q))
  )
  # REFERENCE: 4 + 8/64 + 32/(64*256) bits; plus one offset a layer.
  assert 8 * q.nbytes / w.size == pytest.approx(4.127, abs=5e-4)
  plain = jax.eval_shape(lambda w: nf4.quantize(w, 64), w)
  assert 8 * plain.nbytes / w.size == 4.5


@pytest.mark.parametrize(
  ('block', 'mean', 'std'),
  [
    (32, 0.067746, 0.000069),
    (64, 0.072798, 0.000074),
    (128, 0.076831, 0.000091),
    (256, 0.080337, 0.000102),
  ],
)
def test_error_is_that_of_bitsandbytes_own_test(block, mean, std):
  """tests/test_functional.py of bitsandbytes: mean + 7 std on N(0, 1)."""
  w = normal((1024, 1024))
  error = jnp.abs(nf4.dequantize(nf4.quantize(w, block)) - w)
  assert mean - 7 * std < error.mean() < mean + 7 * std
  absmax = jnp.abs(w).reshape(-1, block, 1024).max(1)
  # Half the widest gap between levels, REFERENCE section 1.
  bound = 0.1519036 * jnp.repeat(absmax, block, axis=0)
  assert (error <= bound * (1 + 1e-6)).all()


def test_double_quantization_loses_little():
  w = normal((1024, 1024))
  q, plain = nf4.quantize(w, 64, True), nf4.quantize(w, 64)
  relative = jnp.abs(nf4.absmax(q) - plain.absmax) / plain.absmax
  # REFERENCE section 1: mean .0016, max .0076.
  assert relative.mean() < 0.0020
  assert relative.max() < 0.0085


def test_quantizing_what_was_dequantized_changes_nothing():
  q = nf4.quantize(normal((256, 64)))
  again = nf4.quantize(nf4.dequantize(q))
  assert_same(q, again)


def test_zero_blocks_stay_zero():
  w = jnp.zeros((128, 4)).at[64:, 1].set(1.0)
  for q in (nf4.quantize(w), nf4.quantize_host(np.asarray(w))):
    np.testing.assert_array_equal(nf4.dequantize(q), w)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_dtype_is_remembered(dtype):
  w = normal((128, 16), dtype=dtype)
  q = nf4.quantize(w)
  assert q.dtype == dtype
  assert nf4.dequantize(q).dtype == dtype
  assert nf4.dequantize(q, jnp.float32).dtype == jnp.float32
  assert_same(q, nf4.quantize_host(np.asarray(w)))


@pytest.mark.parametrize('quantize', [nf4.quantize, nf4.quantize_host])
def test_errors_name_the_value_and_what_fits(quantize):
  with pytest.raises(ValueError, match=r'block_size=64 .*I=172.*no usual'):
    quantize(np.ones((172, 4), np.float32))
  with pytest.raises(
    ValueError, match=r'block_size=128 .*these do: \[64, 32\]'
  ):
    quantize(np.ones((192, 4), np.float32), 128)
  with pytest.raises(ValueError, match='int32'):
    quantize(np.ones((64, 4), np.int32))
  with pytest.raises(ValueError, match=r'shape \(64,\)'):
    quantize(np.ones(64, np.float32))
  with pytest.raises(ValueError, match='block_size=63'):
    quantize(np.ones((64, 4), np.float32), 63)


def test_weights_that_are_not_finite_are_refused_while_loading():
  w = np.ones((64, 4), np.float32)
  w[3, 2] = np.nan
  with pytest.raises(ValueError, match='not finite'):
    nf4.quantize_host(w)


@pytest.mark.parametrize('shape', [(9, 31), (4, 64), (2, 3, 9, 96), (1, 300)])
def test_a_gpu_spreads_scales_of_scales_as_a_cpu_looks_them_up(shape):
  *lead, ib, o = shape
  nested = jax.random.normal(jax.random.key(0), (*lead, -(-ib * o // 256)))
  spread, found = (f((ib, o), nested) for f in (nf4._spread, nf4._looked_up))
  assert spread.shape == shape
  np.testing.assert_array_equal(spread, found)
