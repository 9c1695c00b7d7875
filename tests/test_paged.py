"""Optimizer state in the host's memory: the same updates, bit for bit."""

import functools

import jax
import pytest
import tiny
from test_train import parts, sums
from tiny import quick_compiles  # noqa: F401

from qdora_jax import optim, paged, sharding, train


def kinds(tree):
  """Where a tree's arrays lie; numbers stay on the device."""
  assert all(
    a.sharding.memory_kind == 'device'
    for a in jax.tree.leaves(tree)
    if not a.ndim
  )
  return {a.sharding.memory_kind for a in jax.tree.leaves(tree) if a.ndim}


def fit(quant, method, mesh=None, steps=3, data=None, **options):
  """(trained, rows, states seen) of a short run."""
  model, base, trained = parts(quant, method)
  if mesh is not None:
    base = sharding.shard(base, mesh)
  optimizer = functools.partial(
    optim.make_optimizer, weight_decay=0.1, clip=0.5
  )
  data = sums(batch_size=8) if data is None else data
  options = {'optimizer': optimizer, 'lr': 1e-2} | options
  return train.fit(
    model, base, trained, data, steps=steps, mesh=mesh, **options
  )


@pytest.fixture
def states(monkeypatch):
  """Every state that a step is given or makes."""
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


@pytest.mark.parametrize('piece', [2**29, 2**10], ids=['whole', 'cut'])
@pytest.mark.parametrize(
  'quant, method, devices',
  [('none', 'none', 8), ('nf4', 'dora', 8), ('nf4', 'dora', 1)],
)
def test_training_is_the_same(
  quant, method, devices, piece, states, monkeypatch
):
  monkeypatch.setattr(paged, 'PIECE', piece)
  mesh = sharding.make_mesh(fsdp=8) if devices == 8 else None
  want = fit(quant, method, mesh)
  assert {*map(frozenset, states)} == {frozenset({'device'})}
  states.clear()
  got = fit(quant, method, mesh, paged='host')
  assert {*map(frozenset, states)} == {frozenset({'pinned_host'})}
  assert len(states) == 6
  tiny.assert_same(got.trained, want.trained)
  for a, b in zip(got.rows, want.rows, strict=True):
    assert (a['loss'], a['grad_norm']) == (b['loss'], b['grad_norm'])
