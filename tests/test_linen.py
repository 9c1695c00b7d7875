"""Other people's Linen models: traced, quantized, adapted, merged."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from tiny import quick_compiles, relative  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  init_adapter,
  linen,
  merge,
  paths,
  quantize,
)

ALL = r'.*/kernel'


class ViT(nn.Module):
  """A vision transformer as people write them: nothing here knows of us."""

  width: int = 64
  heads: int = 4
  depth: int = 2

  @nn.compact
  def __call__(self, images):
    x = nn.Conv(self.width, (4, 4), strides=(4, 4), name='patches')(images)
    x = x.reshape(x.shape[0], -1, self.width)
    places = jnp.arange(x.shape[1])
    x = x + nn.Embed(x.shape[1], self.width, name='places')(places)[None]
    token = self.param('token', nn.initializers.zeros, (1, 1, self.width))
    x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
    for n in range(self.depth):
      y = nn.LayerNorm(name=f'norm_{n}a')(x)
      attention = nn.MultiHeadDotProductAttention(self.heads, name=f'attn_{n}')
      x = x + attention(y)
      y = nn.LayerNorm(name=f'norm_{n}b')(x)
      y = nn.gelu(nn.Dense(128, name=f'up_{n}')(y))
      x = x + nn.Dense(self.width, name=f'down_{n}')(y)
    return nn.Dense(10, name='head')(x[:, 0])


@pytest.fixture(scope='module')
def vit():
  model = ViT()
  images = jax.random.normal(jax.random.key(1), (3, 16, 16, 4))
  params = jax.jit(model.init)(jax.random.key(0), images)['params']
  return model, params, images, linen.trace(model, params, images)


def test_the_axes_of_every_kernel(vit):
  model, params, images, layout = vit
  k = linen.Kernel
  assert layout.found['attn_0/query'] == k('DenseGeneral', (64,), (4, 16))
  assert layout.found['attn_1/out'] == k('DenseGeneral', (4, 16), (64,))
  assert layout.found['patches'] == k('Conv', (4, 4, 4), (64,))
  assert layout.found['places'] == k('Embed', (16,), (64,))
  assert layout.found['head'] == k('Dense', (64,), (10,))
  assert len(layout.found) == 3 + 2 * 6
  assert list(layout.left) == ['token']
  table = str(layout)
  assert 'attn_0/query/kernel  DenseGeneral  64         4 x 16' in table
  assert 'left alone: token: no Dense, DenseGeneral, Conv or Embed' in table
  del model, params, images


def test_the_layout_goes_there_and_back(vit):
  _, params, _, layout = vit
  flat = layout.kernels(params)
  assert flat['attn_0']['out']['kernel'].shape == (64, 64)
  assert flat['patches']['kernel'].shape == (64, 64)
  assert flat['places']['kernel'].shape == (16, 64)
  back = layout.original(flat)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(a, b)


def specs(method, **options):
  targets = r'(?!places/).*/kernel'
  return AdapterSpec(method, rank=4, targets=targets, **options)


def moved(adapter):
  def move(path, a):
    noise = jax.random.normal(jax.random.key(len(paths.of(path))), a.shape)
    return a * (1 + 0.1 * noise) + 0.05 * noise

  return jax.tree_util.tree_map_with_path(move, adapter)


@pytest.mark.parametrize(
  'method, quant',
  [pytest.param('lora', False, marks=tiny.AGAIN), ('dora', True)],
)
@pytest.mark.slow
def test_merged_is_attached(vit, method, quant):
  model, params, images, layout = vit
  base = layout.kernels(params)
  if quant:
    base = quantize(base, QuantSpec(ALL, block_size=16))
    leaves = paths.flatten(base)
    assert all(hasattr(v, 'codes') for p, v in leaves.items() if 'kernel' in p)
  adapter = init_adapter(jax.random.key(2), base, specs(method))
  run = jax.jit(lambda tree: layout.apply(tree, images))
  start = run(attach(base, adapter))
  plain = model.apply({'params': layout.original(merge(base, {}))}, images)
  assert relative(start, plain) <= 1e-5
  if not quant:
    whole = model.apply({'params': params}, images)
    assert relative(start, whole) <= 1e-5
  adapter = moved(adapter)
  got = run(attach(base, adapter))
  merged = layout.original(merge(base, adapter))
  want = model.apply({'params': merged}, images)
  assert relative(got, want) <= 1e-5
  assert relative(got, plain) > 1e-2


@pytest.mark.slow
def test_it_learns(vit):
  _, params, images, layout = vit
  base = quantize(layout.kernels(params), QuantSpec(ALL, block_size=16))
  adapter = init_adapter(jax.random.key(2), base, specs('dora'))
  labels = jnp.array([3, 1, 4])
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(adapter, state, base):
    def loss(adapter):
      logits = layout.apply(attach(base, adapter), images)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels
      ).mean()

    value, grads = jax.value_and_grad(loss)(adapter)
    updates, state = optimizer.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state, value

  state, losses = optimizer.init(adapter), []
  for _ in range(8):
    adapter, state, value = step(adapter, state, base)
    losses.append(float(value))
  assert losses[-1] < 0.3 * losses[0]


CONVOLUTIONS = {
  'same': (nn.Conv(6, (3, 3)), (2, 8, 7, 4)),
  'strided': (nn.Conv(6, (3, 2), strides=(2, 1), use_bias=False), (2, 9, 8, 4)),
  'circular': (nn.Conv(6, (3, 3), padding='CIRCULAR'), (2, 8, 8, 4)),
  'causal': (nn.Conv(6, (3,), padding='CAUSAL'), (2, 8, 4)),
  'dilated': (nn.Conv(6, (3, 3), kernel_dilation=2), (2, 9, 9, 4)),
  'transposed': (nn.Conv(6, (3, 3), input_dilation=2, padding=1), (2, 5, 5, 4)),
  'no batch': (nn.Conv(6, (3, 3)), (8, 8, 4)),
  'two batches': (nn.Conv(6, (3,)), (2, 3, 8, 4)),
  'several axes': (nn.DenseGeneral((2, 3), axis=(-2, 1)), (2, 4, 6, 4)),
  'dense in half': (nn.Dense(6, dtype=jnp.bfloat16), (2, 4)),
}


class One(nn.Module):
  inner: nn.Module

  def __call__(self, x):
    return self.inner(x)


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_a_module_runs_as_itself(name):
  """Adapted and merged into a plain array, a module gives the same."""
  inner, shape = CONVOLUTIONS[name]
  model = One(inner)
  x = jax.random.normal(jax.random.key(0), shape)
  params = model.init(jax.random.key(1), x)['params']
  layout = linen.trace(model, params, x)
  base = layout.kernels(params)
  spec = AdapterSpec('dora', rank=2, targets=ALL)
  adapter = moved(init_adapter(jax.random.key(2), base, spec))
  got = layout.apply(attach(base, adapter), x)
  merged = layout.original(merge(base, adapter))
  want = model.apply({'params': merged}, x)
  assert got.dtype == want.dtype
  limit = 2e-2 if want.dtype == jnp.bfloat16 else 1e-5
  assert relative(got.astype(np.float32), want.astype(np.float32)) <= limit


class Tagger(nn.Module):
  """An embedding that is its head, too."""

  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(32, 16, name='embed')
    return embed.attend(nn.tanh(embed(ids)))


def test_an_embedding_is_adapted_and_quantized():
  model, ids = Tagger(), jnp.array([[1, 5, 31]])
  params = model.init(jax.random.key(0), ids)['params']
  layout = linen.trace(model, params, ids)
  base = quantize(layout.kernels(params), QuantSpec(ALL, block_size=16))
  spec = AdapterSpec('dora', rank=2, targets=ALL)
  adapter = moved(init_adapter(jax.random.key(2), base, spec))
  # One magnitude for each feature of the embedding.
  assert adapter['embed']['kernel'].magnitude.shape == (16,)
  got = layout.apply(attach(base, adapter), ids)
  merged = layout.original(merge(base, adapter))
  assert relative(got, model.apply({'params': merged}, ids)) <= 1e-5


class Strange(nn.Module):
  """A product that no known module makes."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name='known')(x)
    w = self.param('kernel', nn.initializers.normal(), (8, 8))
    return x @ w


def test_what_would_be_missed_is_an_error():
  model, x = One(Strange()), jnp.ones((2, 8))
  params = model.init(jax.random.key(0), x)['params']
  layout = linen.trace(model, params, x)
  assert list(layout.found) == ['inner/known']
  with pytest.raises(ValueError, match=r'inner/kernel, and no Dense.*missed'):
    layout.check(ALL)
  layout.check(r'inner/known/kernel')
  # Without that check, too.
  base = quantize(layout.kernels(params), QuantSpec(ALL, block_size=8))
  with pytest.raises(ValueError, match=r'inner/kernel is quantized .* missed'):
    layout.apply(base, x)


class Sometimes(nn.Module):
  """A layer that only some calls run."""

  @nn.compact
  def __call__(self, x, deep=True):
    return nn.Dense(8, name='more')(x) if deep else x


def test_a_kernel_that_a_call_passes_over_is_an_error():
  model, x = Sometimes(), jnp.ones((2, 8))
  params = model.init(jax.random.key(0), x)['params']
  layout = linen.trace(model, params, x)
  base = quantize(layout.kernels(params), QuantSpec(ALL, block_size=8))
  layout.apply(base, x)
  with pytest.raises(ValueError, match=r'more/kernel is .* did not run with'):
    layout.apply(base, x, deep=False)
  # What is an array may be passed over.
  layout.apply(layout.kernels(params), x, deep=False)


@pytest.mark.parametrize(
  'inner, shape',
  [
    (nn.Conv(4, (3, 3), feature_group_count=2), (1, 5, 5, 4)),
    (nn.DenseGeneral(4, batch_dims=(0,)), (3, 5)),
    (nn.ConvTranspose(4, (3, 3)), (1, 5, 5, 4)),
  ],
)
def test_what_is_not_one_product_is_left_and_named(inner, shape):
  model, x = One(inner), jnp.ones(shape)
  params = model.init(jax.random.key(0), x)['params']
  layout = linen.trace(model, params, x)
  assert not layout.found
  with pytest.raises(ValueError, match='inner/kernel, and no Dense'):
    layout.check(ALL)
  # It runs all the same.
  got = layout.apply(layout.kernels(params), x)
  np.testing.assert_array_equal(got, model.apply({'params': params}, x))


class Scanned(nn.Module):
  called: str

  @nn.compact
  def __call__(self, x):
    class Layer(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name='inner')(nn.tanh(x)), None

    stack = nn.scan(
      nn.remat(Layer),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=3,
    )
    return stack(name=self.called)(x, None)[0]


@pytest.mark.slow
def test_layers_of_a_scan():
  model, x = Scanned('layers'), jnp.ones((2, 16))
  params = model.init(jax.random.key(0), x)['params']
  layout = linen.trace(model, params, x)
  kernel = layout.found['layers/inner']
  assert kernel == linen.Kernel('Dense', (16,), (16,), 3)
  assert '3 layers of Dense' in str(layout)
  base = quantize(layout.kernels(params), QuantSpec(ALL, block_size=16))
  spec = AdapterSpec(
    'dora', rank=2, targets=ALL, rank_pattern={r'layers/1/.*': 1}
  )
  adapter = init_adapter(jax.random.key(2), base, spec)
  adapter = moved(adapter)
  node = adapter['layers']['inner']['kernel']
  adapter['layers']['inner']['kernel'] = node.replace(
    lora_a=node.lora_a.at[1, :, 1].set(0), lora_b=node.lora_b.at[1, 1].set(0)
  )
  run = jax.jit(jax.value_and_grad(lambda t, b: run_sum(layout, b, t, x)))
  got, grads = run(adapter, base)
  merged = layout.original(merge(base, adapter))
  want = jnp.sum(model.apply({'params': merged}, x))
  assert float(got) == pytest.approx(float(want), rel=1e-4)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def run_sum(layout, base, adapter, x):
  return jnp.sum(layout.apply(attach(base, adapter), x))


def test_a_scan_of_another_name_is_told():
  model, x = Scanned('blocks'), jnp.ones((2, 16))
  params = model.init(jax.random.key(0), x)['params']
  words = r"blocks/inner/kernel is \(3, 16, 16\).*a module called 'layers'"
  with pytest.raises(ValueError, match=words):
    linen.trace(model, params, x)


def test_batch_statistics_go_along():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x))

  model, x = Normed(), jnp.ones((2, 16))
  variables = model.init(jax.random.key(0), x)
  params = variables.pop('params')
  layout = linen.trace(model, params, x, variables=variables)
  base = quantize(layout.kernels(params), QuantSpec(ALL, block_size=16))
  got = layout.apply(base, x, variables=variables)
  merged = layout.original(merge(base, {}))
  want = model.apply({**variables, 'params': merged}, x)
  assert relative(got, want) <= 1e-5


class NNXModel(nnx.Module):
  """Two NNX layers."""

  def __init__(self, rngs):
    self.up = nnx.Linear(16, 32, rngs=rngs)
    self.down = nnx.Linear(32, 4, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.gelu(self.up(x)))


def test_an_nnx_model_over_the_bridge():
  model = NNXModel(nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (8, 16))
  labels = jnp.arange(8) % 4
  graph, state = nnx.split(model)
  params = nnx.to_pure_dict(state)
  base = quantize(params, QuantSpec(ALL, block_size=16))
  spec = AdapterSpec('dora', rank=2, targets=ALL)
  adapter = init_adapter(jax.random.key(1), base, spec)
  optimizer = optax.adam(3e-2)

  def call(base, adapter):
    return nnx.merge(graph, merge(base, adapter))(x)

  @functools.partial(jax.jit)
  def step(adapter, opt, base):
    def loss(adapter):
      return optax.softmax_cross_entropy_with_integer_labels(
        call(base, adapter), labels
      ).mean()

    value, grads = jax.value_and_grad(loss)(adapter)
    updates, opt = optimizer.update(grads, opt, adapter)
    return optax.apply_updates(adapter, updates), opt, value

  opt, losses = optimizer.init(adapter), []
  for _ in range(20):
    adapter, opt, value = step(adapter, opt, base)
    losses.append(float(value))
  assert losses[-1] < 0.7 * losses[0]
