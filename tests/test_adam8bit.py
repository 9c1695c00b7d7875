"""AdamW in 8 bits beside bitsandbytes' (golden file made by golden/make.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import cases

from qdora_jax import adam8bit, nf4, optim, paths, sharding

ARRAYS = np.load(cases.HERE / 'adam8bit.npz')
NAMES = pytest.mark.parametrize('name', cases.ADAM8)


def ours(name, key='kernel', stack=False):
  """(parameter, mu, nu) after the golden file's steps."""
  start, grads = cases.adam8(name)
  options = dict(cases.ADAM8_OPTIONS)
  optimizer = optim.make_optimizer(options.pop('lr'), 'adamw8bit', **options)
  if stack:
    start, grads = start[None], grads[:, None]
  params = {'layers': {key: jnp.asarray(start)}} if stack else {key: start}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for grad in grads:
    updates, state = update(
      jax.tree.map(lambda _, g=grad: jnp.asarray(g), params), state, params
    )
    params = optax.apply_updates(params, updates)
  moments = state[0].mu, state[0].nu
  return [t['layers'][key] if stack else t[key] for t in (params, *moments)]


def test_the_levels_are_bitsandbytes():
  np.testing.assert_array_equal(nf4.DYNAMIC_MAP, ARRAYS['signed'])
  np.testing.assert_array_equal(nf4.UNSIGNED_MAP, ARRAYS['unsigned'])


@NAMES
def test_it_errs_no_more_than_bitsandbytes(name):
  """From AdamW in 32 bits, and so from bitsandbytes' own 8-bit result."""
  exact, theirs = (ARRAYS[f'{name}/{bits}/parameter'] for bits in (32, 8))
  got, mu, _ = ours(name)
  if name == 'small':
    assert isinstance(mu, jax.Array)
    np.testing.assert_allclose(got, exact, atol=3e-6)
    return
  error, bound = np.abs(got - exact), np.abs(theirs - exact)
  assert 0 < error.mean() <= bound.mean()
  assert error.max() <= bound.max()
  assert np.abs(got - theirs).max() <= 2 * bound.max()


@pytest.mark.parametrize('name', ['rows', 'across'])
def test_its_moments_are_bitsandbytes(name):
  _, *moments = ours(name)
  for n, key, moment in zip(
    (1, 2), ('signed', 'unsigned'), moments, strict=True
  ):
    theirs = {k: ARRAYS[f'{name}/8/{k}{n}'] for k in ('state', 'absmax')}
    levels = ARRAYS[key]
    assert moment.codes8.shape == theirs['state'].shape
    absmax = np.asarray(moment.absmax8).reshape(-1)
    np.testing.assert_allclose(absmax, theirs['absmax'], rtol=2e-2)
    # Its CPU kernel looks levels up in a table of 2^16 places, so that small
    # numbers differ; after ten steps these are two levels here and there.
    apart = np.abs(levels[theirs['state']] - levels[moment.codes8])
    assert apart.max() <= 2.01 * np.diff(levels).max()
    assert apart.mean() <= 2e-4


def test_codes_are_the_nearest():
  draw = np.random.RandomState(0)
  sizes = 10.0 ** draw.uniform(-7, 0, (32, 256))
  numbers = np.float32(sizes * draw.choice([-1, 1], sizes.shape))
  like = adam8bit.Blocks(
    jnp.zeros(sizes.shape, jnp.uint8), jnp.zeros((32, 1), jnp.float32)
  )
  for key, array in (('signed', numbers), ('unsigned', np.abs(numbers))):
    levels = ARRAYS[key]
    got = adam8bit.encode(jnp.asarray(array), like, levels)
    absmax = np.abs(array).max(1, keepdims=True)
    np.testing.assert_array_equal(got.absmax8, absmax)
    units = array / absmax
    least = np.abs(units[..., None] - levels).min(-1)
    codes = np.asarray(got.codes8)
    lifted = (codes == 1) & (key == 'unsigned')
    error = np.abs(units - levels[codes])
    np.testing.assert_allclose(error[~lifted], least[~lifted], atol=1e-9)
    assert (
      codes[array != 0] != levels.searchsorted(0)
    ).all() or key == 'signed'
    back = adam8bit.decode(got, levels)
    np.testing.assert_allclose(back, levels[codes] * absmax, rtol=1e-6)


def test_a_layer_of_a_stack_is_an_array_of_its_own():
  for name in ('rows', 'across'):
    for one, stacked in zip(ours(name), ours(name, stack=True), strict=True):
      for a, b in zip(*map(jax.tree.leaves, (one, stacked)), strict=True):
        np.testing.assert_array_equal(a, b[0])


def test_zero_gradients_move_nothing_and_stay_finite():
  params = {'kernel': jnp.ones((16, 256))}
  optimizer = adam8bit.adamw8bit(1e-2)
  state = optimizer.init(params)
  zero = jax.tree.map(jnp.zeros_like, params)
  for _ in range(2):
    updates, state = optimizer.update(zero, state, params)
    assert (np.asarray(updates['kernel']) == 0).all()
  assert (np.asarray(state[0].nu['kernel'].codes8) == 0).all()


def test_two_bytes_and_an_absmax_of_each_256():
  params = {'layers': {'q': {'kernel': jnp.zeros((3, 64, 512))}}}
  state = adam8bit.adamw8bit(1e-2).init(params)[0]
  size = 3 * 64 * 512
  found = sum(a.nbytes for a in jax.tree.leaves((state.mu, state.nu)))
  assert found == 2 * size + 2 * 4 * size // 256


def test_codes_lie_where_their_parameter_lies():
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  params = {
    'layers': {'q': {'kernel': jnp.zeros((3, 64, 512))}},
    'lm_head': {'kernel': jnp.zeros((64, 100))},
  }
  state = adam8bit.adamw8bit(1e-2).init(params)
  placed = {
    paths.of(path): s.spec
    for path, s in jax.tree_util.tree_leaves_with_path(
      sharding.shardings(state, mesh)
    )
  }
  for name, s in (
    (paths.of(p), s)
    for p, s in jax.tree_util.tree_leaves_with_path(
      sharding.shardings(params, mesh)
    )
  ):
    for moment in ('mu', 'nu'):
      assert placed[f'0/{moment}/{name}/codes8'] == s.spec
      assert not any(placed[f'0/{moment}/{name}/absmax8'])
