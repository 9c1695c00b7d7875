"""VeRA and DVoRA: two vectors a kernel, over random matrices for all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from golden import ours
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  export_folded,
  init_adapter,
  load_adapter,
  load_pretrained,
  materialize,
  merge,
  paths,
  save_adapter,
  vera,
)
from qdora_jax.export import fold

TOKENS = np.arange(3, 19, dtype=np.int32).reshape(2, 8)
Q = 'layers/attn/q/kernel'


@pytest.fixture(scope='module', params=['vera', 'dvora'])
def made(request):
  model, base, _ = tiny.loaded(quant=QuantSpec())
  # A rank beyond every kernel's smaller side.
  spec = AdapterSpec(request.param, rank=96, rank_pattern={r'.*/1/.*': 0})
  return model, base, init_adapter(jax.random.key(0), base, spec)


def moved(adapter):
  def move(path, a):
    noise = jax.random.normal(jax.random.key(len(paths.of(path))), a.shape)
    part = paths.of(path).rsplit('/', 1)[-1]
    return a * (1 + 0.1 * noise) + 0.05 * noise * (part == 'lambda_b')

  return jax.tree_util.tree_map_with_path(move, adapter)


def test_vectors_alone_are_trained(made):
  _, base, adapter = made
  node = paths.flatten(adapter)[Q]
  assert node.lambda_d.shape == (3, 96)
  assert node.lambda_b.shape == (3, 64)
  assert node.lora_a is node.lora_b is None
  np.testing.assert_array_equal(node.lambda_d, np.float32(0.1))
  assert not node.lambda_b.any()
  sizes = {paths.of(p).rsplit('/', 1)[-1] for p, _ in leaves(adapter)}
  assert sizes - {'magnitude'} == {'lambda_d', 'lambda_b'}
  del base


def leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


def test_it_begins_as_the_base_and_moves(made):
  model, base, adapter = made
  plain = ours.logits(model, base, TOKENS)
  start = ours.logits(model, attach(base, adapter), TOKENS)
  assert ours.relative(start, plain) <= 1e-5
  after = moved(adapter)
  got = ours.logits(model, attach(base, after), TOKENS)
  assert ours.relative(got, plain) > 1e-3
  want = ours.logits(model, merge(base, after), TOKENS)
  assert ours.relative(got, want) <= 1e-5


def test_the_formula(made):
  """W + A d B b, of one pair of matrices for kernels of all shapes."""
  _, base, adapter = made
  after = paths.flatten(moved(adapter))
  big_a, big_b = map(np.asarray, vera.projections(0, 128, 96, 128))
  for path in (Q, 'layers/mlp/up/kernel', 'layers/mlp/down/kernel'):
    node = after[path]
    *_, i, o = paths.flatten(base)[path].shape
    w = np.asarray(materialize(paths.flatten(base)[path]))[2]
    d, b = np.asarray(node.lambda_d)[2], np.asarray(node.lambda_b)[2]
    v = w + (big_a[:i] * d) @ (big_b[:, :o] * b)
    if node.magnitude is not None:
      v = v * (np.asarray(node.magnitude)[2] / np.linalg.norm(v, axis=0))
    tree = attach(base, paths.unflatten(after))
    got = materialize(paths.flatten(tree)[path])
    np.testing.assert_allclose(got[2], v, atol=2e-6)
    # Layer 1 has rank 0.
    np.testing.assert_allclose(
      got[1], materialize(paths.flatten(base)[path])[1]
    )


def test_it_learns(made):
  model, base, adapter = made
  optimizer = optax.adam(2e-2)

  @jax.jit
  def step(adapter, state, base):
    def loss(adapter):
      logits = model.apply({'params': attach(base, adapter)}, TOKENS)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], TOKENS[:, 1:]
      ).mean()

    value, grads = jax.value_and_grad(loss)(adapter)
    updates, state = optimizer.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state, value

  state, losses = optimizer.init(adapter), []
  for _ in range(10):
    adapter, state, value = step(adapter, state, base)
    losses.append(float(value))
  assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_for_others_it_is_a_lora(made, tmp_path):
  source = tiny.write(tmp_path / 'source')
  model, base, adapter = made
  after = moved(adapter)
  with pytest.raises(ValueError, match=r'other random matrices.*folded'):
    save_adapter(tmp_path / 'no', after)
  export_folded(tmp_path / 'out', base, after, source)
  _, folded, _ = load_pretrained(tmp_path / 'out' / 'model', remat='none')
  plain = load_adapter(tmp_path / 'out' / 'adapter', folded)
  got = ours.logits(model, attach(folded, plain), TOKENS)
  want = ours.logits(model, attach(base, after), TOKENS)
  assert ours.relative(got, want) <= 1e-5


@pytest.mark.slow
def test_folded_it_has_no_scale_of_its_own():
  model, base, _ = tiny.loaded(quant=QuantSpec())
  spec = AdapterSpec('vera', rank=16, rslora=True, alpha_pattern={'.*': 64.0})
  after = moved(init_adapter(jax.random.key(0), base, spec))
  folded, plain = fold(base, after)
  got = ours.logits(model, attach(folded, plain), TOKENS)
  want = ours.logits(model, attach(base, after), TOKENS)
  assert ours.relative(got, want) <= 1e-5


def test_ranks_of_shared_matrices_do_not_differ():
  with pytest.raises(ValueError, match="method='vera' are shared"):
    AdapterSpec('vera', rank=64, rank_pattern={'.*/q/kernel': 8})


def test_bounds_are_kaimings():
  a, b = vera.projections(3, 256, 64, 128)
  assert (a.shape, b.shape) == ((256, 64), (64, 128))
  assert float(jnp.abs(a).max()) == pytest.approx((6 / 256) ** 0.5, rel=1e-2)
  assert float(jnp.abs(b).max()) == pytest.approx((6 / 64) ** 0.5, rel=1e-2)
  other, _ = vera.projections(4, 256, 64, 128)
  assert float(jnp.abs(a - other).max()) > 0.1
