"""A base and its adapter as one product is what both are one by one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiles  # noqa: F401

from qdora_jax import joined, lora, nf4
from qdora_jax.linear import materialize, scaled

T, I, O, R = 40, 128, 96, 4  # noqa: E741
HALF = jnp.bfloat16


def dense(base, gain, dtype, below):
  w = materialize(base if gain is None else scaled(base, gain), dtype)
  return w if below is None else jnp.concatenate([w, below])


def normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def base(kind: str):
  w = 0.1 * normal(0, I, O)
  return nf4.quantize(w, 64, True) if kind == 'nf4' else w.astype(kind)


def reader(kind: str) -> joined.Reader:
  return joined.Reader(dense, folds=kind != 'bfloat16', packed=kind == 'nf4')


def arguments(gained: bool, dtype=HALF) -> dict[str, jax.Array]:
  gain = 1 + 0.2 * normal(4, O)
  return {
    'x': normal(1, 2, T // 2, I, dtype=dtype),
    'low': normal(2, 2, T // 2, R, dtype=dtype),
    'b': 0.3 * normal(3, R, O),
    'gain': gain if gained else None,
  }


def product(kind, given, w):
  named = (given[name] for name in ('x', 'low', 'b', 'gain'))
  return joined.product(reader(kind), *named, w)


def plain(given, w):
  y = given['x'] @ w + given['low'] @ given['b']
  return y if given['gain'] is None else y * given['gain'][None, None]


def relative(got, exact) -> float:
  got, exact = (np.asarray(a, np.float64) for a in (got, exact))
  return np.linalg.norm(got - exact) / np.linalg.norm(exact)


KINDS = ['nf4', 'bfloat16', 'float32']


@pytest.mark.parametrize('gained', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_values_and_gradients(kind, gained):
  """Those of float32, within 16 bits; a frozen packed base has none."""
  w, given = base(kind), arguments(gained)
  d_y = normal(5, 2, T // 2, O, dtype=HALF)

  y, pull = jax.vjp(functools.partial(product, kind), given, w)
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), given)
  exact, pull_exact = jax.vjp(plain, wide, materialize(w, jnp.float32))
  assert y.dtype == HALF and relative(y, exact) < 5e-3
  got, d_w = pull(d_y)
  expected, d_exact = pull_exact(d_y.astype(jnp.float32))
  for name, value in expected.items():
    if value is not None:
      assert got[name].dtype == given[name].dtype
      assert relative(got[name], value) < 6e-3, name
  if kind != 'nf4':
    assert relative(d_w, d_exact) < 6e-3


@pytest.mark.parametrize('kind', KINDS)
def test_a_gain_within_the_last_bit_moves_the_output(kind):
  given = arguments(True) | {'low': None, 'b': None}
  w, seen = base(kind), []
  for gain in (1.0, 1.001):
    given['gain'] = jnp.full(O, gain)
    y = product(kind, given, w)
    seen.append(np.sum(np.abs(np.asarray(y, np.float64))))
  assert seen[1] / seen[0] == pytest.approx(1.001, abs=3e-4)


def test_where_nothing_is_the_gain_has_no_gradient():
  """And no NaN: outputs whose weights are all zero, and so their gains."""
  given = arguments(True)
  w = nf4.quantize((0.1 * normal(0, I, O)).at[:, :3].set(0), 64)
  given['gain'] = given['gain'].at[:3].set(0)

  def total(gain):
    y = product('nf4', given | {'gain': gain}, w)
    return jnp.sum(y.astype(jnp.float32))

  slope = jax.grad(total)(given['gain'])
  assert np.isfinite(slope).all() and (slope[:3] == 0).all()


@pytest.mark.parametrize('gained', [False, True])
def test_no_product_is_written_in_float32(gained):
  """Of all tokens with all outputs; and W is kept in four bits alone."""
  given, w = arguments(gained), base('nf4')

  def gradients(given, w):
    y, pull = jax.vjp(lambda given: product('nf4', given, w), given)
    return pull(y)

  text = jax.jit(gradients).lower(given, w).as_text()
  wide = re.findall(r'dot_general.*-> tensor<2x20x(?:96|128)x(\w+)>', text)
  assert wide == ['bf16'] * 2
  _, pull = jax.vjp(lambda given: product('nf4', given, w), given)
  held = [a.shape for a in jax.tree.leaves(pull) if a.size >= I * O]
  assert held == []


def test_low_sums_the_gradient_of_a_in_float32():
  x, a = normal(1, 5, 600, I, dtype=HALF), 0.1 * normal(2, I, R)
  low, pull = jax.vjp(lora.low, x, a)
  wide = x.astype(jnp.float32)
  assert relative(low, wide @ a) < 5e-3
  d_x, d_a = pull(low)
  assert d_a.dtype == jnp.float32
  exact = jnp.einsum('bli,blr->ir', wide, low.astype(jnp.float32))
  assert relative(d_a, exact) < 1e-5
  assert relative(d_x, low.astype(jnp.float32) @ a.T) < 6e-3
