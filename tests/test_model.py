"""The decoder: caches, padding, packing, remat and dtypes change nothing."""

import collections
import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  init_adapter,
  norms,
  paths,
)
from qdora_jax.model import Block, Decoder, RMSNorm, init_cache
from qdora_jax.rope import angles
from qdora_jax.sight import NOWHERE, look

TOLERANCE = 1e-5


def tokens(seed, *shape):
  draw = np.random.RandomState(seed)
  return jnp.asarray(draw.randint(3, 256, shape), jnp.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames='method')
def logits(model, params, *args, method=None):
  """Compiled once per shape: most tests give 2 x 8 tokens."""
  return model.apply({'params': params}, *args, method=method)


@pytest.fixture(scope='module')
def qdora():
  """A DoRA over NF4, away from its start: every leaf type but LoRA's."""
  model, base, _ = tiny.loaded(quant=QuantSpec())
  adapter = init_adapter(jax.random.key(0), base, AdapterSpec(rank=4))
  return model, attach(base, tiny.perturbed(adapter))


def test_decoding_from_a_cache_is_the_full_forward_pass(qdora):
  model, params = qdora
  ids = tokens(0, 2, 9)
  step = jax.jit(lambda t, c: model.apply({'params': params}, t, cache=c))
  cache = init_cache(model.config, 2, 11)
  parts = []
  for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
    part, cache = step(ids[:, begin:end], cache)
    parts.append(part)
  assert int(cache['index']) == 9
  got = jnp.concatenate(parts, axis=1)
  assert tiny.relative(got, logits(model, params, ids)) <= TOLERANCE


def test_left_padded_rows_are_the_unpadded_rows():
  model, params, _ = tiny.loaded()
  lengths = (8, 5)
  # What stands behind a row changes nothing in it.
  rows = tokens(1, 2, 8)
  padded = np.full((2, 8), 9, np.int32)
  places = np.full((2, 8), NOWHERE, np.int32)
  for n, length in enumerate(lengths):
    padded[n, 8 - length :] = rows[n, :length]
    places[n, 8 - length :] = np.arange(length)
  got = logits(model, params, jnp.asarray(padded), jnp.asarray(places))
  assert np.isfinite(got).all()
  want = logits(model, params, rows)
  for n, length in enumerate(lengths):
    assert tiny.relative(got[n, 8 - length :], want[n, :length]) <= TOLERANCE


def packed():
  """Two examples of four, without a common token, in one of two rows."""
  both = jnp.stack([jnp.arange(10, 18), jnp.arange(20, 28)])
  places = jnp.tile(jnp.arange(4), (2, 2))
  segments = jnp.repeat(jnp.asarray([[0, 1], [0, 1]]), 4, axis=1)
  return both, places, segments


def test_packed_examples_are_the_same_as_alone():
  model, params, _ = tiny.loaded()
  both, places, segments = packed()
  got = logits(model, params, both, places, segments)
  # The second example at the beginning of a row, and alone up to its end.
  alone = logits(model, params, jnp.roll(both, 4, axis=1))[:, :4]
  first = logits(model, params, both)
  assert tiny.relative(got[:, :4], first[:, :4]) <= TOLERANCE
  assert tiny.relative(got[:, 4:], alone) <= TOLERANCE
  assert tiny.relative(first[:, 4:], alone) > 1e-2


@pytest.mark.parametrize('mine', [0, 1])
def test_no_gradient_crosses_from_one_packed_example_to_the_other(mine):
  model, params, _ = tiny.loaded()
  both, places, segments = packed()
  # Of the last layer's output: the tied head would touch every embedding.
  weight = (segments == mine)[..., None] * jnp.arange(1.0, 65.0)[None, None]

  @jax.jit
  def gradient(embed):
    def f(embed):
      tree = {**params, 'embed': embed}
      x, _ = model.apply(
        {'params': tree}, both, places, segments, method='hidden'
      )
      return jnp.sum(jnp.square(x) * weight)

    return jax.grad(f)(embed)

  rows = np.abs(gradient(params['embed'])['embedding']).max(axis=1)
  inside = np.asarray(both[segments == mine])
  assert (rows[inside] > 0).all()
  assert not np.delete(rows, inside).any()


def objective(model):
  ids = tokens(3, 2, 8)

  def f(params):
    out = model.apply({'params': params}, ids)
    return jnp.mean(jnp.square(nn.log_softmax(out)))

  return f


def test_remat_changes_neither_loss_nor_gradients(qdora):
  model, _ = qdora
  _, base, _ = tiny.loaded(quant=QuantSpec())
  spec = AdapterSpec(rank=4, targets=r'.*/(q|down)/kernel')
  adapter = tiny.perturbed(init_adapter(jax.random.key(0), base, spec))

  def value_and_grad(remat):
    f = objective(model.clone(remat=remat))
    return jax.jit(jax.value_and_grad(lambda a: f(attach(base, a))))(adapter)

  value, grads = value_and_grad('none')
  for remat in ('dots', 'block', 'offload'):
    other, others = value_and_grad(remat)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    for a, b in zip(
      jax.tree.leaves(others), jax.tree.leaves(grads), strict=True
    ):
      assert tiny.relative(a, b) <= 1e-4


def test_remat_keeps_less_for_the_backward_pass():
  """Shapes of what jax.vjp keeps, nothing is run."""
  model, params, _ = tiny.loaded()

  def kept(remat):
    f = objective(model.clone(remat=remat))
    pull = jax.eval_shape(lambda p: jax.vjp(f, p)[1], params)
    return sum(a.size for a in jax.tree.leaves(pull))

  assert kept('none') > 1.05 * kept('dots') > 1.05**2 * kept('block')


def products_of_a_step(method, remat, name, **more):
  """({(left type, right type): how often multiplied}, (I, O) of the kernel)."""
  model, base, _ = tiny.loaded(quant=QuantSpec())
  spec = AdapterSpec(method, rank=3, targets=f'.*/{name}/kernel', **more)
  adapter = init_adapter(jax.random.key(0), base, spec)
  fixed = norms(base, adapter)
  f = objective(model.clone(remat=remat))

  def loss(adapter):
    return f(attach(base, adapter, norms=fixed))

  text = jax.jit(jax.grad(loss)).lower(adapter).as_text()
  products = collections.Counter(
    re.findall(r'dot_general .*: \(tensor<(\w+)>, tensor<(\w+)>\)', text)
  )
  return products, base['layers']['mlp'][name]['kernel'].shape[-2:]


@pytest.mark.parametrize(
  ('remat', 'detach'),
  [*((r, True) for r in ('none', 'dots', 'block', 'offload')), ('dots', False)],
)
def test_a_norm_is_found_once(remat, detach):
  """A^T W is multiplied on the way forward alone."""
  products, (i, o) = products_of_a_step('dora', remat, 'down', detach=detach)
  assert products[f'3x{i}xf32', f'{i}x{o}xf32'] == 1


@pytest.mark.parametrize('method', ['lora', 'dora'])
def test_dots_keeps_what_an_adapter_made_of_a_product(method):
  """s (x A) B is added to x W on the way forward alone."""
  again, (_, o) = products_of_a_step(method, 'block', 'up')
  once, _ = products_of_a_step(method, 'dots', 'up')
  thin = '16x3xf32', f'3x{o}xf32'
  assert (again[thin], once[thin]) == (2, 1)


@pytest.mark.parametrize('remat', ['block', 'offload'])
def test_the_last_product_is_made_once(remat):
  """DoRA's gain asks for it in the backward pass, and finds it."""
  for method in ('lora', 'dora'):
    products, (_, o) = products_of_a_step(method, remat, 'down')
    assert products['16x3xf32', f'3x{o}xf32'] == 1
  products, (_, o) = products_of_a_step('dora', remat, 'up')
  assert products['16x3xf32', f'3x{o}xf32'] == 2


def test_offloaded_block_inputs_wait_in_the_hosts_memory():
  """Of the forward pass the backward one gets them from there, and no more."""
  model, params, _ = tiny.loaded()
  ids = tokens(3, 2, 8)

  def kept(remat):
    """(what stays on the device, what goes to the host), in numbers."""
    f = objective(model.clone(remat=remat))
    pull = jax.make_jaxpr(lambda p: jax.vjp(f, p)[1])(params)
    spaces = collections.Counter()
    for aval in pull.out_avals:
      spaces[aval.memory_space] += aval.size
    return spaces[jax.memory.Space.Device], spaces[jax.memory.Space.Host]

  block, offload = kept('block'), kept('offload')
  inputs = model.config.layers * ids.size * model.config.width
  assert block[1] == 0
  assert offload == (block[0] - inputs, inputs)


def test_bfloat16_products_give_float32_logits(qdora):
  model, params = qdora
  half = model.clone(dtype=jnp.bfloat16)
  ids = tokens(4, 2, 8)
  hidden, _ = logits(half, params, ids, method='hidden')
  assert hidden.dtype == jnp.bfloat16
  got = logits(half, params, ids)
  assert got.dtype == jnp.float32
  assert np.isfinite(got).all()
  assert 0 < tiny.relative(got, logits(model, params, ids)) < 0.05


def test_the_scan_is_a_loop_over_blocks(qdora):
  model, params = qdora
  c = model.config
  ids = tokens(5, 2, 8)
  places = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))
  turns = angles(c.kinds[0].rope, places)[None]
  sights = jax.tree.map(lambda a: a[None], look(places, places))

  @jax.jit
  def block(layer, x):
    return Block(c).apply({'params': layer}, x, turns, sights, None, None)[0]

  x = params['embed']['embedding'][ids]
  for n in range(c.layers):
    x = block(jax.tree.map(lambda a, n=n: a[n], params['layers']), x)
  x = RMSNorm(c).apply({'params': params['final_norm']}, x)
  want = x @ params['embed']['embedding'].T
  assert tiny.relative(logits(model, params, ids), want) <= TOLERANCE


@pytest.mark.parametrize('tied', [True, False])
def test_parameters_are_where_the_docstring_says(tied):
  d, f, n, v = 64, 128, 3, 256
  wide, narrow = (64, 32) if tied else (128, 64)
  want = {
    'embed/embedding': (v, d),
    'layers/attn_norm/scale': (n, d),
    'layers/attn/q/kernel': (n, d, wide),
    'layers/attn/k/kernel': (n, d, narrow),
    'layers/attn/v/kernel': (n, d, narrow),
    'layers/attn/o/kernel': (n, wide, d),
    'layers/mlp_norm/scale': (n, d),
    'layers/mlp/gate/kernel': (n, d, f),
    'layers/mlp/up/kernel': (n, d, f),
    'layers/mlp/down/kernel': (n, f, d),
    'final_norm/scale': (d,),
  }
  if not tied:
    for part, size in zip('qkvo', (wide, narrow, narrow, d), strict=True):
      want[f'layers/attn/{part}/bias'] = (n, size)
    want['lm_head/kernel'] = (d, v)
  model, params, _ = tiny.loaded(tied)
  made = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )['params']
  for tree in (made, params):
    assert {p: a.shape for p, a in paths.flatten(tree).items()} == want


def test_an_untied_head_is_used():
  model, params, _ = tiny.loaded()
  untied = Decoder(dataclasses.replace(model.config, tied=False))
  ids = tokens(6, 2, 8)
  head = {'kernel': params['embed']['embedding'].T}
  got = logits(untied, {**params, 'lm_head': head}, ids)
  assert tiny.relative(got, logits(model, params, ids)) <= TOLERANCE
  other = logits(
    untied, {**params, 'lm_head': {'kernel': -head['kernel']}}, ids
  )
  np.testing.assert_allclose(other, -got, atol=1e-5)


def test_biases_are_added():
  """With zero kernels out of attention and feed-forward they are all left."""
  model, params, _ = tiny.loaded(tied=False)
  flat = paths.flatten(params)
  for path in ('layers/attn/o/kernel', 'layers/mlp/down/kernel'):
    flat[path] = jnp.zeros_like(flat[path])
  ids = tokens(7, 2, 8)
  tree = paths.unflatten(flat)
  got, _ = logits(model, tree, ids, method='hidden')
  x = np.asarray(flat['embed/embedding'])[ids]
  x = x + np.asarray(flat['layers/attn/o/bias']).sum(0)[None, None]
  x /= np.sqrt(np.mean(x**2, -1, keepdims=True) + model.config.eps)
  want = x * np.asarray(flat['final_norm/scale'])[None, None]
  assert tiny.relative(got, want) <= TOLERANCE
  # q, k and v have theirs too.
  plain = logits(model, params, ids)
  for part in 'qkv':
    flat = paths.flatten(params)
    path = f'layers/attn/{part}/bias'
    assert np.abs(flat[path]).max() > 0
    flat[path] = jnp.zeros_like(flat[path])
    assert (
      tiny.relative(logits(model, paths.unflatten(flat), ids), plain) > 1e-3
    )
