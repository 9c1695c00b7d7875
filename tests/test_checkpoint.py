"""What is trained survives, bit for bit; another base's is refused."""

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from qdora_jax import AdapterSpec, init_adapter
from qdora_jax.checkpoint import Checkpoints


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


@pytest.mark.parametrize('to', ['arrays', 'shapes'])
def test_a_round_trip_is_exact(state, tmp_path, to):
  first = Checkpoints(tmp_path)
  first.save(7, state, 'base')
  first.close()
  # As another process would.
  second = Checkpoints(tmp_path)
  assert second.latest() == 7
  like = (
    abstract(state) if to == 'shapes' else jax.tree.map(jnp.ones_like, state)
  )
  got = second.restore(like, 'base')
  second.close()
  tiny.assert_same(got, state)


def test_the_newest_is_restored_and_old_ones_are_deleted(state, tmp_path):
  adapter, _ = state
  made = Checkpoints(tmp_path, keep=2)
  for n in range(1, 4):
    made.save(n, jax.tree.map(lambda a, n=n: a * n, adapter), 'base')
  made.close()
  made = Checkpoints(tmp_path, keep=2)
  for step, n in ((None, 3), (2, 2)):
    got = made.restore(adapter, 'base', step)
    tiny.assert_same(got, jax.tree.map(lambda a, n=n: a * n, adapter))
  made.close()
  kept = {p.name for p in tmp_path.iterdir() if p.is_dir()}
  assert kept == {'2', '3'}


def test_what_is_saved_may_be_donated_at_once(state, checkpoints):
  """Writing goes on behind while the next step consumes its input."""
  adapter, _ = state
  want = jax.tree.map(lambda a: jnp.array(a, copy=True), adapter)
  checkpoints.save(1, adapter, 'base')
  jax.jit(lambda t: jax.tree.map(jnp.zeros_like, t), donate_argnums=0)(adapter)
  checkpoints._manager.wait_until_finished()
  tiny.assert_same(checkpoints.restore(want, 'base'), want)


def test_another_bases_checkpoint_is_refused(state, checkpoints):
  adapter, _ = state
  checkpoints.save(1, adapter, 'llama nf4')
  checkpoints._manager.wait_until_finished()
  words = 'belongs to another base: llama nf4, here smollm None'
  with pytest.raises(ValueError, match=words):
    checkpoints.restore(adapter, 'smollm None')


def test_no_checkpoint_says_where(checkpoints, tmp_path):
  assert checkpoints.latest() is None
  words = f'no checkpoint in {tmp_path}/checkpoints; train first'
  with pytest.raises(FileNotFoundError, match=words):
    checkpoints.restore({'a': jnp.ones(2)}, 'base')
