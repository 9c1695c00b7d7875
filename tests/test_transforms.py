"""The battery every method passes, over {plain, nf4, nf4 double}."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  adapted_norms,
  attach,
  freeze,
  init_adapter,
  linear,
  merge,
  norms,
  paths,
  quantize,
)
from qdora_jax.linear import per_layer
from qdora_jax.transforms import unquantized

WIDTH, FF, LAYERS = 64, 128, 3
TOKENS = np.random.RandomState(0).randint(0, 96, (2, 12))


def _params():
  draw = np.random.RandomState(1).standard_normal
  shapes = {
    'embed/embedding': (96, WIDTH),
    'layers/attn/q/kernel': (LAYERS, WIDTH, WIDTH),
    'layers/mlp/up/kernel': (LAYERS, WIDTH, FF),
    'layers/mlp/down/kernel': (LAYERS, FF, WIDTH),
    'final_norm/scale': (WIDTH,),
  }
  flat = {
    path: jnp.asarray(draw(shape) * shape[-1] ** -0.5, jnp.float32)
    for path, shape in shapes.items()
  }
  return paths.unflatten(flat)


PARAMS = _params()
BASES = ['plain', 'nf4', 'nf4 double']
METHODS = ['lora', 'dora', 'magnitude']
battery = pytest.mark.parametrize('stored', BASES)
methods = pytest.mark.parametrize('method', METHODS)


def params(stored: str, dtype=jnp.float32):
  tree = jax.tree.map(lambda a: a.astype(dtype), PARAMS)
  if stored == 'plain':
    return tree
  return quantize(tree, QuantSpec(double_quant=stored == 'nf4 double'))


@jax.jit
def logits(tree):
  """A small residual network with a scan over its layers."""

  def layer(x, w):
    x += jnp.tanh(linear(x, w['attn']['q']['kernel']))
    hidden = jnp.tanh(linear(x, w['mlp']['up']['kernel']))
    return x + linear(hidden, w['mlp']['down']['kernel']), None

  table = tree['embed']['embedding'].astype(jnp.float32)
  x, _ = jax.lax.scan(layer, table[TOKENS], tree['layers'])
  return x @ table.T


def trained(base, spec, seed=1):
  """An adapter as training leaves it: nothing at its initial value."""
  adapter = init_adapter(jax.random.key(seed), base, spec)

  def move(path, leaf):
    noise = 0.05 * jax.random.normal(jax.random.key(len(str(path))), leaf.shape)
    # Padded ranks stay zero.
    return leaf + jnp.where(_padding(adapter, path), 0, noise)

  return jax.tree_util.tree_map_with_path(move, adapter)


def _padding(adapter, path):
  *_, part = path
  node = adapter
  for key in path[:-1]:
    node = node[key.key]
  ranks = np.array(node.ranks)
  if part.name == 'lora_a':
    return np.arange(node.lora_a.shape[-1])[None, None] >= ranks[:, None, None]
  if part.name == 'lora_b':
    rows = np.arange(node.lora_b.shape[-2])
    return rows[None, :, None] >= ranks[:, None, None]
  return False


def close(a, b, tolerance=1e-5):
  scale = np.abs(b).max()
  assert np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * scale


@battery
@methods
def test_identity_at_init(stored, method):
  base = params(stored)
  adapter = init_adapter(jax.random.key(1), base, AdapterSpec(method))
  close(logits(attach(base, adapter, norms=norms(base))), logits(base), 1e-6)


def test_what_is_asked_again_is_not_traced_again():
  base = params('nf4 double')
  norms(base)
  before = per_layer._cache_size()
  norms(base)
  assert per_layer._cache_size() == before > 0


@battery
@methods
def test_merged_frozen_and_attached_agree(stored, method):
  base = params(stored)
  adapter = trained(base, AdapterSpec(method, rank=4))
  attached = logits(attach(base, adapter))
  assert np.abs(attached - logits(base)).max() > 0.05
  close(logits(merge(base, adapter)), attached)
  close(logits(freeze(base, adapter)), attached)
  fixed = norms(base, adapter)
  close(logits(attach(base, adapter, norms=fixed)), attached)
  cached = adapted_norms(base, adapter, fixed)
  close(logits(attach(base, adapter, norms=cached)), attached)
  for leaf in jax.tree.leaves(merge(base, adapter)):
    assert leaf.dtype == jnp.float32


@battery
@methods
def test_gradients_and_optimizer_state_exist_for_the_adapter_alone(
  stored, method
):
  base = params(stored)
  adapter = trained(base, AdapterSpec(method, rank=4))

  def loss(adapter):
    out = logits(attach(base, adapter))
    return optax.softmax_cross_entropy_with_integer_labels(out, TOKENS).mean()

  grads = jax.jit(jax.grad(loss))(adapter)
  assert jax.tree.structure(grads) == jax.tree.structure(adapter)
  parts = {
    'lora': {'lora_a', 'lora_b'},
    'dora': {'lora_a', 'lora_b', 'magnitude'},
    'magnitude': {'magnitude'},
  }[method]
  found = {
    path[-1].name for path, _ in jax.tree_util.tree_leaves_with_path(adapter)
  }
  assert found == parts
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  state = optax.adamw(1e-3).init(adapter)
  count = sum(a.size for a in jax.tree.leaves(adapter))
  assert sum(a.size for a in jax.tree.leaves(state)) == 2 * count + 1


@battery
@methods
def test_jit_equals_eager(stored, method):
  base = params(stored)
  adapter = trained(base, AdapterSpec(method, rank=4))

  def f(base, adapter):
    leaf = attach(base, adapter)['layers']['mlp']['up']['kernel']
    one = jax.tree.map(lambda a: a[0], leaf)
    return linear(jnp.sin(jnp.arange(128.0)).reshape(2, 64), one)

  close(jax.jit(f)(base, adapter), f(base, adapter), 1e-6)


@battery
@methods
def test_scan_equals_a_loop_over_layers(stored, method):
  base = params(stored)
  spec = AdapterSpec(method, rank=4, rank_pattern={'layers/1/.*': 2})
  leaf = attach(base, trained(base, spec))['layers']['mlp']['up']['kernel']
  x = jax.random.normal(jax.random.key(3), (5, 64))
  _, ys = jax.lax.scan(lambda c, w: (c, linear(x, w)), 0, leaf)
  for n in range(3):
    one = linear(x, jax.tree.map(lambda a, n=n: a[n], leaf))
    close(ys[n], one, 1e-6)


@battery
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_dtype_is_preserved(stored, dtype):
  base = params(stored, dtype)
  adapter = init_adapter(jax.random.key(1), base, AdapterSpec('dora', 4))
  assert {a.dtype for a in jax.tree.leaves(adapter)} == {jnp.dtype('float32')}
  whole = paths.flatten(merge(base, adapter))
  assert {a.dtype for a in whole.values()} == {jnp.dtype(dtype)}


def test_ranks_and_alphas_by_path_and_layer():
  """Each layer is what it would be alone, with its own rank and alpha."""
  base = params('nf4')
  spec = AdapterSpec(
    'dora',
    rank=8,
    alpha=16.0,
    targets=r'layers/[01]/attn/.*/kernel|.*/up/kernel',
    rank_pattern={r'layers/0/attn/q/.*': 2, r'layers/2/.*': 0, r'.*/up/.*': 4},
    alpha_pattern={r'layers/1/.*': 5.0},
  )
  adapter = trained(base, spec)
  q, up = (
    adapter['layers']['attn']['q']['kernel'],
    adapter['layers']['mlp']['up']['kernel'],
  )
  assert q.ranks == (2, 8, 0) and up.ranks == (4, 4, 0)
  assert q.lora_a.shape == (3, 64, 8) and up.lora_a.shape == (3, 64, 4)
  assert (q.lora_a[0, :, 2:] == 0).all() and (q.lora_b[0, 2:] == 0).all()
  attached = attach(base, adapter)['layers']['attn']['q']['kernel']
  np.testing.assert_allclose(attached.scale, [8.0, 0.625, 0.0])
  # Layer 2 is not adapted: its weight is the base's, magnitude or not.
  whole = merge(base, adapter)['layers']['attn']['q']['kernel']
  plain = merge(base, {})['layers']['attn']['q']['kernel']
  np.testing.assert_array_equal(whole[2], plain[2])
  assert jnp.abs(whole[0] - plain[0]).max() > 1e-3

  def loss(adapter):
    out = logits(attach(base, adapter))
    return optax.softmax_cross_entropy_with_integer_labels(out, TOKENS).mean()

  grads = jax.grad(loss)(adapter)['layers']['attn']['q']['kernel']
  assert (grads.magnitude[2] == 0).all() and (grads.magnitude[1] != 0).any()
  assert (grads.lora_a[0, :, 2:] == 0).all()
  assert (grads.lora_b[0, 2:] == 0).all() and (grads.lora_b[0, :2] != 0).any()


def test_initial_values_depend_on_name_and_key_alone():
  base = params('plain')
  one = init_adapter(jax.random.key(1), base, AdapterSpec('lora', 4))
  some = AdapterSpec('lora', 4, targets=r'layers/[12]/attn/q/kernel')
  two = init_adapter(jax.random.key(1), base, some)
  a, b = (t['layers']['attn']['q']['kernel'].lora_a for t in (one, two))
  np.testing.assert_array_equal(a[1:], b[1:])
  assert (b[0] == 0).all()
  other = init_adapter(jax.random.key(2), base, AdapterSpec('lora', 4))
  assert (a != other['layers']['attn']['q']['kernel'].lora_a).any()
  # PEFT: uniform within 1/sqrt(I).
  assert jnp.abs(a).max() <= 64**-0.5 and jnp.abs(a).max() > 0.9 * 64**-0.5


def test_rslora_scales_by_the_root_of_the_rank():
  base = params('plain')
  spec = AdapterSpec('lora', rank=16, alpha=8.0, rslora=True)
  adapter = init_adapter(jax.random.key(1), base, spec)
  leaf = attach(base, adapter)['layers']['attn']['q']['kernel']
  np.testing.assert_allclose(leaf.scale, [2.0] * 3)


def test_dropout_is_drawn_by_key_and_layer():
  base = params('plain')
  adapter = trained(base, AdapterSpec('dora', 4, dropout=0.5))
  still = logits(attach(base, adapter))
  a, b, again = (
    logits(attach(base, adapter, dropout_key=jax.random.key(n)))
    for n in (1, 2, 1)
  )
  assert jnp.abs(a - still).max() > 1e-3 and jnp.abs(a - b).max() > 1e-3
  np.testing.assert_array_equal(a, again)
  leaf = attach(base, adapter, dropout_key=jax.random.key(1))
  keys = leaf['layers']['attn']['q']['kernel'].dropout_key
  assert len(np.unique(jax.random.key_data(keys), axis=0)) == 3


def test_plain_arrays_beside_adapters_are_trained_too():
  base = params('nf4')
  adapter = trained(base, AdapterSpec('dora', 4))
  scale = base['final_norm']['scale'] * 2
  attached = attach(base, {**adapter, 'final_norm': {'scale': scale}})
  np.testing.assert_array_equal(attached['final_norm']['scale'], scale)


def test_a_plain_array_that_fits_nothing_is_refused():
  base = params('plain')
  for wrong in (
    {'final_nrm': {'scale': jnp.ones(WIDTH)}},
    {'final_norm': {'scale': jnp.ones(7)}},
  ):
    with pytest.raises(ValueError, match='takes the place of nothing'):
      attach(base, wrong)


def test_bytes_are_as_eval_shape_predicts():
  tree = params('plain')

  def both(tree):
    base = quantize(tree, QuantSpec())
    return base, init_adapter(jax.random.key(0), base, AdapterSpec())

  predicted = jax.eval_shape(both, tree)
  real = both(tree)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), predicted) == (
    jax.tree.map(lambda a: (a.shape, a.dtype), real)
  )


def test_kernels_that_no_block_divides_stay_and_are_told():
  tree = {
    'layers': {
      'mlp': {
        'up': {'kernel': jnp.ones((2, 64, 172))},
        'down': {'kernel': jnp.ones((2, 172, 64))},
      }
    }
  }
  base = quantize(tree, QuantSpec())
  down = base['layers']['mlp']['down']['kernel']
  np.testing.assert_array_equal(down, tree['layers']['mlp']['down']['kernel'])
  (reason,) = unquantized(base, QuantSpec()).items()
  assert reason[0] == 'layers/mlp/down/kernel' and 'I=172' in reason[1]
  with pytest.raises(ValueError, match='nothing that targets'):
    quantize(tree, QuantSpec(targets='.*/down/kernel'))


def test_what_cannot_be_quantized_is_refused():
  base = params('plain')
  with pytest.raises(ValueError, match=r'expected kernels \[I, O\]'):
    quantize(base, QuantSpec(targets='.*', block_size=2))
  with pytest.raises(ValueError, match='quantized together'):
    quantize(base, QuantSpec(targets='layers/0/.*/kernel'))
  with pytest.raises(ValueError, match='already quantized: nf4/64 double'):
    quantize(params('nf4 double'), QuantSpec())
  with pytest.raises(ValueError, match='matches no parameter'):
    quantize(base, QuantSpec(targets='q_proj'))


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'method': 'doar'}, "method='doar'"),
    ({'rank': 0}, 'rank=0'),
    ({'alpha': 0.0}, 'alpha=0.0'),
    ({'dropout': 1.0}, r'dropout=1\.0'),
    ({'rank': 65}, 'rank 65 for layers/0/attn/.*smaller side'),
    ({'targets': 'q_proj'}, 'matches no parameter'),
    ({'targets': '.*norm/scale'}, r'expected kernels \[I, O\]'),
    ({'targets': 'embed/embedding'}, r'expected kernels \[I, O\]'),
    ({'alpha_pattern': {'.*': 0.0}}, 'alpha_pattern'),
    ({'rank_pattern': {'nothing': 4}}, "'nothing' matches no parameter"),
  ],
)
def test_wrong_specs_are_refused(wrong, message):
  base = params('plain')
  with pytest.raises(ValueError, match=message):
    init_adapter(jax.random.key(0), base, AdapterSpec(**wrong))


def test_an_adapter_of_another_model_is_refused():
  base = params('plain')
  adapter = init_adapter(jax.random.key(0), base, AdapterSpec())
  smaller = {'layers': {'attn': {'q': {'kernel': jnp.zeros((3, 32, 64))}}}}
  with pytest.raises(ValueError, match='the base has not; it has'):
    attach({'other': {'kernel': jnp.zeros((4, 4))}}, adapter)
  only_q = {'layers': {'attn': {'q': adapter['layers']['attn']['q']}}}
  with pytest.raises(ValueError, match='does not fit the base'):
    attach(smaller, only_q)
