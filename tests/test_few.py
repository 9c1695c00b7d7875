"""The kernel for few tokens, by Pallas' interpreter; and its PTX, by ours."""

import warnings

import jax
import jax.numpy as jnp
import large
import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  few,
  freeze,
  init_adapter,
  linear,
  nf4,
  nibbles,
  quantize,
)
from qdora_jax.linear import in_place, materialize, norm
from qdora_jax.lora import LoraWeight
from qdora_jax.model import Decoder, init_cache

I, O, N = 256, 256, 3  # noqa: E741


@pytest.fixture
def interpreted(monkeypatch):
  """The kernel runs here: interpreted, where there is no GPU for it."""
  jax.clear_caches()
  monkeypatch.setattr(nibbles, 'INTERPRET', not few.capable())
  yield
  jax.clear_caches()


@pytest.fixture
def asked_anew():
  few.capable.cache_clear()
  yield
  few.capable.cache_clear()


def packed(double: bool, block_size: int = 64) -> nf4.NF4Array:
  w = 0.02 * jax.random.normal(jax.random.key(0), (N, I, O))
  return nf4.quantize(w, block_size, double)


def inputs(tokens: int, *lead: int) -> jax.Array:
  shape = (*lead, tokens, I)
  return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)


def relative(got: jax.Array, exact: jax.Array) -> float:
  got, exact = (np.asarray(a, np.float64) for a in (got, exact))
  return np.linalg.norm(got - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(
  ('tokens', 'double', 'block_size'),
  [
    (1, True, 64),
    pytest.param(1, False, 256, marks=pytest.mark.slow),
    pytest.param(1, True, 32, marks=pytest.mark.slow),
    (2, True, 64),
    pytest.param(16, False, 64, marks=pytest.mark.slow),
    pytest.param(16, True, 256, marks=pytest.mark.slow),
  ],
)
def test_a_product_is_that_with_the_dequantized_weight(
  interpreted, tokens, double, block_size
):
  q, x = packed(double, block_size), inputs(tokens)
  exact = x.astype(jnp.float32) @ nf4.dequantize(q, jnp.float32)[1]
  one = q.replace(layer=jnp.int32(1))
  assert few.fits(x, one) and one.shape == (I, O)
  got = few.product(x, one)
  assert got.dtype == jnp.float32
  # Fixed point; and levels in bfloat16.
  assert relative(got, exact) < (1e-4 if tokens == 1 else 3e-3)
  # A layer in its stack is the layer cut out.
  alone = jax.tree.map(lambda a: a[1], q)
  np.testing.assert_array_equal(got, few.product(x, alone))


def test_it_takes_what_it_can(interpreted, monkeypatch):
  q = jax.tree.map(lambda a: a[0], packed(True))
  assert few.fits(inputs(16), q) and few.fits(inputs(4, 2, 2), q)
  assert not few.fits(inputs(17), q)
  assert not few.fits(inputs(1).astype(jnp.float32), q)
  assert not few.fits(inputs(1), packed(True))
  narrow = nf4.quantize(jnp.ones((I, 96)), 64)
  assert not few.fits(inputs(1), narrow)
  odd = nf4.quantize(jnp.ones((288, O)), 96)
  assert not few.fits(jnp.ones((1, 288), jnp.bfloat16), odd)
  # Neither several devices nor a CPU, without the interpreter.
  monkeypatch.setattr(nibbles, 'INTERPRET', False)
  assert not few.here()


@pytest.mark.parametrize(
  ('switch', 'backend', 'count', 'capability', 'expected'),
  [
    ('1', 'gpu', 1, '9.0', True),
    ('1', 'gpu', 1, '8.0', True),
    ('0', 'gpu', 1, '9.0', False),
    ('1', 'cpu', 1, '9.0', False),
    ('1', 'gpu', 2, '9.0', False),
    ('1', 'gpu', 1, '7.5', False),
    ('1', 'gpu', 1, 'gfx942', False),
  ],
)
def test_where_it_runs(
  asked_anew, monkeypatch, switch, backend, count, capability, expected
):
  monkeypatch.setenv('QDORA_KERNELS', switch)
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'device_count', lambda: count)

  class Device:
    compute_capability = capability

  monkeypatch.setattr(jax, 'devices', lambda: [Device()])
  assert few.here() == expected


def test_a_slice_is_cut_out_where_offsets_do_not_reach(interpreted):
  """Of 80 layers of 8192 x 8192, 2.7 GB."""

  def operands(layers):
    q = jax.eval_shape(
      lambda w: nf4.quantize(w, 64),
      jax.ShapeDtypeStruct((layers, 8192, 8192), jnp.bfloat16),
    )
    x = jax.ShapeDtypeStruct((1, 8192), jnp.bfloat16)
    one = q.replace(layer=jax.ShapeDtypeStruct((), jnp.int32))
    (call,) = (
      e
      for e in jax.make_jaxpr(few.product)(x, one).eqns
      if 'pallas' in str(e.primitive)
    )
    return [v.aval.size for v in call.invars]

  assert max(operands(80)) == 8192 * 4096
  assert max(operands(60)) == 60 * 8192 * 4096


def thin(rank: int, layers: int = N, o: int = O) -> dict[str, jax.Array]:
  """What DoRA has beside A, of several layers: one of them is not adapted."""
  keys = jax.random.split(jax.random.key(5), 3)
  norm = 1 + jax.random.uniform(keys[2], (layers, o))
  return {
    'lora_b': 0.1 * jax.random.normal(keys[0], (layers, rank, o)),
    'scale': jnp.linspace(0, 1, layers),
    'magnitude': 1 + jax.random.uniform(keys[1], (layers, o)),
    'norm': norm.at[:, 3].set(0),
  }


@pytest.mark.parametrize('call', ['product', 'several', 'adapted'])
@pytest.mark.parametrize('double', [False, True])
def test_it_is_lowered_for_a_gpu_that_is_not_here(call, double):
  """To Triton, with the look-up in it: what does not hold there is found."""
  h100 = jax.sharding.AbstractDevice('NVIDIA H100', None, platform='cuda')
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((1,), ('x',), auto, abstract_device=h100)
  q = packed(double).replace(layer=jnp.int32(1))
  x, f, also = inputs(16 if call == 'several' else 1), few.product, ()
  if call == 'adapted':
    f, also = few.adapted, (jnp.ones((N, I, 12)), thin(12))
  with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
    warnings.filterwarnings('ignore', '.*Triton backend is deprecated.*')
    traced = jax.jit(f).trace(x, q, *also)
    program = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert '__gpu$xla.gpu.triton' in program and 'prmt.b32' in program
  assert ('nf4_finish' in program) == (call == 'adapted')


@pytest.mark.parametrize('layer', [0, 2])
def test_many_parts_are_added_up_of_the_right_layer(interpreted, layer):
  """65 of them, where a program takes 64 at once."""
  i, o, rank = 64 * 65, 128, 12
  w = 0.02 * jax.random.normal(jax.random.key(0), (N, i, o))
  q = nf4.quantize(w, 64)
  a = 0.02 * jax.random.normal(jax.random.key(2), (N, i, rank))
  x = jax.random.normal(jax.random.key(1), (1, i), jnp.bfloat16)
  more = thin(rank, N, o)
  got = few.adapted(x, q.replace(layer=jnp.int32(layer)), a, more)
  own = {name: array[layer] for name, array in more.items()}
  exact = x.astype(jnp.float32)
  exact = exact @ nf4.dequantize(q)[layer] + own['scale'] * (
    (exact @ a[layer]) @ own['lora_b']
  )
  if own['scale'] != 0:
    dead = own['norm'] == 0
    gain = own['magnitude'] / jnp.where(dead, 1, own['norm'])
    exact *= jnp.where(dead, 0, gain)[None]
  assert relative(got.astype(jnp.float32), exact) < 4e-3
  assert (got[0, 3] == 0) == (layer > 0)


def test_the_largest_sums_fit(interpreted):
  """In blocks of any size: levels and inputs that are all the largest."""
  q = nf4.quantize(jnp.full((4096, 128), 0.02), 4096)
  got = few.product(jnp.ones((1, 4096), jnp.bfloat16), q)
  np.testing.assert_allclose(got, 0.02 * 4096, rtol=1e-4)


def prmt(a: int, b: int, selector: int) -> int:
  """PTX's byte permutation: of eight bytes four, by nibbles of the selector."""
  picked = (a | b << 32).to_bytes(8, 'little')
  nibbles = [selector >> 4 * n & 15 for n in range(4)]
  assert max(nibbles) < 8  # 8 and more repeat a sign.
  return int.from_bytes(bytes(picked[n] for n in nibbles), 'little')


def signed(word: int) -> np.ndarray:
  return np.array(word & 2**32 - 1, '<u4').reshape(1).view('i1').astype(int)


def run(ptx: str, held: dict[str, int]) -> dict[str, int]:
  """All registers after some instructions: those that the kernels are of."""
  does = {
    'and': lambda a, b: a & b,
    'or': lambda a, b: a | b,
    'shr': lambda a, b: a >> b,
    'shl': lambda a, b: a << b,
    'prmt': prmt,
    'dp4a': lambda a, b, c: c + int(signed(a) @ signed(b)),
  }
  for line in ptx.strip('{}').split(';'):
    name, _, rest = line.strip().partition(' ')
    if not name or name.startswith('.'):
      continue
    to, *operands = rest.replace(' ', '').split(',')
    values = [held[a] if a in held else int(a, 0) for a in operands]
    held[to] = does[name.partition('.')[0]](*values)
  return held


def registers(table: np.ndarray, first: int) -> dict[str, int]:
  """A table where PTX finds it: a word in every fourth register."""
  return {
    f'${first + 4 * k}': int(word) for k, word in enumerate(table.view('u4'))
  }


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_the_look_up_gives_the_levels_of_every_byte(dtype):
  """PTX, run by the few instructions it is made of."""
  exact = nf4.LEVELS.astype(dtype)
  byte = np.arange(256)
  for high in (True, False):
    words = []
    for first in range(0, 256, 4):
      word = int.from_bytes(bytes(range(first, first + 4)), 'little')
      held = run(
        nibbles.look_up(high), {'$2': word} | registers(nibbles.words(dtype), 3)
      )
      words += [held['$0'], held['$1']]
    got = np.array(words, np.uint32).view(exact.dtype)
    np.testing.assert_array_equal(got, exact[byte >> 4 if high else byte & 15])


def test_a_dot_product_is_that_of_fixed_point(interpreted):
  """PTX, and what runs instead of it here, beside products of integers."""
  draw = np.random.default_rng(0)
  x = draw.standard_normal(4) * [1, -3, 0.01, 2]
  unit, (upper, lower) = nibbles.split([jnp.float32(a)[None] for a in x])
  whole = np.round(x * nibbles.UNIT / abs(x).max()).astype(int)
  levels = np.round(nf4.LEVELS.astype(float) * nibbles.UNIT).astype(int)
  table = nibbles.words(None)
  for _ in range(50):
    rows = draw.integers(0, 256, (2, 4), np.uint8)
    words = [int(a) & 2**32 - 1 for a in (upper[0], lower[0])]
    packed = dict(
      zip(('$4', '$5'), rows.view('<u4')[:, 0].tolist(), strict=True)
    )
    inputs = dict(zip(('$38', '$42'), words, strict=True))
    held = run(nibbles.dot_product(), packed | inputs | registers(table, 6))
    got = [held[f'${k}'] for k in range(4)]
    codes = np.stack([rows[0] >> 4, rows[0] & 15, rows[1] >> 4, rows[1] & 15])
    # All but the product of lower bytes, of 128 at most.
    exact = levels[codes].T @ whole
    assert abs(256 * np.array(got) - exact).max() <= 4 * 128**2
    here = nibbles.dot(
      list(jnp.asarray(rows)[:, None]),
      [jnp.full((1, 4), word) for word in table],
      tuple(jnp.full((1, 4), a[0]) for a in (upper, lower)),
    )
    np.testing.assert_array_equal(here[0], got)
    weighed = nf4.LEVELS[codes].T.astype(float) @ x
    assert (
      abs(np.array(got) * float(unit) - weighed).max() < 2e-4 * abs(x).max()
    )


def test_what_is_not_finite_is_not_lost(interpreted):
  q, x = packed(True).replace(layer=jnp.int32(1)), inputs(1)
  product = jax.jit(few.product)
  for bad in (np.nan, np.inf, -np.inf):
    assert not np.isfinite(product(x.at[0, 77].set(bad), q)).any()
  np.testing.assert_array_equal(product(0 * x, q), 0)


@pytest.mark.parametrize(
  ('method', 'rank'),
  [pytest.param('lora', 8, marks=pytest.mark.slow), ('dora', 12)],
)
def test_a_token_goes_through_base_and_adapter_at_once(
  interpreted, method, rank
):
  q = jax.tree.map(lambda a: a[2], packed(True))
  a = 0.1 * jax.random.normal(jax.random.key(2), (I, rank))
  b = 0.1 * jax.random.normal(jax.random.key(3), (rank, O))
  w = LoraWeight(q, a, b, 0.5)
  if method == 'dora':
    tree = {'q': {'kernel': q}}
    spec = AdapterSpec('dora', rank=rank, targets='.*')
    adapter = init_adapter(jax.random.key(4), tree, spec)
    leaf = freeze(tree, adapter)['q']['kernel']
    w = leaf.replace(lora_a=a, lora_b=b, magnitude=1.1 * leaf.magnitude)
  x = inputs(1)
  got = linear(x, w)
  exact = linear(x.astype(jnp.float32), w)
  assert got.dtype == jnp.bfloat16
  assert relative(got, exact) < 4e-3

  def total(x, w):
    return jnp.sum(jnp.sin(linear(x, w).astype(jnp.float32)))

  def slopes(x):
    found = jax.grad(total, (0, 1), allow_int=True)(x, w)
    trained = ('lora_a', 'lora_b', 'magnitude')
    names = [name for name in trained if hasattr(w, name)]
    return [found[0], *(getattr(found[1], name) for name in names)]

  both = zip(slopes(x), slopes(x.astype(jnp.float32)), strict=True)
  assert all(relative(got, exact) < 2e-2 for got, exact in both)


@pytest.mark.parametrize('rank', [0, few.RANK + 1])
def test_other_ranks_go_another_way(interpreted, rank):
  q = jax.tree.map(lambda a: a[2], packed(True))
  w = LoraWeight(q, jnp.ones((I, rank)), jnp.ones((rank, O)), 0.01)
  exact = linear(inputs(1).astype(jnp.float32), w)
  assert relative(linear(inputs(1), w), exact) < 6e-3


@pytest.mark.slow
@pytest.mark.parametrize('batch', [1, 3])
def test_decoding_in_place_is_decoding_in_slices(monkeypatch, batch):
  """Kernels stay in their stacks, in every form that there is for them."""
  model = Decoder(large.TINY, jnp.bfloat16)
  one = jnp.zeros((1, 1), jnp.int32)

  @jax.jit
  def made(key):
    params = model.init(key, one)['params']
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    params = quantize(
      params, QuantSpec('.*/(up|down)/kernel', double_quant=True)
    )
    spec = AdapterSpec(
      'dora', rank=4, init='orthogonal', targets='.*/down/kernel'
    )
    return {'params': freeze(params, init_adapter(key, params, spec))}

  def run(ids, cache):
    apply = lambda *args: model.apply(*args[:2], cache=args[2])  # noqa: E731
    return jax.jit(apply)(params, ids, cache)

  params = made(jax.random.key(0))
  ids = jax.random.randint(jax.random.key(2), (batch, 6), 0, large.TINY.vocab)
  empty = init_cache(large.TINY, batch, 8, jnp.bfloat16)
  monkeypatch.setattr(few, 'here', lambda: False)
  _, cache = run(ids[:, :5], empty)
  before = run(ids[:, 5:], cache)
  monkeypatch.setattr(few, 'here', lambda: True)
  monkeypatch.setattr(nibbles, 'INTERPRET', not few.capable())
  calls, real = [], few._parts
  monkeypatch.setattr(
    few,
    '_parts',
    lambda x, q, low=None: calls.append((q, low)) or real(x, q, low),
  )
  after = run(ids[:, 5:], cache)
  # Of up and of down, which is adapted.
  assert [q.codes.ndim for q, _ in calls] == [3, 3]
  assert [low is not None for _, low in calls] == [False, batch == 1]
  for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert relative(b.astype(jnp.float32), a.astype(jnp.float32)) < 0.02


@pytest.mark.parametrize('method', ['lora', 'dora'])
def test_a_layer_in_place_is_a_layer(method):
  _, base, _ = tiny.loaded(quant=QuantSpec())
  spec = AdapterSpec(method, rank=2, init='orthogonal')
  adapter = init_adapter(jax.random.key(0), base, spec)
  layers = attach(base, adapter)['layers']
  kernel = in_place(layers, jnp.int32(1))['mlp']['up']['kernel']
  cut = jax.tree.map(lambda a: a[1], layers)['mlp']['up']['kernel']
  assert kernel.shape == cut.shape == kernel.base.shape
  x = jax.random.normal(jax.random.key(1), (3, cut.shape[0]))
  np.testing.assert_array_equal(linear(x, kernel), linear(x, cut))
  np.testing.assert_array_equal(materialize(kernel), materialize(cut))
  if method == 'dora':
    np.testing.assert_array_equal(norm(kernel), norm(cut))
