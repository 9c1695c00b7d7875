"""Eight devices: the same numbers, and every part where its kernel is.

What travels between them: test_traffic.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  init_adapter,
  load_pretrained,
  loss,
  norms,
  quantize,
  rope,
)
from qdora_jax.model import Decoder, LayerKind, ModelConfig
from qdora_jax.sharding import make_mesh, shard, shard_batch, shardings

CONFIG = ModelConfig(
  vocab=128,
  width=128,
  ff=256,
  layers=2,
  heads=8,
  kv_heads=4,
  head_dim=16,
  kinds=(LayerKind(rope.plain(1e4, 16)),) * 2,
  tied=False,
)
TOKENS = np.random.RandomState(0).randint(0, 128, (8, 16)).astype(np.int32)
METHODS = {
  'full': (None, None),
  'lora': (None, 'lora'),
  'dora': (None, 'dora'),
  'qlora': (16, 'lora'),
  'qdora': (16, 'dora'),
}
# All ways to make three axes of eight devices.
SIZES = [
  (data, fsdp, 8 // data // fsdp)
  for data in (1, 2, 4, 8)
  for fsdp in (1, 2, 4, 8)
  if data * fsdp <= 8
]


@functools.cache
def setup(method: str):
  """(trained, base, norms) of a method; blocks of 16 divide over 8 devices.

  Nothing takes these arrays away: no test donates them.
  """
  block, adapter = METHODS[method]
  init = jax.jit(Decoder(CONFIG).init)
  params = init(jax.random.key(0), TOKENS)['params']
  base = (
    params if block is None else quantize(params, QuantSpec(block_size=block))
  )
  if adapter is None:
    return params, {}, {}
  trained = init_adapter(jax.random.key(1), base, AdapterSpec(adapter, rank=8))
  trained = tiny.perturbed(trained)
  return trained, base, norms(base, trained)


def batch_of():
  """Rows that are learned from their first token on, or from a later one."""
  places = np.tile(np.arange(16, dtype=np.int32), (8, 1))
  return {
    'tokens': TOKENS,
    'positions': places,
    'segments': np.ones_like(TOKENS),
    'loss_at': places[:, :-1],
    'labels': TOKENS[:, 1:],
    'weights': (places[:, :-1] >= np.arange(8)[:, None]).astype(np.float32),
  }


def gradient(mesh=None):
  model = Decoder(CONFIG, mesh=mesh)

  def mean(trained, base, fixed, batch):
    params = attach(base, trained, norms=fixed)
    return loss.summed_loss(model, params, batch) / jnp.sum(batch['weights'])

  return jax.value_and_grad(mean)


@functools.cache
def on_one_device(method):
  return jax.jit(gradient())(*setup(method), batch_of())


# All axes at once; each by itself, and others, are slow.
QUICK = {('qdora', (2, 2, 2))}
ALONE = {('full', (1, 8, 1)), ('lora', (1, 1, 8))}
# Every mesh with two methods, and every method on four meshes.
PAIRS = {
  (method, sizes)
  for m, method in enumerate(METHODS)
  for s, sizes in enumerate(SIZES)
  if (m + s) % len(METHODS) < 2
}


def marks_of(method, sizes):
  if (method, sizes) in QUICK:
    return ()
  if (method, sizes) in ALONE:
    return pytest.mark.slow
  if sizes in {sizes for _, sizes in QUICK | ALONE}:
    return tiny.AGAIN
  # Of each mesh's two methods one.
  first = list(METHODS).index(method) + SIZES.index(sizes)
  return tiny.AGAIN if first % len(METHODS) else pytest.mark.slow


@pytest.mark.parametrize(
  ('method', 'sizes'),
  [
    pytest.param(m, s, marks=marks_of(m, s))
    for m, s in sorted(PAIRS | QUICK | ALONE)
  ],
)
def test_sharded_equals_single_device(method, sizes):
  mesh = make_mesh(*sizes)
  trees = setup(method)
  laid_out = shardings(trees[0], mesh)
  f = jax.jit(gradient(mesh), out_shardings=(None, laid_out))
  placed = [shard(tree, mesh) for tree in trees]
  value, grads = f(*placed, shard_batch(batch_of(), mesh))
  one, ones = on_one_device(method)
  assert value == pytest.approx(float(one), rel=1e-5)
  split = 0
  for got, want, where in zip(
    *map(jax.tree.leaves, (grads, ones, laid_out)), strict=True
  ):
    assert tiny.relative(got, want) <= 1e-5
    assert got.sharding.is_equivalent_to(where, got.ndim)
    split += not where.is_fully_replicated
  assert split or sizes == (8, 1, 1)


@pytest.mark.slow
def test_a_packed_head_and_its_adapter(monkeypatch):
  """Of which every device sums up, over chunks, what its own rows give."""
  monkeypatch.setattr(loss, 'best_chunk', lambda backend: 8)
  targets = r'.*/(q|v)/kernel|lm_head/kernel'
  base = quantize(setup('full')[0], QuantSpec(targets, block_size=16))
  spec = AdapterSpec('dora', rank=4, targets=targets)
  trained = tiny.perturbed(init_adapter(jax.random.key(1), base, spec))
  trees = trained, base, norms(base, trained)
  want, ones = jax.jit(gradient())(*trees, batch_of())
  mesh = make_mesh(2, 2, 2)
  placed = [shard(tree, mesh) for tree in trees]
  got, grads = jax.jit(gradient(mesh))(*placed, shard_batch(batch_of(), mesh))
  assert got == pytest.approx(float(want), rel=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(ones), strict=True):
    assert tiny.relative(a, b) <= 1e-5


def test_packed_leaves_follow_their_kernel():
  mesh = make_mesh(fsdp=4, tensor=2)
  trained, base, fixed = setup('qdora')
  base = shard(base, mesh)
  up = base['layers']['mlp']['up']['kernel']
  down = base['layers']['mlp']['down']['kernel']
  assert up.codes.sharding.spec == up.absmax.sharding.spec
  assert up.codes.sharding.spec == P(None, 'fsdp', 'tensor')
  assert down.codes.sharding.spec == P(None, 'tensor', 'fsdp')
  assert up.nested.sharding.is_fully_replicated
  assert up.gathered.spec == P(None, 'tensor')
  assert down.gathered.spec == P('tensor', None)
  laid = shardings(trained, mesh)['layers']['mlp']['up']['kernel']
  assert laid.lora_a.spec == P(None, 'fsdp', None)
  assert laid.lora_b.spec == P(None, None, 'tensor')
  assert laid.magnitude.spec == P(None, 'tensor')
  where = shardings(fixed, mesh)['layers']['mlp']['up']['kernel']
  assert where['squared_norm'].spec == P(None, 'tensor')
  state = jax.eval_shape(optax.adamw(1e-3).init, trained)
  mu = shardings(state, mesh)[0].mu['layers']['mlp']['up']['kernel']
  assert mu.lora_a.spec == P(None, 'fsdp', None)


def test_whole_blocks_or_not_at_all():
  """576 = 9 blocks: codes would split over 8 devices, absmax would not."""
  base = quantize(
    {'layers': {'attn': {'q': {'kernel': jnp.ones((2, 576, 64))}}}}, QuantSpec()
  )
  q = shard(base, make_mesh(fsdp=8))['layers']['attn']['q']['kernel']
  assert q.codes.sharding.is_fully_replicated
  assert q.absmax.sharding.is_fully_replicated


def test_what_is_together_is_not_gathered():
  """Over one device nothing is; over one of `tensor` no axis stays split."""
  base = quantize(
    {'layers': {'attn': {'o': {'kernel': jnp.ones((2, 512, 64))}}}}, QuantSpec()
  )

  def where(**sizes):
    mesh = make_mesh(
      **sizes, devices=jax.devices()[: math.prod(sizes.values())]
    )
    gathered = shard(base, mesh)['layers']['attn']['o']['kernel'].gathered
    return gathered and tuple(gathered.spec)

  assert where(fsdp=1) is None
  assert where(fsdp=8) == (None, None)
  assert where(fsdp=4, tensor=2) == ('tensor', None)


@pytest.mark.slow
def test_a_checkpoint_is_loaded_onto_the_mesh(tmp_path):
  folder = tiny.write_model(tmp_path)
  _, base, _, adapter = load_pretrained(folder, QuantSpec(), AdapterSpec())
  mesh = make_mesh(data=4, tensor=2)
  model, base8, _, adapter8 = load_pretrained(
    folder, QuantSpec(), AdapterSpec(), mesh=mesh
  )
  up = base8['layers']['mlp']['up']['kernel']
  assert up.codes.sharding.spec == P(None, 'fsdp', 'tensor')
  magnitude = adapter8['layers']['mlp']['up']['kernel'].magnitude
  assert magnitude.sharding.spec == P(None, 'tensor')
  for one, many in ((base, base8), (adapter, adapter8)):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)

  @jax.jit
  def logits(base, adapter):
    return model.apply({'params': attach(base, adapter)}, TOKENS)

  np.testing.assert_allclose(
    logits(base, adapter), logits(base8, adapter8), atol=1e-4
  )


def test_wrong_meshes_are_refused():
  with pytest.raises(ValueError, match='data=3, fsdp=1, tensor=1'):
    make_mesh(3, 1, 1)
  with pytest.raises(ValueError, match='at most one may be -1'):
    make_mesh(-1, -1, 1)
