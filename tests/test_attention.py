"""Attention in chunks is attention: values, gradients, memory, devices."""

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from tiny import quick_compiles  # noqa: F401

from qdora_jax import attention as attention_room
from qdora_jax import rope
from qdora_jax import sight as sight_room
from qdora_jax.attention import attention, best
from qdora_jax.loss import summed_loss
from qdora_jax.model import Decoder, LayerKind, ModelConfig
from qdora_jax.sight import NOWHERE, look

WIDTH, CHUNK = 8, 16


def arrays(lengths=(70, 70), heads=(4, 2), dtype=jnp.float32, rows=2, seed=0):
  """q, k, v and the gradient of what attention gives."""
  (queries, keys), (h, kv) = lengths, heads
  shapes = [(queries, h), (keys, kv), (keys, kv), (queries, h)]
  draw = np.random.RandomState(seed)
  return [
    jnp.asarray(draw.standard_normal((rows, n, m, WIDTH)), dtype)
    for n, m in shapes
  ]


def packed(length, rows=2, seed=0):
  """Positions and segments as `data` packs them, with padding at the end."""
  draw = np.random.RandomState(seed)
  places, segments = np.zeros((2, rows, length), np.int32)
  for row in range(rows):
    at = 0
    for n in range(1, length):
      size = draw.randint(1, length // 2)
      if at + size > length - 5:
        break
      places[row, at : at + size] = np.arange(size)
      segments[row, at : at + size] = n
      at += size
  return jnp.asarray(places), jnp.asarray(segments)


def sight(kind, length, window=None, chunk=CHUNK):
  places = jnp.tile(jnp.arange(length)[None], (2, 1))
  if kind == 'packed':
    places, segments = packed(length)
    return look(places, places, segments, segments, window, chunk)
  if kind == 'padded':  # On the left, as generation has it.
    shift = jnp.asarray([[0], [length // 3]])
    places = jnp.where(places < shift, NOWHERE, places - shift)
  return look(places, places, None, None, window, chunk)


@functools.partial(jax.jit, static_argnames=('scale', 'softcap'))
def both(q, k, v, dy, seen, **options):
  """(y, dq, dk, dv) of flash and of the plain form."""
  results = []
  for form in ('flash', 'plain'):
    f = functools.partial(attention, sight=seen, form=form, **options)
    y, pull = jax.vjp(f, q, k, v)
    results.append((y, *pull(dy)))
  return results


CASES = {
  # kind of row, (queries' heads, keys'), window, options
  'mha': ('plain', (3, 3), None, {}),
  'gqa packed': ('packed', (4, 2), None, {}),
  'mqa padded': ('padded', (3, 1), None, {}),
  'window': ('plain', (4, 2), 19, {}),
  'window packed': ('packed', (2, 2), 5, {'scale': 0.7}),
  'window padded': ('padded', (4, 2), 3, {}),
  'softcap': ('plain', (4, 2), None, {'softcap': 1.5}),
  'everything': ('packed', (6, 2), 7, {'softcap': 2.0, 'scale': 1.3}),
}


MORE = ['window', 'window padded']


@pytest.mark.parametrize(
  ('case', 'length'),
  [
    *((case, 70) for case in CASES if case not in MORE),
    *(pytest.param(case, 70, marks=pytest.mark.slow) for case in MORE),
    pytest.param('everything', 32, marks=pytest.mark.slow),
  ],
)
def test_flash_is_the_plain_form(case, length):
  """Lengths that chunks divide and that they do not; forward and gradients."""
  kind, heads, window, options = CASES[case]
  seen = sight(kind, length, window)
  q, k, v, dy = arrays((length, length), heads)
  if kind == 'padded':
    # What padding sees among itself means nothing; it must be finite.
    dy = jnp.where((seen.query_BxL < NOWHERE)[..., None, None], dy, 0)
  got, want = both(q, k, v, dy, seen, **options)
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    assert tiny.relative(a, b) <= 1e-6


@pytest.mark.parametrize(
  'dtype', [jnp.bfloat16, pytest.param(jnp.float16, marks=tiny.AGAIN)]
)
def test_sixteen_bits_to_their_rounding(dtype):
  """Both forms are as far from float32 as the dtype is."""
  seen = sight('packed', 70, 30)
  rounded = arrays(dtype=dtype)
  exact, _ = both(*(a.astype(jnp.float32) for a in rounded), seen)
  got, plain = both(*rounded, seen)
  for a, b, want in zip(got, plain, exact, strict=True):
    assert a.dtype == b.dtype == dtype
    assert tiny.relative(a, want) <= 2 * jnp.finfo(dtype).eps
    assert tiny.relative(b, want) <= 2 * jnp.finfo(dtype).eps


def test_more_keys_than_queries():
  """A text read into a cache that has room left."""
  seen = look(
    40 + jnp.arange(50)[None],
    jnp.where(jnp.arange(120) < 90, jnp.arange(120), NOWHERE)[None],
    chunk=CHUNK,
  )
  got, want = both(*arrays((50, 120), rows=1), seen)
  for a, b in zip(got, want, strict=True):
    assert tiny.relative(a, b) <= 1e-6


def test_a_query_that_sees_nothing_gets_zero():
  """And gives no gradient: not that of an average, and not NaN."""
  places = jnp.arange(40)[None]
  seen = look(places, places + 20, chunk=CHUNK)
  q, k, v, dy = arrays((40, 40), rows=1)
  got, want = both(q, k, v, dy, seen, softcap=3.0)
  for a in (got[0][:, :20], got[1][:, :20]):
    assert not np.asarray(a).any()
  real = jnp.where(jnp.arange(40)[None, :, None, None] < 20, 0, dy)
  got, want = both(q, k, v, real, seen, softcap=3.0)
  assert tiny.relative(got[0][:, 20:], want[0][:, 20:]) <= 1e-6
  for a, b in zip(got[1:], want[1:], strict=True):
    assert tiny.relative(a, b) <= 1e-6


def counted(seen):
  """Pairs that are visited, and those that really see something."""
  chunks = seen.chunks()
  n, m = len(chunks.query_BxL), len(chunks.key_BxS)
  needed = {
    (i, j)
    for i in range(n)
    for j in range(m)
    if np.asarray(chunks.of(i, j).mask()).any()
  }
  visited = list(map(tuple, seen.pairs_Px2[: int(seen.count)].tolist()))
  assert len(set(visited)) == len(visited)
  return set(visited), needed


@pytest.mark.parametrize('kind', ['plain', 'packed', 'padded'])
@pytest.mark.parametrize('window', [None, 20])
def test_every_pair_of_chunks_that_matters_is_visited(kind, window):
  visited, needed = counted(sight(kind, 170, window))
  assert needed <= visited
  if kind == 'plain':
    assert visited == needed
    assert len(visited) == (66 if window is None else 30)


def test_pairs_that_see_nothing_are_left_out():
  """Of 64 pairs of chunks: two examples, each of four chunks in a row."""
  places = jnp.tile(jnp.arange(4 * CHUNK), 2)[None]
  segments = jnp.repeat(jnp.asarray([1, 2]), 4 * CHUNK)[None]
  visited, _ = counted(look(places, places, segments, segments, chunk=CHUNK))
  assert len(visited) == 2 * 10


def test_forms_are_chosen_by_length():
  for sides in ((255, 255), (1, 32768), (8, 4096)):
    assert best(*sides, 'cpu') == 'plain'
  for sides in ((256, 256), (32768, 32768), (64, 4096)):
    assert best(*sides, 'cpu') == 'flash'
  assert best(1023, 1023, 'gpu') == 'plain'
  assert best(1024, 1024, 'gpu') == 'flash'


def test_under_vmap():
  seen = sight('packed', 40)
  q, k, v, dy = (jnp.stack([a, -2 * a]) for a in arrays((40, 40)))
  got, want = jax.vmap(lambda *a: both(*a, seen))(q, k, v, dy)
  for a, b in zip(got, want, strict=True):
    assert tiny.relative(a, b) <= 1e-6


LONG = rope.longrope(1e4, 8, 4.0, 4096, (1.0,) * 4, (2.0,) * 4)
# What may be quadratic is: LongRoPE in a packed row, windows, soft caps.
CONFIG = ModelConfig(
  vocab=64,
  width=32,
  ff=64,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  kinds=(LayerKind(LONG), LayerKind(rope.plain(1e4, 8), window=4096)),
  attn_softcap=30.0,
)


def compiled_gradient(length, remat='block'):
  """Of the loss of a packed row; nothing is run."""
  model = Decoder(CONFIG, remat=remat)
  params = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )['params']
  whole = jax.ShapeDtypeStruct((1, length), jnp.int32)
  names = ('tokens', 'positions', 'segments', 'loss_at', 'labels')
  batch = dict.fromkeys(names, whole)
  batch['weights'] = jax.ShapeDtypeStruct((1, length), jnp.float32)
  f = jax.grad(lambda params, batch: summed_loss(model, params, batch))
  return jax.jit(f).lower(params, batch).compile()


def largest(program):
  """Numbers of the largest array of a compiled program."""
  shapes = re.findall(r'\b[a-z]+\d*\[([\d,]+)\]', program.as_text())
  return max(math.prod(map(int, dims.split(','))) for dims in shapes)


def test_32k_tokens_without_an_l_x_l_array():
  """Forward and backward: a few numbers a token, and no array of pairs."""
  program = compiled_gradient(32768)
  # Nothing is larger than what a layer makes of a token.
  assert largest(program) <= 32768 * 2 * CONFIG.ff
  assert program.memory_analysis().temp_size_in_bytes < 32768**2 / 4
  # The plain form has one, and this would see it.
  plain = jax.jit(lambda p: look(p, p).mask())
  places = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
  assert largest(plain.lower(places).compile()) == 4096**2


@pytest.mark.slow
@pytest.mark.parametrize(
  'remat', [pytest.param('none', marks=pytest.mark.exhaustive), 'block']
)
def test_twice_the_tokens_take_twice_the_memory(remat):
  memory, less = (
    compiled_gradient(n, remat).memory_analysis().temp_size_in_bytes
    for n in (16384, 8192)
  )
  assert memory <= 2.1 * less


@pytest.fixture
def gpu(monkeypatch):
  """Has the devices here say that they are of a compute capability."""

  def say(capability):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax, 'local_devices', lambda: [device])
    monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91000)

  return say


def lowered(length, dtype=jnp.bfloat16, width=64, form='auto', **options):
  """The program for a GPU of attention and its gradient, not compiled."""
  shape = jax.ShapeDtypeStruct((2, length, 4, width), dtype)
  places = jax.ShapeDtypeStruct((2, length), jnp.int32)

  def f(q, k, v, places, segments):
    seen = look(places, places, segments, segments, options.get('window'))
    cap = options.get('softcap')
    y = attention(q, k, v, seen, softcap=cap, form=form)
    return jnp.sum(y.astype(jnp.float32))

  args = (shape, shape, shape, places, places)
  traced = jax.jit(jax.grad(f, (0, 1, 2))).trace(*args)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


def test_cudnn_takes_what_it_can(gpu):
  gpu('8.0')
  for program in (lowered(128), lowered(4096, jnp.float16, window=9)):
    assert '@__cudnn$fmhaScaleBiasSoftmax(' in program
    assert '@__cudnn$fmhaScaleBiasSoftmaxBackward(' in program
    # Rows of one text take no mask.
    assert '@__cudnn$fmhaSoftmax(' in program
    assert '@__cudnn$fmhaSoftmaxBackward(' in program


@pytest.fixture
def recorded(monkeypatch):
  """cuDNN's attention, written out: lists what each call is told."""
  calls, real = [], jax.nn.dot_product_attention

  def written_out(q, k, v, implementation=None, **options):
    assert implementation == 'cudnn'
    calls.append(('mask' in options, options.get('is_causal', False)))
    return real(q, k, v, **options)

  monkeypatch.setattr(attention_room, 'fused', lambda *_: True)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', written_out)
  return calls


@pytest.mark.parametrize(
  ('segments', 'window', 'whole'),
  [
    ([1] * 12, None, True),
    ([1] * 12, 12, True),
    ([1] * 12, 5, False),
    ([1] * 5 + [2] * 7, None, False),
    ([1] * 9 + [0] * 3, None, True),
    ([0] * 3 + [1] * 9, None, False),
  ],
)
def test_cudnn_is_told_what_nobody_sees(recorded, segments, window, whole):
  """Nothing above the diagonal; and no mask, where that is all."""
  q, k, v, _ = arrays((12, 12))
  own = [segments, [1] * 12]
  # Padding, 0, stays at position 0.
  places = jnp.asarray(
    [[one and row[:n].count(one) for n, one in enumerate(row)] for row in own]
  )
  own = jnp.asarray(own)
  seen = look(places, places, own, own, window)
  assert bool(seen.whole) == whole and seen.ordered
  with jax.disable_jit():
    got = attention(q, k, v, seen)
  assert recorded == [(not whole, True)]
  mask = seen.mask()[:, None]
  exact = jax.nn.dot_product_attention(
    q, k, v, mask=mask, implementation='cudnn'
  )
  real = np.asarray(own) > 0
  np.testing.assert_allclose(got[real], exact[real], atol=1e-6)


def test_a_window_is_of_positions_not_of_places():
  seen = look(*[jnp.asarray([[0, 100]])] * 2, window=2)
  assert not seen.whole and not seen.mask()[0, 1, 0]


def test_cudnn_of_a_cache_has_its_mask(recorded):
  q, k, v, _ = arrays((2, 6), rows=1)
  seen = look(jnp.asarray([[3, 4]]), jnp.arange(6)[None])
  assert not seen.ordered and not seen.whole
  attention(q, k, v, seen)
  assert recorded == [(True, False)]


@pytest.mark.parametrize(
  ('capability', 'length', 'options'),
  [
    ('7.5', 128, {}),  # A T4.
    ('gfx942', 128, {}),
    ('9.0', 128, {'dtype': jnp.float32}),
    ('9.0', 128, {'width': 144}),
    ('9.0', 128, {'width': 12}),
    ('9.0', 128, {'softcap': 30.0}),
    ('9.0', 127, {}),
    ('9.0', 4098, {}),
    ('9.0', 128, {'form': 'plain'}),
    ('9.0', 128, {'form': 'flash'}),
  ],
)
def test_what_cudnn_cannot_do_is_done_without(gpu, capability, length, options):
  gpu(capability)
  assert 'cudnn' not in lowered(length, **options)


def test_without_a_gpu_there_is_no_cudnn():
  assert 'cudnn' not in lowered(128)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2)])
def test_nothing_of_it_travels(sizes):
  """Rows and heads are split, chunks are not; which pairs is asked once."""
  traffic = tiny.script('benchmarks/traffic.py')
  config = dataclasses.replace(CONFIG, kinds=CONFIG.kinds[1:] * 2)
  step, *_ = traffic.compiled_step(
    config, 'lora', sizes=sizes, rows=8, length=300
  )
  # A loop of unknown length with a collective in it would be an error here.
  found = traffic.moved(step.as_text())
  asked = [a for a in found if a.dtype == 'pred']
  assert [(a.shape, a.times) for a in asked] == [((3, 3), 1)]
  assert not [a for a in found if a.times > 1 and 128 in a.shape]


@pytest.mark.parametrize(
  'remat',
  [
    pytest.param('dots', marks=pytest.mark.slow),
    pytest.param('none', marks=tiny.AGAIN),
    pytest.param('block', marks=tiny.AGAIN),
    pytest.param('offload', marks=pytest.mark.slow),
  ],
)
def test_a_model_learns_the_same_in_chunks(monkeypatch, remat):
  """Loss and gradients of packed rows, in layers of two kinds."""
  monkeypatch.setattr(sight_room, 'best_chunk', lambda backend: CHUNK)
  kinds = (LayerKind(LONG), LayerKind(rope.plain(1e4, 8), window=6))
  model = Decoder(dataclasses.replace(CONFIG, kinds=kinds), remat=remat)
  places, segments = packed(50)
  tokens = jnp.asarray(np.random.RandomState(1).randint(0, 64, (2, 50)))
  params = jax.jit(model.init)(jax.random.key(0), tokens)['params']

  @functools.partial(jax.jit, static_argnums=0)
  def run(form, params):
    def loss(params):
      one = model.clone(attention=form)
      y = one.apply({'params': params}, tokens, places, segments)
      return jnp.mean(jnp.square(y) * (segments > 0)[..., None])

    return jax.value_and_grad(loss)(params)

  for a, b in zip(
    jax.tree.leaves(run('flash', params)),
    jax.tree.leaves(run('plain', params)),
    strict=True,
  ):
    assert tiny.relative(a, b) <= 1e-5


@pytest.mark.parametrize(
  ('remat', 'loops'), [('none', 2), ('dots', 2), ('block', 3)]
)
def test_what_is_kept_is_not_made_again(remat, loops):
  """Chunks are visited forward, backward, and where remat forgets them."""
  model = Decoder(CONFIG, remat=remat, attention='flash')
  tokens = jnp.zeros((1, 50), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']

  def loss(params):
    return jnp.sum(model.apply({'params': params}, tokens))

  text = jax.jit(jax.grad(loss)).lower(params).as_text()
  # Of the layers two: forward and backward.
  assert text.count('stablehlo.while') == 2 + loops
