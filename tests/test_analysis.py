"""Changes of weights and errors of formats, against plain numpy in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  analysis,
  attach,
  init_adapter,
  nf4,
  paths,
  quantize,
)
from qdora_jax.analysis import Change, Format

TARGETS = r'.*/(q|down)/kernel'


def kernels(seed: int = 0, shape=(3, 64, 32)) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stack(w: np.ndarray) -> dict:
  return {'layers': {'attn': {'q': {'kernel': jnp.asarray(w)}}}}


def moved(before: np.ndarray, after: np.ndarray, **more) -> list[Change]:
  return analysis.changes(stack(before), stack(after), '.*/q/kernel', **more)


def expected(w: np.ndarray, v: np.ndarray) -> tuple[float, float]:
  """The paper's equations as they stand, float64, of one [I, O]."""
  w, v = w.astype(np.float64), v.astype(np.float64)
  old, new = np.linalg.norm(w, axis=0), np.linalg.norm(v, axis=0)
  cosine = (w * v).sum(0) / (old * new)
  return np.abs(new - old).mean(), (1 - cosine).mean()


@pytest.mark.parametrize('size', [1.0, 1e-2, 1e-4])
def test_changes_are_the_papers(size):
  w = kernels()
  v = w + np.float32(size) * kernels(1)
  found = moved(w, v)
  assert [c.name for c in found] == [
    f'layers/{n}/attn/q/kernel' for n in range(3)
  ]
  assert [(c.layer, c.module) for c in found] == [(n, 'q') for n in range(3)]
  for change, *both in zip(found, w, v, strict=True):
    magnitude, direction = expected(*both)
    # Directions as small as 5e-9 are found, too.
    assert change.magnitude == pytest.approx(magnitude, rel=1e-3)
    assert change.direction == pytest.approx(direction, rel=2e-2)


def test_lengths_and_directions_are_apart():
  w = kernels()
  (longer, *_) = moved(w, w * np.linspace(1, 1.2, 32, dtype=np.float32))
  assert longer.direction < 1e-12
  assert longer.relative == pytest.approx(0.1, rel=1e-4)
  # A turn in the plane of two inputs by 60 degrees.
  flat = np.zeros((1, 64, 32), np.float32)
  flat[:, 0] = 2
  turned = flat.copy()
  turned[:, 0], turned[:, 1] = 1, math.sqrt(3)
  (change,) = moved(flat, turned)
  assert change.magnitude < 1e-6
  assert change.direction == pytest.approx(0.5, rel=1e-5)
  (back,) = moved(flat, -flat)
  assert back.direction == 2.0


def test_features_without_a_length_do_not_count():
  w = kernels(shape=(1, 64, 32))
  w[..., :8] = 0
  v = w * np.float32(1.5)
  (change,) = moved(w, v)
  assert change.relative == pytest.approx(0.5)
  assert change.direction < 1e-12 and math.isfinite(change.magnitude)


@pytest.mark.slow
def test_any_leaf_is_compared():
  """NF4 with DoRA on it: the change is that of what they stand for."""
  _, params, _ = tiny.loaded()
  base = quantize(params, QuantSpec(TARGETS, block_size=32))
  spec = AdapterSpec('dora', rank=2, targets=TARGETS)
  adapter = tiny.perturbed(init_adapter(tiny.jax.random.key(0), base, spec))
  found = analysis.changes(base, attach(base, adapter), TARGETS)
  assert {c.module for c in found} == {'q', 'down'}
  leaf = paths.flatten(attach(base, adapter))['layers/attn/q/kernel']
  lengths = jnp.linalg.norm(
    nf4.dequantize(paths.flatten(base)['layers/attn/q/kernel']), axis=-2
  )
  # DoRA's lengths are its magnitudes.
  want = jnp.abs(leaf.magnitude - lengths).mean(-1)
  got = [c.magnitude for c in found if c.module == 'q']
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_a_rule_that_matches_nothing_is_named():
  with pytest.raises(ValueError, match='gone'):
    analysis.changes(stack(kernels()), stack(kernels()), 'gone')
  with pytest.raises(ValueError, match='same architecture'):
    moved(kernels(), kernels(shape=(3, 64, 16)))


def test_ranks():
  draw = np.random.default_rng(0)
  thin = draw.standard_normal((64, 3)) @ draw.standard_normal((3, 32))
  assert analysis.energy_rank(thin.astype(np.float32), 0.999999) == 3
  assert analysis.energy_rank(np.eye(40, 50)) == 36
  assert analysis.energy_rank(np.zeros((4, 4))) == 0
  values = np.linalg.svd(kernels()[0], compute_uv=False) ** 2
  want = int(np.argmax(values.cumsum() >= 0.9 * values.sum())) + 1
  assert analysis.energy_rank(kernels()[0]) == want
  w = kernels()
  (change, *_) = moved(w, w + np.float32(0.01) * thin, ranks=True)
  assert change.rank <= 3
  assert moved(w, w)[0].rank is None


def test_correlation():
  draw = np.random.default_rng(0)
  pairs = draw.standard_normal((20, 2)) @ [[1, 0.5], [0, 1]]
  some = [Change('layers/0/q/kernel', m, d, 0.0) for d, m in pairs]
  want = scipy.stats.pearsonr(*pairs.T).statistic
  assert analysis.correlation(some) == pytest.approx(want)
  assert 0 < want < 1
  assert math.isnan(analysis.correlation(some[:2]))
  assert math.isnan(analysis.correlation([some[0]] * 5))


@pytest.mark.parametrize('name', ['int4', 'fp4', 'nf4'])
def test_a_round_trip_takes_the_nearest_level(name):
  levels = analysis.LEVELS[name]
  w = kernels(shape=(2, 128, 8))
  got = np.asarray(analysis.round_trip(jnp.asarray(w), levels, 32))
  for n in (0, 1):
    for o in range(8):
      for block in range(4):
        at = (n, slice(32 * block, 32 * block + 32), o)
        most = np.abs(w[at]).max()
        error = np.abs(w[at][:, None] - levels * most)
        np.testing.assert_allclose(
          np.abs(got[at] - w[at]), error.min(1), atol=1e-6
        )
  # What is stored so already comes back as it is.
  again = analysis.round_trip(jnp.asarray(got), levels, 32)
  np.testing.assert_allclose(again, got, rtol=1e-6)
  zero = jnp.zeros((64, 4))
  assert not analysis.round_trip(zero, levels).any()
  with pytest.raises(ValueError, match='block_size=48'):
    analysis.round_trip(zero, levels, 48)


def test_formats():
  w = jnp.asarray(kernels(shape=(4, 1024, 64)))
  errors = {}
  for form in (
    *(Format(name) for name in analysis.LEVELS),
    Format('nf4', double_quant=True),
    Format('nf4', 32),
  ):
    tree, error = form.tree(stack(w), '.*kernel')
    back = tree['layers']['attn']['q']['kernel']
    want = float(jnp.linalg.norm(back - w) / jnp.linalg.norm(w))
    assert error == pytest.approx(want, rel=1e-4)
    errors[str(form)] = error
  # Of normal weights: the order of the QLoRA paper.
  assert errors['NF4, blocks of 64'] < errors['Int4, blocks of 64']
  assert errors['NF4, blocks of 64'] < errors['FP4, blocks of 64']
  assert errors['NF4, blocks of 32'] < errors['NF4, blocks of 64']
  assert errors['NF4 + DQ, blocks of 64'] < 1.01 * errors['NF4, blocks of 64']
  for double in (False, True):
    stored = nf4.quantize(w, 64, double)
    bits = Format('nf4', 64, double).bits
    assert 8 * stored.nbytes / w.size == pytest.approx(bits, rel=1e-3)
  with pytest.raises(ValueError, match='double quantization is of NF4'):
    Format('fp4', double_quant=True)(w)
  with pytest.raises(ValueError, match=r'nothing that .*block_size=48'):
    Format('nf4', 48).tree(stack(w), '.*kernel')


def test_normality():
  normal = np.random.default_rng(0).standard_normal((256, 400))
  share, count = analysis.normality(normal.astype(np.float32), samples=400)
  assert count == 400 and 0.02 < share < 0.09
  share, count = analysis.normality(normal, 64, samples=50)
  assert count == 50 and share < 0.2
  even = np.random.default_rng(0).uniform(size=(256, 40))
  assert analysis.normality(even) == (1.0, 40)
  assert analysis.normality(np.zeros((8, 3)))[0] == 1.0
  with pytest.raises(ValueError, match='block_size=48'):
    analysis.normality(normal, 48)
