"""What is trained survives, bit for bit; another base's is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import AdapterSpec, QuantSpec, init_adapter, quantize
from qdora_jax.checkpoint import Checkpoints
from qdora_jax.sharding import make_mesh, shardings
from qdora_jax.train import initial_state


@pytest.fixture
def state():
  _, base, _ = tiny.loaded()
  spec = AdapterSpec('dora', 4, targets=r'.*/(q|down)/kernel')
  adapter = tiny.perturbed(init_adapter(jax.random.key(0), base, spec))
  optimizer = optax.adamw(1e-3)
  grads = jax.tree.map(jnp.sin, adapter)
  _, moments = optimizer.update(grads, optimizer.init(adapter), adapter)
  return adapter, moments


@pytest.fixture
def checkpoints(tmp_path):
  made = Checkpoints(tmp_path / 'checkpoints')
  yield made
  made.close()


def abstract(state):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)


BASE = {'base': 'llama nf4'}


def wait(checkpoints):
  checkpoints._manager.wait_until_finished()


@pytest.mark.parametrize('method', ['none', 'lora', 'dora', 'magnitude'])
def test_every_trained_tree_survives(tmp_path, method):
  _, base, _ = tiny.loaded()
  tree = base
  if method != 'none':
    spec = AdapterSpec(
      method, 4, targets='.*/q/kernel', trainable='.*norm/scale'
    )
    tree = init_adapter(jax.random.key(0), base, spec)
  first = Checkpoints(tmp_path)
  first.save(1, tree, BASE)
  first.close()
  second = Checkpoints(tmp_path)
  tiny.assert_same(second.restore(abstract(tree), BASE).state, tree)
  second.close()


@pytest.mark.parametrize('double', [False, True])
def test_a_four_bit_base_survives_in_four_bits(tmp_path, double):
  base = quantize(tiny.loaded()[1], QuantSpec(double_quant=double))
  first = Checkpoints(tmp_path)
  first.save(1, base, BASE)
  first.close()
  second = Checkpoints(tmp_path)
  got = second.restore(abstract(base), BASE).state
  second.close()
  tiny.assert_same(got, base)
  assert got['layers']['attn']['q']['kernel'].codes.dtype == jnp.uint8


@pytest.mark.parametrize('to', ['arrays', 'shapes'])
def test_a_round_trip_is_exact(state, tmp_path, to):
  first = Checkpoints(tmp_path)
  first.save(7, state, BASE | {'data': {'next_index': 3}})
  first.close()
  # As another process would.
  second = Checkpoints(tmp_path)
  assert second.latest() == 7
  like = (
    abstract(state) if to == 'shapes' else jax.tree.map(jnp.ones_like, state)
  )
  got = second.restore(like, BASE)
  second.close()
  tiny.assert_same(got.state, state)
  assert (got.step, got.meta['data']) == (7, {'next_index': 3})


def test_the_newest_is_restored_and_old_ones_are_deleted(state, tmp_path):
  adapter, _ = state
  made = Checkpoints(tmp_path, keep_last=2)
  for n in range(1, 4):
    made.save(n, jax.tree.map(lambda a, n=n: a * n, adapter), BASE)
  made.close()
  made = Checkpoints(tmp_path, keep_last=2)
  step, got, _ = made.restore(adapter, BASE)
  made.close()
  assert step == 3
  tiny.assert_same(got, jax.tree.map(lambda a: a * 3, adapter))
  kept = {p.name for p in tmp_path.iterdir() if p.is_dir()}
  assert kept == {'2', '3'}


def test_what_is_saved_may_be_donated_at_once(state, checkpoints):
  """Writing goes on behind while the next step consumes its input."""
  adapter, _ = state
  want = jax.tree.map(lambda a: jnp.array(a, copy=True), adapter)
  checkpoints.save(1, adapter, BASE)
  jax.jit(lambda t: jax.tree.map(jnp.zeros_like, t), donate_argnums=0)(adapter)
  wait(checkpoints)
  tiny.assert_same(checkpoints.restore(want, BASE).state, want)


def test_another_bases_checkpoint_is_refused(state, checkpoints):
  adapter, _ = state
  checkpoints.save(1, adapter, BASE)
  wait(checkpoints)
  words = 'checkpoints/1 belongs to another base: llama nf4, here smollm None'
  with pytest.raises(ValueError, match=words):
    checkpoints.restore(adapter, {'base': 'smollm None'})


def test_another_ranks_checkpoint_is_refused(state, checkpoints):
  adapter, _ = state
  checkpoints.save(1, adapter, BASE)
  wait(checkpoints)
  spec = AdapterSpec('dora', 8, targets=r'.*/(q|down)/kernel')
  other = init_adapter(jax.random.key(0), tiny.loaded()[1], spec)
  words = r'another model or rank: .*lora_a is \(3, 64, 4\), here \(3, 64, 8\)'
  with pytest.raises(ValueError, match=words):
    checkpoints.restore(other, BASE)


def test_no_checkpoint_says_where(checkpoints, tmp_path):
  assert checkpoints.latest() is None
  words = f'no checkpoint in {tmp_path}/checkpoints; train first'
  with pytest.raises(FileNotFoundError, match=words):
    checkpoints.restore({'a': jnp.ones(2)}, BASE)


def moved(mesh, method):
  """What training holds on a mesh; full fine-tuning, or DoRA over NF4."""
  _, base, _ = tiny.loaded()
  trained, optimizer = base, optax.adamw(1e-3)
  if method == 'dora':
    spec = AdapterSpec('dora', 8, targets=r'.*/(q|down)/kernel')
    base = quantize(base, QuantSpec(spec.targets))
    trained = tiny.perturbed(init_adapter(jax.random.key(0), base, spec))
  state = initial_state(trained, optimizer, 0, mesh)
  grads = jax.tree.map(jnp.sin, state['trained'])
  _, moments = jax.jit(optimizer.update)(
    grads, state['optimizer'], state['trained']
  )
  placed = jax.tree.map(lambda a: a.sharding, state['optimizer'])
  state['optimizer'] = jax.device_put(moments, placed)
  return state


@pytest.fixture(
  scope='module', params=[pytest.param('none', marks=pytest.mark.slow), 'dora']
)
def on_eight(request, tmp_path_factory):
  """(what was saved on eight devices, where)."""
  where = tmp_path_factory.mktemp('eight')
  state = moved(make_mesh(data=2, fsdp=4), request.param)
  checkpoints = Checkpoints(where)
  checkpoints.save(5, state, BASE)
  checkpoints.close()
  return jax.tree.map(np.asarray, state), where


@pytest.mark.parametrize('sizes', [(1, 1, 1), (1, 2, 1), (1, 2, 2), (1, 8, 1)])
def test_what_eight_devices_saved_is_restored_on_others(on_eight, sizes):
  """Bit for bit, each array in parts of its own; and on them saved again."""
  want, where = on_eight
  mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  like = jax.tree.map(
    lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
    want,
    shardings(want, mesh),
  )
  checkpoints = Checkpoints(where)
  got = checkpoints.restore(like, BASE).state
  checkpoints.close()
  tiny.assert_same(got, want)
  placed = jax.tree.map(lambda a, b: a.sharding == b.sharding, got, like)
  assert all(jax.tree.leaves(placed))
  if mesh.size > 1:
    for part in ('trained', 'optimizer'):
      shapes = [
        (a.addressable_shards[0].data.size, a.size)
        for a in jax.tree.leaves(got[part])
      ]
      assert any(piece < size for piece, size in shapes)


def test_the_best_are_kept_beside_the_last(tmp_path):
  """Kept by loss, across processes; 'best' is the lowest, of two the older."""
  losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 1.0, 6: 4.0, 7: None}
  for step, loss in losses.items():
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=2)
    tree = {'a': jnp.full(3, step)}
    checkpoints.save(step, tree, BASE | {'held_out_loss': loss})
    checkpoints.close()
  kept = {p.name for p in tmp_path.iterdir() if p.is_dir()}
  assert kept == {'2', '5', '6', '7'}
  checkpoints = Checkpoints(tmp_path)
  like = {'a': jnp.zeros(3, int)}
  for which, step in (('best', 2), ('last', 7), (6, 6)):
    got = checkpoints.restore(like, BASE, which=which)
    assert got.step == step
    np.testing.assert_array_equal(got.state['a'], step)
  words = r'no checkpoint of step 4 in .*; there are steps 7, 6, 5, 2'
  with pytest.raises(FileNotFoundError, match=words):
    checkpoints.restore(like, BASE, which=4)
  checkpoints.close()


def test_a_damaged_best_gives_way_to_the_next(tmp_path, capsys):
  checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=2)
  for step, loss in enumerate((2.0, 1.0, 3.0), 1):
    tree = {'a': jnp.full(3, step)}
    checkpoints.save(step, tree, BASE | {'held_out_loss': loss})
  checkpoints.close()
  (tmp_path / '2' / 'state' / 'manifest.ocdbt').write_bytes(b'')
  checkpoints = Checkpoints(tmp_path)
  like = {'a': jnp.zeros(3, int)}
  assert checkpoints.restore(like, BASE, which='best').step == 1
  checkpoints.close()
  assert f'{tmp_path}/2 is damaged' in capsys.readouterr().out


def test_without_held_out_losses_there_is_no_best(checkpoints):
  checkpoints.save(1, {'a': jnp.ones(2)}, BASE)
  wait(checkpoints)
  words = 'has a held-out loss .*steps 1.*config.train.keep_best'
  with pytest.raises(FileNotFoundError, match=words):
    checkpoints.restore({'a': jnp.ones(2)}, BASE, which='best')
