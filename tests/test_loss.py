"""The chunked loss: the plain one's value and gradients, logits never whole."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  init_adapter,
  loss,
  quantize,
  sharding,
)
from qdora_jax.model import Decoder

HEAD = r'lm_head/kernel'


def batch_of(rows=4, length=32, seed=0):
  """Random tokens; the first few of each row are not learned."""
  draw = np.random.RandomState(seed)
  tokens = draw.randint(3, 256, (rows, length)).astype(np.int32)
  places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  weights = np.ones((rows, length - 1), np.float32)
  for row in range(rows):
    weights[row, : 3 * row] = 0
  return {
    'tokens': tokens,
    'positions': places,
    'segments': np.ones_like(tokens),
    'loss_at': places[:, :-1],
    'labels': tokens[:, 1:],
    'weights': weights,
  }


def plain_loss(model, params, batch):
  """All logits at once, differentiated by JAX."""
  logits = model.apply(
    {'params': params}, batch['tokens'], batch['positions'], batch['segments']
  )
  each = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], batch['labels']
  )
  return jnp.sum(each * batch['weights'])


def trained_parts(name):
  """(model, base, trained): what of the head is trained, and how."""
  model, params, _ = tiny.loaded(tied='tied' in name)
  if name.startswith('all'):
    return model, {}, params
  options = {'targets': r'.*/q/kernel', 'rank': 4}
  if name == 'head beside an adapter':
    options['trainable'] = HEAD
  elif name == 'embedding beside an adapter, tied':
    options['trainable'] = r'embed/embedding'
  elif name == 'qdora on the head':
    params = quantize(params, QuantSpec(targets=rf'.*/q/kernel|{HEAD}'))
    options['targets'] = rf'.*/q/kernel|{HEAD}'
  adapter = init_adapter(jax.random.key(0), params, AdapterSpec(**options))
  return model, params, tiny.perturbed(adapter)


CASES = (
  'all, tied',
  'all, own head',
  'adapter alone, tied',
  'adapter alone, own head',
  'head beside an adapter',
  'embedding beside an adapter, tied',
  'qdora on the head',
)


@pytest.mark.parametrize('name', CASES)
def test_value_and_gradients_are_the_plain_ones(name):
  model, base, trained = trained_parts(name)
  batch = batch_of()

  def of(f):
    return jax.jit(jax.value_and_grad(lambda t: f(model, attach(base, t))))

  def chunked(count):
    return lambda model, params: loss.summed_loss(model, params, batch, count)

  want, grads = of(lambda m, p: plain_loss(m, p, batch))(trained)
  # Seven tokens a row at once, which do not divide 31; and all of them.
  for size in (28, 124) if name in CASES[:2] else (28,):
    got, others = of(chunked(size))(trained)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(
      jax.tree.leaves(others), jax.tree.leaves(grads), strict=True
    ):
      assert tiny.relative(a, b) <= 1e-5


def test_the_gradient_is_scaled_like_the_loss():
  model, _, params = trained_parts('all, tied')
  batch = batch_of()
  once = jax.jit(jax.grad(lambda p: loss.summed_loss(model, p, batch, 20)))(
    params
  )
  half = jax.jit(
    jax.grad(lambda p: 0.5 * loss.summed_loss(model, p, batch, 20))
  )(params)
  for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(once), strict=True):
    np.testing.assert_allclose(a, 0.5 * b, rtol=1e-6, atol=1e-12)


def test_no_learned_token_is_no_loss():
  model, base, trained = trained_parts('adapter alone, tied')
  batch = batch_of() | {'weights': np.zeros((4, 31), np.float32)}
  value, grads = jax.jit(
    jax.value_and_grad(
      lambda t: loss.summed_loss(model, attach(base, t), batch)
    )
  )(trained)
  assert value == 0
  assert all((g == 0).all() for g in jax.tree.leaves(grads))


def largest_with_vocabulary(compiled, vocab):
  """Numbers in the largest float array of a program with an axis of V."""
  found = [1]
  for shape in re.findall(r'f32\[([\d,]+)\]', compiled.as_text()):
    sizes = [int(n) for n in shape.split(',')]
    if vocab in sizes:
      found.append(int(np.prod(sizes)))
  return max(found)


@pytest.mark.parametrize('tied', [True, False])
def test_logits_are_never_whole(tied):
  """From the compiled program: shapes, and bytes of temporaries."""
  small = tiny.loaded()[0]
  config = dataclasses.replace(small.config, vocab=4096, tied=tied)
  model, batch, chunk = Decoder(config), batch_of(16, 33), 64
  params = jax.eval_shape(model.init, jax.random.key(0), batch['tokens'])
  head = params['params'] | {'layers': {}}

  def compiled(f):
    def of_layers(layers, rest):
      return f(model, rest | {'layers': layers}, batch)

    step = jax.jit(jax.value_and_grad(of_layers))
    return step.lower(params['params']['layers'], head).compile()

  whole = compiled(plain_loss)
  parts = compiled(lambda *args: loss.summed_loss(*args, chunk))
  # The head itself has an axis of V, too.
  most = max(chunk, config.width) * config.vocab
  assert largest_with_vocabulary(whole, config.vocab) >= 16 * 32 * config.vocab
  assert largest_with_vocabulary(parts, config.vocab) <= most
  saved = (
    whole.memory_analysis().temp_size_in_bytes
    - parts.memory_analysis().temp_size_in_bytes
  )
  # The plain one holds logits, or their gradient, of all tokens.
  assert saved > 0.9 * 4 * (16 * 32 - chunk) * config.vocab


@pytest.mark.parametrize('tied', [True, False])
def test_a_head_in_sixteen_bits_is_multiplied_in_them(tied):
  """Both ways: its gradient's product would take it to float32 as a whole."""
  model, _, _ = tiny.loaded(tied=tied)
  config = dataclasses.replace(model.config, vocab=1111)
  model, batch = Decoder(config, jnp.bfloat16), batch_of(2, 16)
  made = jax.eval_shape(model.init, jax.random.key(0), batch['tokens'])
  params = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.bfloat16), made)
  params = params['params']
  adapter = init_adapter(jax.random.key(1), params, AdapterSpec('lora'))

  def total(adapter, params):
    return loss.summed_loss(model, attach(params, adapter), batch)

  text = jax.jit(jax.grad(total)).lower(adapter, params).as_text()
  products = re.findall(r'dot_general.* : \((.*)\)', text)
  heads = [operands for operands in products if '1111' in operands]
  assert len(heads) == 2 and 'f32' not in ''.join(heads)


def test_a_frozen_head_gets_no_gradient():
  """Neither computed nor carried: no scan gives an array of its size."""
  model, base, trained = trained_parts('adapter alone, own head')
  batch, vocab = batch_of(), model.config.vocab
  jaxpr = jax.make_jaxpr(
    jax.grad(lambda t: loss.summed_loss(model, attach(base, t), batch, 20))
  )(trained)
  given = [
    var.aval
    for eqn in jaxpr.eqns
    if eqn.primitive.name == 'scan'
    for var in eqn.outvars
  ]
  assert given and not any(vocab in a.shape for a in given)


@pytest.mark.parametrize(
  'name',
  [
    'all, tied',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in CASES
      if name != 'all, tied'
    ),
  ],
)
def test_eight_devices_are_one(name, monkeypatch):
  """In several chunks, of a device's own rows."""
  monkeypatch.setattr(loss, 'best_chunk', lambda backend: 8)
  model, base, trained = trained_parts(name)
  batch, mesh = batch_of(8), sharding.make_mesh(data=2, fsdp=2, tensor=2)

  def of(mesh):
    own = model.clone(mesh=mesh)

    def total(trained, base, batch):
      return loss.summed_loss(own, attach(base, trained), batch)

    return jax.jit(jax.value_and_grad(total))

  want, grads = of(None)(trained, base, batch)
  placed = (sharding.shard(tree, mesh) for tree in (trained, base))
  got, others = of(mesh)(*placed, sharding.shard_batch(batch, mesh))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(grads), strict=True):
    assert tiny.relative(a, b) <= 1e-5


@pytest.mark.slow
def test_dropout_of_the_head_differs_by_row_on_a_mesh_too():
  model, params, _ = tiny.loaded(tied=False)
  spec = AdapterSpec('lora', rank=4, targets=HEAD, dropout=0.5)
  adapter = tiny.perturbed(init_adapter(jax.random.key(0), params, spec))
  mesh = sharding.make_mesh(data=8)
  batch = {k: np.repeat(v[:1], 8, axis=0) for k, v in batch_of(1).items()}

  def each_row(model, adapter, params, batch):
    def of(adapter, row):
      mine = (np.arange(8) == row)[:, None] * batch['weights']
      tree = attach(params, adapter, dropout_key=jax.random.key(1))
      return loss.summed_loss(model, tree, batch | {'weights': mine}, 64)

    # Differentiated, as in training: the form that is looked at here.
    return [jax.value_and_grad(of)(adapter, row)[0] for row in (0, 5)]

  want = each_row(model, adapter, params, batch)
  placed = (sharding.shard(tree, mesh) for tree in (adapter, params))
  placed = (*placed, sharding.shard_batch(batch, mesh))
  own = model.clone(mesh=mesh)
  got = jax.jit(each_row, static_argnums=0)(own, *placed)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert abs(got[0] - got[1]) > 1e-3


@pytest.mark.parametrize('dropout', [0.0, 0.5])
def test_dropout_of_the_head_differs_by_chunk(dropout):
  """Of one token over and over, each chunk drops other entries."""
  model, params, _ = tiny.loaded(tied=False)
  spec = AdapterSpec('lora', rank=4, targets=HEAD, dropout=dropout)
  adapter = tiny.perturbed(init_adapter(jax.random.key(0), params, spec))
  head = attach(params, adapter, dropout_key=jax.random.key(1))['lm_head']
  token = jax.random.normal(jax.random.key(2), (model.config.width,))
  hidden = jnp.broadcast_to(token, (3, 2, 4, *token.shape))
  labels = jnp.full((3, 2, 4), 7)

  def of(hidden, weights):
    return loss._in_chunks(model, {'lm_head': head}, hidden, labels, weights)

  ones = jnp.ones((3, 2, 4))
  grads = np.asarray(jax.grad(of)(hidden, ones))
  # Of the value, too, undifferentiated and not.
  only = [ones * (np.arange(3) == n)[:, None, None] for n in range(3)]
  values = [float(of(hidden, weights)) for weights in only]
  same = [float(jax.value_and_grad(of)(hidden, w)[0]) for w in only]
  np.testing.assert_allclose(values, same, rtol=1e-5)
  if dropout:
    assert len(set(values)) == 3
    assert min(tiny.relative(grads[n], grads[n - 1]) for n in range(3)) > 0.01
  else:
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    np.testing.assert_allclose(grads, np.broadcast_to(grads[:1], grads.shape))


@pytest.mark.slow
def test_a_head_trained_in_sixteen_bits_on_a_mesh():
  """Sums over devices are float32: XLA's CPU ends the process over others."""
  model, _, params = trained_parts('all, tied')
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
  own = Decoder(model.config, jnp.bfloat16, mesh=mesh)
  batch = sharding.shard_batch(batch_of(8), mesh)
  f = jax.jit(jax.grad(lambda p, b: loss.summed_loss(own, p, b, 64)))
  grads = f(sharding.shard(half, mesh), batch)
  assert {a.dtype for a in jax.tree.leaves(grads)} == {jnp.dtype('bfloat16')}
  f = jax.jit(jax.grad(lambda p: loss.summed_loss(model, p, batch_of(8), 64)))
  found = grads['embed']['embedding'].astype(jnp.float32)
  assert tiny.relative(found, f(params)['embed']['embedding']) < 0.05
