"""Several adapters on one base: each row is what it is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import ours
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  attach_several,
  init_adapter,
  load_adapter,
  paths,
  save_adapter,
)
from qdora_jax.generate import generate

ROWS = [2, 0, 1, 0, 3]
SPECS = [
  AdapterSpec('lora', rank=4),
  AdapterSpec('dora', rank=8, alpha=4.0, rank_pattern={r'.*/1/.*': 2}),
  AdapterSpec('dora', rank=2, targets=r'layers/[02]/attn/(q|v)/kernel'),
  AdapterSpec('magnitude'),
]


@pytest.fixture(scope='module')
def several():
  model, base, _ = tiny.loaded(quant=QuantSpec())
  made = [init_adapter(jax.random.key(n), base, s) for n, s in enumerate(SPECS)]
  return model, base, [tiny.perturbed(a, n) for n, a in enumerate(made)]


@pytest.mark.slow
def test_each_row_goes_through_its_adapter(several):
  model, base, adapters = several
  tokens = np.random.RandomState(0).randint(3, 256, (len(ROWS), 8))
  got = ours.logits(model, attach_several(base, adapters, ROWS), tokens)
  for n, adapter in enumerate(adapters):
    mine = np.flatnonzero(np.array(ROWS) == n)
    want = ours.logits(model, attach(base, adapter), tokens)[mine]
    assert ours.relative(got[mine], want) <= 1e-5
    other = ours.logits(model, base, tokens)[mine]
    assert ours.relative(got[mine], other) > 1e-3


@pytest.mark.slow
def test_each_row_is_generated_by_its_adapter(several):
  model, base, adapters = several
  # As those of a chat template, they begin alike.
  prompts = [[5] * 9 + [9, 30], [5] * 9, [5] * 9 + [4, 60]]
  rows = [1, 0, 2]
  got = generate(
    model, attach_several(base, adapters, rows), prompts, 5, stop=[]
  )
  for n, row in enumerate(rows):
    params = attach(base, adapters[row])
    assert generate(model, params, [prompts[n]], 5, stop=[]) == [got[n]]


def test_the_base_is_not_copied(several):
  _, base, adapters = several
  buffers = {a.unsafe_buffer_pointer() for a in jax.tree.leaves(base)}
  first = attach(base, adapters[0])
  for tree in (first, attach(base, adapters[1])):
    leaf = tree['layers']['mlp']['up']['kernel'].base
    for a in jax.tree.leaves(leaf):
      assert a.unsafe_buffer_pointer() in buffers
  together = attach_several(base, adapters, ROWS)
  leaf = together['layers']['mlp']['up']['kernel'].base
  for a in jax.tree.leaves(leaf):
    assert a.unsafe_buffer_pointer() in buffers


def test_they_are_saved_and_found_again(several, tmp_path):
  model, base, adapters = several
  tokens = jnp.arange(3, 11)[None]
  for n, adapter in enumerate(adapters[:3]):
    save_adapter(tmp_path / str(n), adapter)
  found = [load_adapter(tmp_path / str(n), base) for n in range(3)]
  rows = np.array([1])
  got = ours.logits(model, attach_several(base, found, rows), tokens)
  want = ours.logits(model, attach_several(base, adapters, rows), tokens)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('rows', [[0, 4], [-1], 1, [], [0.5]])
def test_a_row_names_an_adapter(several, rows):
  _, base, adapters = several
  with pytest.raises(ValueError, match='expected one of 0 to 3 for each row'):
    attach_several(base, adapters, rows)


def test_a_batch_of_another_size_is_refused(several):
  model, base, adapters = several
  params = attach_several(base, adapters, [0, 1])
  with pytest.raises(ValueError, match='batch of 3 rows meets adapters for 2'):
    model.apply({'params': params}, jnp.ones((3, 4), jnp.int32))


def test_what_is_trained_in_full_cannot_differ_by_row(several):
  _, base, adapters = several
  spec = AdapterSpec('lora', rank=4, trainable=r'final_norm/scale')
  beside = init_adapter(jax.random.key(0), base, spec)
  with pytest.raises(ValueError, match='final_norm/scale is trained in full'):
    attach_several(base, [adapters[0], beside], [0, 1])


def test_another_models_adapter_is_refused(several):
  _, base, adapters = several
  flat = paths.flatten(adapters[0])
  path = 'layers/attn/q/kernel'
  flat[path] = flat[path].replace(lora_a=flat[path].lora_a[:, :10])
  with pytest.raises(ValueError, match='is the adapter of another model'):
    attach_several(base, [paths.unflatten(flat)], [0])
