"""The seam: what is saved, how often W is read, what gradients are."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdora_jax import (
  DoraWeight,
  LoraWeight,
  dora,
  joined,
  linear,
  materialize,
  nf4,
)
from qdora_jax.linear import product

I, O, R = 128, 96, 4  # noqa: E741


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def base(kind: str) -> object:
  w = normal(0, I, O) * 0.1
  if kind == 'plain':
    return w
  return nf4.quantize(w, 64, kind == 'nf4 double')


def lora_weight(kind='nf4', **kwargs) -> LoraWeight:
  ab = normal(1, I, R) * 0.3, normal(2, R, O) * 0.3
  return LoraWeight(base(kind), *ab, 0.5, **kwargs)


def dora_weight(kind='nf4', **kwargs) -> DoraWeight:
  ab = normal(1, I, R) * 0.3, normal(2, R, O) * 0.3
  m = 1 + 0.2 * normal(3, O)
  return DoraWeight(base(kind), *ab, m, 0.5, **kwargs)


def with_norm(w: DoraWeight) -> DoraWeight:
  dense = materialize(w.base, jnp.float32)
  return w.replace(squared_norm=dora.squared_norm(dense))


def close(a, b, tolerance=1e-5):
  scale = np.abs(b).max()
  assert np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * scale


KINDS = ['plain', 'nf4', 'nf4 double']


@pytest.mark.parametrize('kind', KINDS)
def test_a_product_is_that_with_the_materialized_weight(kind):
  x, bias = normal(4, 5, 7, I), normal(5, O)
  for w in (base(kind), lora_weight(kind), dora_weight(kind)):
    close(linear(x, w, bias), x @ materialize(w) + bias[None, None])


@pytest.mark.parametrize('kind', KINDS[1:])
def test_one_row_is_multiplied_without_dequantizing(kind):
  q = base(kind)
  dense = materialize(q)
  for x in (normal(4, I), normal(4, 1, 1, I)):
    y = linear(x, q)
    assert y.shape == (*x.shape[:-1], O) and y.dtype == x.dtype
    close(y, x @ dense, 1e-6)
    close(jax.grad(lambda x: linear(x, q).sum())(x).ravel(), dense.sum(1))
    assert 'dot_general' not in str(jax.make_jaxpr(linear)(x, q))
  assert 'dot_general' in str(jax.make_jaxpr(linear)(normal(4, 2, I), q))
  half = linear(normal(4, 1, I).astype(jnp.bfloat16), q)
  assert half.dtype == jnp.bfloat16
  close(half.astype(jnp.float32), normal(4, 1, I) @ dense, 1e-2)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('factored', [True, False])
def test_gradients_are_those_of_the_dense_formula(kind, factored):
  """Norm held constant: REFERENCE section 2, by automatic differentiation."""
  x = normal(4, 9, I)
  w = with_norm(dora_weight(kind, factored=factored))
  dense = materialize(w.base)

  def ours(x, a, b, m):
    y = linear(x, w.replace(lora_a=a, lora_b=b, magnitude=m))
    return jnp.sum(jnp.sin(y))

  def formula(x, a, b, m):
    v = dense + 0.5 * a @ b
    norm = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))
    return jnp.sum(jnp.sin(x @ v * (m / norm)[None]))

  args = (x, w.lora_a, w.lora_b, w.magnitude)
  got = jax.grad(ours, (0, 1, 2, 3))(*args)
  expected = jax.grad(formula, (0, 1, 2, 3))(*args)
  for g, e in zip(got, expected, strict=True):
    close(g, e)


@pytest.mark.parametrize('factored', [True, False])
def test_undetached_norm_has_the_full_gradient(factored):
  x = normal(4, 9, I)
  w = with_norm(dora_weight(factored=factored, detach=False))
  dense = materialize(w.base)

  def ours(a, b):
    return jnp.sum(jnp.sin(linear(x, w.replace(lora_a=a, lora_b=b))))

  def formula(a, b):
    v = dense + 0.5 * a @ b
    g = w.magnitude / jnp.linalg.norm(v, axis=0)
    return jnp.sum(jnp.sin(x @ v * g[None]))

  got = jax.grad(ours, (0, 1))(w.lora_a, w.lora_b)
  expected = jax.grad(formula, (0, 1))(w.lora_a, w.lora_b)
  for g, e in zip(got, expected, strict=True):
    close(g, e)


def numeric(f, a, direction, h=1e-2):
  """Central difference of f along a direction."""
  return (f(a + h * direction) - f(a - h * direction)) / (2 * h)


def test_numerical_gradient_fails_detached_and_passes_otherwise():
  """The detached gradient is that of a surrogate, and must differ."""
  x, direction = normal(4, 9, I), normal(6, R, O)

  def slopes(w):
    def f(b):
      return jnp.sum(jnp.sin(linear(x, w.replace(lora_b=b))))

    exact = jnp.vdot(jax.grad(f)(w.lora_b), direction)
    return float(exact), float(numeric(f, w.lora_b, direction))

  w = with_norm(dora_weight())
  exact, measured = slopes(w.replace(detach=False))
  assert exact == pytest.approx(measured, rel=2e-2)
  exact, measured = slopes(w)
  assert exact != pytest.approx(measured, rel=2e-2)
  held = w.replace(norm=jnp.sqrt(dora.squared_norm(materialize(w.base))))
  exact, measured = slopes(held)
  assert exact == pytest.approx(measured, rel=2e-2)


def test_factored_norm_equals_dense():
  w = with_norm(dora_weight())
  v = materialize(w.base) + 0.5 * w.lora_a @ w.lora_b
  from qdora_jax.linear import norm

  close(norm(w), jnp.linalg.norm(v, axis=0), 1e-6)
  close(norm(w.replace(factored=False)), jnp.linalg.norm(v, axis=0), 1e-6)


@pytest.mark.parametrize('factored', [True, False])
@pytest.mark.parametrize('detach', [True, False])
def test_zero_output_features_have_no_gain_and_no_gradient(factored, detach):
  dense = (normal(0, I, O) * 0.1).at[:, 7].set(0)
  w = dora_weight().replace(
    base=dense,
    lora_b=jnp.zeros((R, O)),
    factored=factored,
    detach=detach,
    magnitude=jnp.linalg.norm(dense, axis=0),
  )

  def f(ab, m):
    w2 = w.replace(lora_a=ab[0], lora_b=ab[1], magnitude=m)
    return jnp.sum(jnp.sin(linear(normal(4, 9, I), w2)))

  y = linear(normal(4, 9, I), w)
  assert jnp.isfinite(y).all() and (y[:, 7] == 0).all()
  (_, db), dm = jax.grad(f, (0, 1))((w.lora_a, w.lora_b), w.magnitude)
  assert jnp.isfinite(db).all() and jnp.isfinite(dm).all()
  assert (db[:, 7] == 0).all() and dm[7] == 0
  assert (jnp.delete(dm, 7) != 0).all()


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_a_magnitude_of_zero_learns(backend):
  """Its gradient is not found of what it multiplies, which is zero."""
  w = with_norm(dora_weight())
  m = w.magnitude.at[3].set(0)
  half = backend == 'gpu'
  x = normal(4, 5, 7, I).astype(jnp.bfloat16 if half else jnp.float32)

  def total(m):
    with joined.on(backend):
      y = linear(x, w.replace(magnitude=m))
    return jnp.sum(y.astype(jnp.float32)), y

  got, y = jax.grad(total, has_aux=True)(m)
  v = materialize(w.base) + 0.5 * w.lora_a @ w.lora_b
  exact = jnp.sum(x.astype(jnp.float32) @ v, (0, 1)) / jnp.linalg.norm(
    v, axis=0
  )
  close(got, exact, 2e-2 if half else 1e-5)
  assert abs(exact[3]) > 0.1 and jnp.abs(y[..., 3]).max() < 1e-15


def test_magnitude_alone():
  w = with_norm(dora_weight()).replace(lora_a=None, lora_b=None)
  x = normal(4, 9, I)
  dense = materialize(w.base)
  expected = x @ dense * (w.magnitude / jnp.linalg.norm(dense, axis=0))[None]
  close(linear(x, w), expected)


def test_dropout_follows_the_papers_rule():
  """y = x W + (g - 1)(d W) + g s (d A) B, d the dropped x."""
  key, x = jax.random.key(9), normal(4, 9, I)
  w = with_norm(dora_weight(dropout=0.5, dropout_key=key))
  keep = jax.random.bernoulli(key, 0.5, x.shape)
  d = jnp.where(keep, x / 0.5, 0)
  dense = materialize(w.base)
  ab = 0.5 * w.lora_a @ w.lora_b
  g = (w.magnitude / jnp.linalg.norm(dense + ab, axis=0))[None]
  close(linear(x, w), x @ dense + (g - 1) * (d @ dense) + g * (d @ ab))
  lora = lora_weight(dropout=0.5, dropout_key=key)
  close(linear(x, lora), x @ dense + d @ ab)
  still = linear(x, w.replace(dropout_key=None))
  close(still, g * (x @ (dense + ab)))


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_gain_is_computed_in_float32(backend):
  """A gain within bfloat16's last bit of 1 still moves the output."""
  with joined.on(backend):
    gain_moves_the_output()


def gain_moves_the_output():
  w = with_norm(dora_weight()).replace(lora_b=jnp.zeros((R, O)))
  m = jnp.sqrt(w.squared_norm)
  x = normal(4, 64, I).astype(jnp.bfloat16)
  still = linear(x, w.replace(magnitude=m)).astype(jnp.float32)
  moved = linear(x, w.replace(magnitude=m * 1.002)).astype(jnp.float32)
  ratio = jnp.sum(jnp.abs(moved)) / jnp.sum(jnp.abs(still))
  assert still.dtype == jnp.float32 and linear(x, w).dtype == jnp.bfloat16
  assert ratio == pytest.approx(1.002, abs=4e-4)


@pytest.mark.parametrize('make', [base, lora_weight, dora_weight])
def test_no_dense_weight_is_saved_for_the_backward_pass(make):
  """The residuals of linear's derivative: packed codes, nothing [I, O]."""
  x = normal(4, 3, I)
  w = make('nf4')
  if isinstance(w, DoraWeight):
    w = with_norm(w)

  def f(x, trained):
    return linear(x, trained_into(w, trained))

  def trained_into(w, trained):
    return w.replace(**trained) if trained else w

  names = [n for n in ('lora_a', 'lora_b', 'magnitude') if hasattr(w, n)]
  trained = {n: getattr(w, n) for n in names}
  _, pullback = jax.vjp(f, x, trained)
  saved = jax.tree.leaves(pullback)
  dense = [a for a in saved if a.size >= I * O]
  assert not dense, [(a.shape, a.dtype) for a in dense]
  codes = [a for a in saved if a.dtype == jnp.uint8]
  assert codes and codes[0].shape == (I // 2, O)


def lookups(compiled) -> int:
  """How often a compiled program reads the table of pairs."""
  return sum(
    ' gather(' in line and 'f32[' in line
    for line in compiled.as_text().splitlines()
  )


@pytest.mark.parametrize('dropout', [0.0, 0.5])
def test_one_dequantization_each_way(dropout):
  """Shared by tokens, dropped tokens and the norm's rows: one in the forward
  loop over layers, one in the backward loop."""
  key = jax.random.key(1) if dropout else None
  w = with_norm(dora_weight(dropout=dropout, dropout_key=key))
  stack = jax.tree.map(lambda a: jnp.stack([a, a, a]), w)

  def f(x, ab, stack):
    stack = stack.replace(lora_a=ab[0], lora_b=ab[1])

    def layer(x, w):
      return x + jnp.tanh(linear(x, w) @ jnp.ones((O, I))), None

    return jnp.sum(jax.lax.scan(layer, x, stack)[0])

  args = (normal(4, 64, I), (stack.lora_a, stack.lora_b), stack)
  assert lookups(jax.jit(f).lower(*args).compile()) == 1
  both = jax.jit(jax.grad(f, (0, 1))).lower(*args).compile()
  assert lookups(both) == 2


def test_compiled_memory_of_a_stack_holds_one_dense_layer_at_a_time():
  layers, width = 12, 256
  w = normal(0, layers, width, width) * 0.1
  q = nf4.quantize(w)
  a, b = normal(1, layers, width, R), normal(2, layers, R, width) * 0.1
  fixed = dora.squared_norm(nf4.dequantize(q))
  m = jnp.sqrt(fixed)

  def f(trained, x):
    def layer(x, leaf):
      q, fixed, (a, b, m) = leaf
      w = DoraWeight(q, a, b, m, 0.5, squared_norm=fixed)
      return jnp.tanh(linear(x, w)), None

    return jnp.sum(jax.lax.scan(layer, x, (q, fixed, trained))[0])

  x = normal(4, 4, width)
  compiled = jax.jit(jax.grad(f)).lower((a, b, m), x).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  dense = width * width * 4
  # Gradients and layer inputs are thin; codes are an eighth of dense.
  assert temporary < 6 * dense < layers * dense


def test_the_factored_norm_has_no_temporary_of_the_weights_size():
  from qdora_jax.linear import norm

  size, rank = 1024, 64
  w = DoraWeight(
    normal(0, size, size),
    normal(1, size, rank),
    normal(2, rank, size),
    jnp.ones(size),
    0.5,
    squared_norm=jnp.ones(size),
  )
  compiled = jax.jit(norm).lower(w).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < size * size

  def temporary(w):
    def f(ab, w):
      return jnp.sum(norm(w.replace(lora_a=ab[0], lora_b=ab[1])) ** 2)

    ab = (w.lora_a, w.lora_b)
    compiled = jax.jit(jax.grad(f)).lower(ab, w).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # Undetached, the dense form has to keep V; the factored one has none.
  w = w.replace(detach=False)
  assert temporary(w) < 2 * size * size
  assert temporary(w.replace(factored=False)) >= 4 * size * size


def products_by_type(f, *args) -> dict[str, int]:
  """Products of matrices by the types of what they multiply."""
  text = jax.jit(f).lower(*args).as_text()
  kinds = re.findall(r'dot_general.* : \(tensor<[\dx]+(\w+)>, ', text)
  return collections.Counter(kinds)


@pytest.mark.parametrize('kind', KINDS)
def test_sixteen_bits_are_multiplied_as_such_both_ways(kind):
  """Products come in float32; what comes back to them must not stay so."""
  x = normal(4, 9, I).astype(jnp.bfloat16)

  def sixteen(w):
    if kind != 'plain':
      return w
    return w.replace(base=w.base.astype(jnp.bfloat16))

  lora_, dora_ = (
    sixteen(lora_weight(kind)),
    sixteen(with_norm(dora_weight(kind))),
  )

  def loss(x, a, b, w):
    y = linear(x, w.replace(lora_a=a, lora_b=b))
    return jnp.sum(y.astype(jnp.float32) ** 2)

  def gradients(w):
    three = jax.grad(loss, (0, 1, 2))
    return products_by_type(three, x, w.lora_a, w.lora_b, w)

  # Forward: x W, x A, (x A) B; backward: two for each that has two factors.
  assert gradients(lora_) == {'bf16': 3 + 1 + 2 + 2}
  # And of the norm, in float32 throughout: A^T A, and that by B.
  assert gradients(dora_) == {'bf16': 9, 'f32': 2}
  with joined.on('gpu'):
    # x W with (x A) B, and x A; backward: of x, x A, B, A and x again.
    assert gradients(lora_) == {'bf16': 2 + 5}
    assert gradients(dora_) == {'bf16': 8, 'f32': 2}


def test_a_wider_product_has_the_gradients_of_a_plain_one():
  x, w = normal(4, 2, 5, I), normal(0, I, O) * 0.1

  def loss(multiply, x, w):
    return jnp.sum(jnp.sin(multiply(x, w)))

  half = x.astype(jnp.float16), w.astype(jnp.float16)
  got = jax.grad(loss, (1, 2))(lambda x, w: product(x, w, jnp.float32), *half)
  exact = jax.grad(loss, (1, 2))(jnp.matmul, x, w)
  for mine, its in zip(got, exact, strict=True):
    assert mine.dtype == jnp.float16
    close(mine.astype(jnp.float32), its, 5e-3)


@pytest.mark.parametrize('kind', ['plain', 'nf4'])
def test_an_adapters_gradient_copies_no_activation_transposed(kind):
  """From the compiled program: XLA's CPU makes such a copy from the start."""
  x, w = normal(4, 4, 50, I), lora_weight(kind)

  def loss(x, a, b):
    y = linear(jnp.tanh(x), w.replace(lora_a=a, lora_b=b))
    return jnp.sum(jnp.sin(y))

  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
  text = gradients.lower(x, w.lora_a, w.lora_b).compile().as_text()
  assert not re.findall(rf'= f32\[(?:{I}|{O}),200\]', text)
