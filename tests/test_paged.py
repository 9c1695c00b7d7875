"""Optimizer state in the host's memory: the same updates, bit for bit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.extend.core import Literal
from test_optim import trained_tree
from test_train import ONE, parts, sums
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  finetune,
  init_adapter,
  optim,
  paged,
  run,
  sharding,
  streaming,
  train,
)
from qdora_jax.checkpoint import Checkpoints


def kinds(tree):
  """Where a tree's arrays lie; numbers stay on the device."""
  leaves = jax.tree.leaves(tree)
  assert all(a.sharding.memory_kind == 'device' for a in leaves if not a.ndim)
  return {a.sharding.memory_kind for a in leaves if a.ndim}


def drawn(tree, seed):
  draw = np.random.RandomState(seed)
  return jax.tree.map(
    lambda a: jnp.asarray(draw.standard_normal(a.shape), jnp.float32), tree
  )


def large_tree():
  """A stack of four layers and a head, large enough for 8-bit moments."""
  return {
    'layers': {
      'q': {'kernel': jnp.ones((4, 64, 256)), 'bias': jnp.ones((4, 256))},
      'down': {'kernel': jnp.ones((4, 96, 72))},
    },
    'lm_head': {'kernel': jnp.ones((48, 104))},
  }


def updates(optimizer, tree, mode, mesh=None, steps=4, room=None):
  """(tree, state) after some updates, the third of them not finite."""
  tree = drawn(tree, 0)
  start = train.initial_state(tree, optimizer, 0, mesh, mode, room)
  trained, state = start['trained'], start['optimizer']
  before = kinds(state)
  shards = [a.sharding for a in jax.tree.leaves((trained, state))]
  step = jax.jit(
    lambda *args: paged.move(optimizer, *args, shards),
    donate_argnums=(0, 2),
    out_shardings=None
    if mesh is None and mode == 'none'
    else jax.tree.map(lambda a: a.sharding, (trained, state)),
  )
  for n in range(steps):
    grads = drawn(tree, n + 1)
    if mesh is not None:
      grads = sharding.shard(grads, mesh)
    trained, state = step(
      trained, grads, state, jnp.bool_(n != 2), jnp.float32(n)
    )
    assert kinds(state) == before
  assert step._cache_size() == 1
  return trained, state


OPTIMIZERS = ('adamw', 'adamw8bit', 'lion', 'adafactor')
SLOW = ('adam', 'muon', 'rmsprop', 'lamb', 'adagrad', 'adan', 'prodigy')


@pytest.mark.parametrize('piece', [2**29, 2**8], ids=['whole', 'cut'])
@pytest.mark.parametrize(
  'name',
  [*OPTIMIZERS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_updates_are_the_same(name, piece, monkeypatch):
  """With masks, rates by name and layer, a norm that is clipped."""
  monkeypatch.setattr(streaming, 'PIECE', piece)
  tree = large_tree() if name == 'adamw8bit' else trained_tree()
  rules = {'.*/(lora_b|down/kernel)': 2.0, '.*/lora_a': 0.0}
  if name == 'adamw8bit':
    rules = {'.*/down/kernel': 0.5, '.*/bias': 0.0}
  optimizer = optim.make_optimizer(
    1e-2,
    name,
    weight_decay=0.1 * name.startswith(('adamw', 'lion')),
    clip=1.0,
    lr_scale=rules,
  )
  want = updates(optimizer, tree, 'none')
  got = updates(optimizer, tree, 'host')
  assert kinds(want[1]) == {'device'}
  assert kinds(got[1]) == {'pinned_host'}
  got, want = (jax.tree.map(np.asarray, tree) for tree in (got, want))
  if name != 'muon':
    tiny.assert_same(got, want)
    return
  # Its products of matrices are not always the same to the last bit on CPU.
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_rates_by_layer_in_pieces(monkeypatch):
  """Cut, the last bit may differ: how XLA rounds a product by such a rate."""
  optimizer = optim.make_optimizer(1e-2, lr_scale={'layers/1/.*': 0.5})
  want = updates(optimizer, large_tree(), 'none')
  got = updates(optimizer, large_tree(), 'host')
  tiny.assert_same(*(jax.tree.map(np.asarray, tree) for tree in (got, want)))
  monkeypatch.setattr(streaming, 'PIECE', 2**8)
  got = updates(optimizer, large_tree(), 'host')
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize('name', ['adamw', 'adamw8bit'])
@pytest.mark.parametrize('piece', [2**29, 2**10], ids=['whole', 'cut'])
def test_updates_are_the_same_on_a_mesh(name, piece, monkeypatch):
  monkeypatch.setattr(streaming, 'PIECE', piece)
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  optimizer = optim.make_optimizer(1e-2, name, weight_decay=0.1, clip=1.0)
  want = updates(optimizer, large_tree(), 'none', mesh)
  got = updates(optimizer, large_tree(), 'host', mesh)
  assert kinds(got[1]) == {'pinned_host'}
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    # Each device holds its shard, and no more of it.
    assert a.sharding.spec == b.sharding.spec
  tiny.assert_same(*(jax.tree.map(np.asarray, tree) for tree in (got, want)))


def to_device(jaxpr, inside=()):
  """(bytes, the loops it is in) of each copy to the device, in order."""
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == 'device_put':
      for var, to in zip(eqn.invars, eqn.params['devices'], strict=True):
        if to == jax.memory.Space.Device:
          yield var.aval.size * var.aval.dtype.itemsize, inside
    for value in eqn.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          loop = (id(eqn),) if name in ('while', 'scan') else ()
          yield from to_device(inner, (*inside, *loop))


def streamed(optimizer, tree):
  """The jaxpr of an update with all state in the host's memory."""
  state = paged.initial(optimizer, tree, None, 'host')
  shards = [a.sharding for a in jax.tree.leaves((tree, state))]
  return jax.make_jaxpr(lambda *args: paged.move(optimizer, *args, shards))(
    tree, tree, state, jnp.bool_(True), jnp.float32(0)
  ).jaxpr


@pytest.mark.parametrize(
  'name, piece', [('adamw', 2**17), ('adamw8bit', 2**16)]
)
def test_no_piece_is_larger_than_it_may_be(name, piece, monkeypatch):
  """What crosses at once is some rows of one leaf's moments."""
  monkeypatch.setattr(streaming, 'PIECE', piece)
  optimizer = optim.make_optimizer(1e-2, name, clip=1.0)
  tree = large_tree()
  found = list(to_device(streamed(optimizer, tree)))
  state = jax.eval_shape(optimizer.init, tree)
  whole = sum(
    a.size * a.dtype.itemsize for a in jax.tree.leaves(state) if a.ndim
  )
  assert whole > 3 * piece
  pieces = {}
  for n, (size, loops) in enumerate(found):
    at = ('loop', *loops) if loops else n
    pieces[at] = pieces[at] + size if at in pieces else size
  assert max(pieces.values()) <= piece
  loops = [size for at, size in pieces.items() if at not in range(n + 1)]
  assert loops
  # Outside of loops, the small arrays.
  assert sum(size for size, inside in found if not inside) < whole / 2


def variables(eqn):
  return {v for v in eqn.invars if not isinstance(v, Literal)}


def test_pieces_come_one_after_the_other():
  """Each piece's state is tied to results of the one before."""
  tree = trained_tree()
  jaxpr = streamed(optim.make_optimizer(1e-2), tree)
  barriers = [
    e for e in jaxpr.eqns if e.primitive.name == 'optimization_barrier'
  ]
  assert len(barriers) == len(jax.tree.leaves(tree))
  for one, two in itertools.pairwise(barriers):
    # What the second waits for was made of what the first let through.
    made = set(one.outvars)
    for eqn in jaxpr.eqns:
      if eqn is not two and made & variables(eqn):
        made |= set(eqn.outvars)
    assert made & variables(two)


def test_an_update_that_needs_all_state_is_one_piece():
  """Handled whole: the bound on a piece does not hold, its result does."""

  def update(grads, state, params=None, **_):
    norm = optax.tree.norm(state)
    new = jax.tree.map(lambda g, m: 0.9 * m + g / (1 + norm), grads, state)
    return jax.tree.map(lambda m: -0.1 * m, new), new

  coupled = optax.GradientTransformationExtraArgs(optax.tree.zeros_like, update)
  want = updates(coupled, trained_tree(), 'none')
  got = updates(coupled, trained_tree(), 'host')
  assert kinds(got[1]) == {'pinned_host'}
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('mesh', [None, 8])
def test_auto_pages_the_largest_until_the_rest_fits(mesh):
  mesh = mesh and sharding.make_mesh(fsdp=mesh)
  optimizer = optim.make_optimizer(1e-2)
  tree = large_tree()

  def at(room):
    state = train.initial_state(tree, optimizer, 0, mesh, 'auto', room)
    leaves = jax.tree.leaves(state['optimizer'])
    size = {
      kind: sum(
        a.addressable_shards[0].data.nbytes
        for a in leaves
        if a.sharding.memory_kind == kind
      )
      for kind in ('device', 'pinned_host')
    }
    paged_ = [a.size for a in leaves if kinds([a]) == {'pinned_host'}]
    return size, paged_

  whole, none = at(None)
  assert not none and whole['pinned_host'] == 0
  assert at(whole['device'])[1] == []
  size, moved = at(whole['device'] - 1)
  assert moved == [4 * 64 * 256] and size['device'] < whole['device']
  size, moved = at(size['device'] - 1)
  assert moved == 2 * [4 * 64 * 256]
  size, moved = at(0)
  assert len(moved) == 8 and size['device'] == 4
  want = updates(optimizer, tree, 'none', mesh)
  got = updates(optimizer, tree, 'auto', mesh, room=whole['device'] // 2)
  tiny.assert_same(*(jax.tree.map(np.asarray, tree) for tree in (got, want)))


def test_it_is_made_where_it_lies(monkeypatch):
  """No program makes what is constant, on no device."""
  optimizer = optim.make_optimizer(1e-2)
  tree = large_tree()
  want = optimizer.init(tree)
  monkeypatch.setattr(jax, 'jit', None)
  got = paged.initial(optimizer, tree, sharding.make_mesh(), 'host')
  assert kinds(got) == {'pinned_host'}
  tiny.assert_same(*(jax.tree.map(np.asarray, t) for t in (got, want)))


@pytest.mark.parametrize('devices', [8, 1])
def test_checkpoints_are_read_into_the_hosts_memory(tmp_path, devices):
  mesh = sharding.make_mesh(fsdp=8) if devices == 8 else None
  optimizer = optim.make_optimizer(1e-2, 'adamw8bit')
  trained, state = updates(optimizer, large_tree(), 'host', mesh, 2)
  want = jax.tree.map(np.array, (trained, state))
  first = Checkpoints(tmp_path)
  first.save(2, (trained, state), {})
  # What is saved may be donated at once.
  jax.jit(lambda t: jax.tree.map(jnp.zeros_like, t), donate_argnums=0)(state)
  first.close()
  fresh = train.initial_state(large_tree(), optimizer, 0, mesh, 'host')
  second = Checkpoints(tmp_path)
  got = second.restore((fresh['trained'], fresh['optimizer']), {}).state
  second.close()
  assert kinds(got[1]) == {'pinned_host'}
  pair = (got, (trained, state))
  for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
    assert a.sharding == b.sharding
  tiny.assert_same(jax.tree.map(np.asarray, got), want)


def fitted(quant, method, mesh, steps, workdir=None, **options):
  """What `fit` gives, with weight decay and a norm that is clipped."""
  model, base, trained = parts(quant, method)
  if method != 'none':
    # One kernel keeps compiling short.
    spec = AdapterSpec(method, 4, 8.0, targets=ONE)
    trained = init_adapter(jax.random.key(0), base, spec)
  if mesh is not None:
    base = sharding.shard(base, mesh)
  return train.fit(
    *(model, base, trained, sums(batch_size=8)),
    steps=steps,
    lr=1e-2,
    optimizer=functools.partial(
      optim.make_optimizer, weight_decay=0.1, clip=0.5
    ),
    mesh=mesh,
    workdir=workdir,
    save_every=2,
    **options,
  )


@pytest.fixture
def states(monkeypatch):
  """Where the state lies that each step is given and makes."""
  seen = []
  make = train.make_step

  def spy(*args):
    step = make(*args)

    def watched(trained, state, *rest):
      seen.append(kinds(state))
      trained, state, found = step(trained, state, *rest)
      seen.append(kinds(state))
      assert step._cache_size() == 1
      return trained, state, found

    return watched

  monkeypatch.setattr(train, 'make_step', spy)
  return seen


@pytest.mark.parametrize(
  'quant, method, devices',
  [
    pytest.param('nf4', 'dora', 8, marks=pytest.mark.slow),
    pytest.param('none', 'none', 8, marks=tiny.AGAIN),
    pytest.param('nf4', 'lora', 8, marks=tiny.AGAIN),
    pytest.param('nf4', 'dora', 1, marks=pytest.mark.slow),
  ],
)
def test_training_is_the_same_also_resumed(
  quant, method, devices, states, tmp_path
):
  mesh = sharding.make_mesh(fsdp=8) if devices == 8 else None
  want = fitted(quant, method, mesh, 4)
  assert states == 8 * [{'device'}]
  states.clear()
  first = fitted(quant, method, mesh, 2, tmp_path, paged='host')
  second = fitted(quant, method, mesh, 4, tmp_path, paged='host')
  assert states == 8 * [{'pinned_host'}]
  tiny.assert_same(second.trained, want.trained)
  for got, row in zip([*first.rows, *second.rows], want.rows, strict=True):
    for key in ('step', 'loss', 'grad_norm'):
      assert got[key] == row[key]


@pytest.mark.slow
def test_a_config_can_ask_for_it(tmp_path, monkeypatch, states):
  """From the command line's config to files, stopped and gone on with, read."""
  tiny.use_sums(monkeypatch)
  model = tiny.write(tmp_path / 'model')
  one = {'adapter.targets': '.*/q/kernel', 'quant.targets': '.*/q/kernel'}
  results = []
  for paged_ in ('none', 'host'):
    config = tiny.run_config(
      model,
      **one,
      **{
        'optim.paged': paged_,
        'optim.name': 'adamw8bit',
        'eval.exact_match': False,
        'train.steps': 4,
        'train.save_every': 2,
        'mesh.fsdp': 8,
      },
    )
    finetune.fine_tune(config, tmp_path / paged_)
    kept = run.load_run(tmp_path / paged_).trained
    assert kinds(kept) == {'device'}
    results.append(jax.tree.map(np.asarray, kept))
  assert states == 8 * [{'device'}] + 8 * [{'pinned_host'}]
  tiny.assert_same(*results)
  adapters = [
    (tmp_path / name / 'adapter' / 'adapter_model.safetensors').read_bytes()
    for name in ('none', 'host')
  ]
  assert adapters[0] == adapters[1]


def test_what_paged_is_not_is_refused():
  with pytest.raises(ValueError, match=r"optim.paged='gpu': expected one of"):
    tiny.run_config('none', **{'optim.paged': 'gpu'})
