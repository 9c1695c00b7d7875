"""PiSSA, OLoRA, LoftQ: the whole is the model, and the adapter what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import ours, weights
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  export_base,
  export_folded,
  init_adapter,
  load_adapter,
  load_pretrained,
  lora,
  materialize,
  nf4,
  paths,
  residual,
  save_adapter,
)

TOKENS = np.arange(3, 19, dtype=np.int32).reshape(2, 8)
W_IxO = weights.matrix(5, (128, 96), 0.05)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return tiny.write(tmp_path_factory.mktemp('source'))


def plain(w):
  return w, w


def four_bit(w):
  q = nf4.quantize_host(w)
  return q, np.asarray(nf4.dequantize(q))


@pytest.mark.parametrize('init', ['pissa', 'olora'])
@pytest.mark.parametrize('scale', [1.0, 2.0])
def test_base_and_adapter_are_the_weight(init, scale):
  base, a, b = residual.split(W_IxO, init, 8, scale, plain)
  assert a.shape == (128, 8)
  assert b.shape == (8, 96)
  assert a.dtype == b.dtype == base.dtype == np.float32
  np.testing.assert_allclose(base + scale * (a @ b), W_IxO, atol=1e-6)


def test_pissa_takes_the_largest_directions():
  base, _, _ = residual.split(W_IxO, 'pissa', 8, 2.0, plain)
  every = np.linalg.svd(W_IxO, compute_uv=False)
  left = np.linalg.svd(base, compute_uv=False)
  np.testing.assert_allclose(left[:88], every[8:], rtol=1e-4)
  np.testing.assert_allclose(left[88:], 0, atol=1e-5)


def test_olora_starts_from_an_orthonormal_b():
  _, _, b = residual.split(W_IxO, 'olora', 8, 2.0, plain)
  np.testing.assert_allclose(b @ b.T, np.eye(8), atol=1e-6)


@pytest.mark.parametrize('scale', [1.0, 2.0])
def test_loftq_makes_up_for_what_quantizing_loses(scale):
  (q, values) = four_bit(W_IxO)
  lost = np.linalg.norm(W_IxO - values)
  base, a, b = residual.split(W_IxO, 'loftq', 16, scale, four_bit)
  left = W_IxO - np.asarray(nf4.dequantize(base)) - scale * (a @ b)
  assert np.linalg.norm(left) < 0.85 * lost
  # One turn alone is worse: they are worth their time.
  u, s, vt = np.linalg.svd(W_IxO - values)
  once = W_IxO - values - (u[:, :16] * s[:16]) @ vt[:16]
  assert np.linalg.norm(left) < np.linalg.norm(once)
  del q


@pytest.mark.parametrize(
  'init, method',
  [
    pytest.param('pissa', 'dora', marks=pytest.mark.slow),
    pytest.param('olora', 'lora', marks=pytest.mark.slow),
    ('loftq', 'dora'),
  ],
)
def test_a_model_loaded_so_is_the_model(source, init, method):
  quant = QuantSpec(double_quant=False) if init == 'loftq' else None
  spec = AdapterSpec(method, rank=8, init=init, rank_pattern={r'.*/1/.*': 4})
  model, base, _, adapter = load_pretrained(source, quant, spec, remat='none')
  _, params, _ = load_pretrained(source, remat='none')
  want = ours.logits(model, params, TOKENS)
  got = ours.logits(model, attach(base, adapter), TOKENS)
  if init != 'loftq':
    assert ours.relative(got, want) <= 1e-5
    before = params['layers']['attn']['q']['kernel']
    assert np.abs(base['layers']['attn']['q']['kernel'] - before).max() > 1e-3
    return
  _, plain, _ = load_pretrained(source, quant, remat='none')
  without = ours.logits(model, plain, TOKENS)
  assert np.linalg.norm(got - want) < np.linalg.norm(without - want)


@pytest.mark.parametrize('method, rslora', [('lora', False), ('dora', True)])
def test_saved_for_the_original_model(source, method, rslora, tmp_path):
  spec = AdapterSpec(
    method, rank=8, init='pissa', rslora=rslora, rank_pattern={r'.*/1/.*': 4}
  )
  model, base, _, start = load_pretrained(source, None, spec, remat='none')
  trained = tiny.perturbed(start)
  want = ours.logits(model, attach(base, trained), TOKENS)
  save_adapter(tmp_path, trained, initial=start)
  _, original, _ = load_pretrained(source, remat='none')
  loaded = load_adapter(tmp_path, original)
  node = paths.flatten(loaded)['layers/attn/q/kernel']
  assert node.ranks == (16, 8, 16)
  got = ours.logits(model, attach(original, loaded), TOKENS)
  assert ours.relative(got, want) <= 1e-5


def test_without_its_start_it_is_not_saved(source, tmp_path):
  spec = AdapterSpec(rank=8, init='olora')
  *_, adapter = load_pretrained(source, None, spec)
  with pytest.raises(ValueError, match="init='olora', which changed the base"):
    save_adapter(tmp_path / 'out', adapter)
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_over_four_bits_base_and_adapter_go_together(source, tmp_path):
  spec = AdapterSpec(rank=8, init='loftq')
  model, base, _, adapter = load_pretrained(
    source, QuantSpec(), spec, remat='none'
  )
  adapter = tiny.perturbed(adapter)
  export_folded(tmp_path / 'out', base, adapter, source)
  _, folded, _ = load_pretrained(tmp_path / 'out' / 'model', remat='none')
  plain = load_adapter(tmp_path / 'out' / 'adapter', folded)
  got = ours.logits(model, attach(folded, plain), TOKENS)
  want = ours.logits(model, attach(base, adapter), TOKENS)
  assert ours.relative(got, want) <= 1e-5


def test_init_adapter_does_not_change_a_base():
  _, base, _ = tiny.loaded()
  with pytest.raises(ValueError, match=r"init='pissa' takes.*load_pretrained"):
    init_adapter(jax.random.key(0), base, AdapterSpec(rank=4, init='pissa'))


def test_nothing_is_taken_out_of_stored_codes(source, tmp_path):
  _, base, _ = load_pretrained(source, QuantSpec())
  export_base(tmp_path / 'out', base, source)
  spec = AdapterSpec(rank=4, init='pissa')
  with pytest.raises(ValueError, match="in 4 bits: init='pissa' takes"):
    load_pretrained(tmp_path / 'out', None, spec)


@pytest.mark.parametrize('init', ['kaiming', 'gaussian', 'orthogonal'])
def test_a_fresh_start_changes_nothing(init):
  a, b = lora.init(jax.random.key(0), init, 256, 16, 128)
  assert (a.shape, b.shape) == ((256, 16), (16, 128))
  assert a.dtype == b.dtype == jnp.float32
  np.testing.assert_allclose(a @ b, 0, atol=1e-6)
  # PEFT: uniform to 1/sqrt(I); deviation 1/R; a tenth of sqrt(R/2) normals
  # turned by a rotation, which is sqrt(1/2) / 10 to each of R columns.
  want = {
    'kaiming': 256**-0.5 / 3**0.5,
    'gaussian': 1 / 16,
    'orthogonal': 0.0707,
  }
  assert float(a.std()) == pytest.approx(want[init], rel=0.05)
  assert (float(b.std()) > 0) == (init == 'orthogonal')


def test_a_fresh_start_while_loading(source):
  spec = AdapterSpec('lora', rank=4, init='orthogonal')
  *_, adapter = load_pretrained(source, None, spec)
  node = paths.flatten(adapter)['layers/attn/q/kernel']
  assert node.spec == spec
  assert float(jnp.abs(node.lora_b).max()) > 0


def test_loftq_needs_what_quantizing_loses(source):
  spec = AdapterSpec('lora', rank=4, init='loftq')
  with pytest.raises(ValueError, match=r"init='loftq' starts .*attn/k/kernel"):
    load_pretrained(source, None, spec)


def test_an_odd_rank_is_not_orthogonal():
  _, base, _ = tiny.loaded()
  spec = AdapterSpec(rank=3, init='orthogonal')
  with pytest.raises(ValueError, match=r'rank 3 .*needs an even one'):
    init_adapter(jax.random.key(0), base, spec)


def test_materialized_it_is_the_weight(source):
  spec = AdapterSpec('dora', rank=8, init='pissa')
  _, base, _, adapter = load_pretrained(source, None, spec)
  _, params, _ = load_pretrained(source)
  for path, leaf in paths.flatten(attach(base, adapter)).items():
    want = paths.flatten(params)[path]
    np.testing.assert_allclose(materialize(leaf), want, atol=1e-5)
  assert dataclasses.replace(spec, init='kaiming') != spec
