"""Eight devices: the same numbers, and only packed weights on the wire."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  init_adapter,
  load_pretrained,
  norms,
  quantize,
  rope,
)
from qdora_jax.model import Decoder, LayerKind, ModelConfig
from qdora_jax.sharding import make_mesh, shard, shard_batch, shardings

CONFIG = ModelConfig(
  vocab=128,
  width=512,
  ff=1024,
  layers=2,
  heads=8,
  kv_heads=4,
  head_dim=64,
  kinds=(LayerKind(rope.plain(1e4, 64)),) * 2,
)
TOKENS = np.random.RandomState(0).randint(0, 128, (8, 16)).astype(np.int32)


def setup(method: str, stored: str, remat='block'):
  """(loss and gradient, trained, base, norms) of a method."""
  model = Decoder(CONFIG, remat=remat)
  params = model.init(jax.random.key(0), TOKENS)['params']
  base = params if stored == 'plain' else quantize(params, QuantSpec())
  if method == 'full':
    base, trained = {}, params
  else:
    spec = AdapterSpec(method, rank=8)
    trained = init_adapter(jax.random.key(1), base, spec)
    keys = jax.random.key(2)
    trained = jax.tree.map(
      lambda a: a + 0.02 * jax.random.normal(keys, a.shape), trained
    )
  fixed = norms(base, trained)

  def loss(trained, base, fixed, tokens):
    params = attach(base, trained, norms=fixed)
    out = model.apply({'params': params}, tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(
      out, tokens[:, 1:]
    ).mean()

  return jax.value_and_grad(loss), trained, base, fixed


def placed(mesh, trained, base, fixed):
  return (
    *(shard(tree, mesh) for tree in (trained, base, fixed)),
    shard_batch(TOKENS, mesh),
  )


@pytest.mark.parametrize(
  ('method', 'stored'),
  [
    ('full', 'plain'),
    pytest.param('lora', 'plain', marks=pytest.mark.slow),
    pytest.param('dora', 'plain', marks=pytest.mark.slow),
    pytest.param('lora', 'nf4', marks=pytest.mark.slow),
    ('dora', 'nf4'),
  ],
)
@pytest.mark.parametrize('sizes', [(2, 2, 2)])
def test_sharded_equals_single_device(method, stored, sizes):
  f, trained, base, fixed = setup(method, stored)
  loss, grads = jax.jit(f)(trained, base, fixed, TOKENS)
  mesh = make_mesh(*sizes)
  out = (None, shardings(trained, mesh))
  g = jax.jit(f, out_shardings=out)
  loss8, grads8 = g(*placed(mesh, trained, base, fixed))
  assert loss8 == pytest.approx(float(loss), rel=1e-5)
  for a, b in zip(jax.tree.leaves(grads8), jax.tree.leaves(grads), strict=True):
    scale = np.abs(b).max()
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * scale
  laid = [a.sharding for a in jax.tree.leaves(grads8)]
  expected = jax.tree.leaves(out[1])
  for a, s, e in zip(jax.tree.leaves(grads8), laid, expected, strict=True):
    assert s.is_equivalent_to(e, a.ndim)


def gathered(compiled) -> dict[str, int]:
  """Bytes that all-gathers give, by element type, each once."""
  size = {'u8': 1, 'pred': 1, 's32': 4, 'f32': 4, 'bf16': 2}
  total = collections.Counter()
  for line in compiled.as_text().splitlines():
    if match := re.search(r'= (\w+)\[([\d,]*)\]\S* all-gather\(', line):
      kind, shape = match.groups()
      total[kind] += size[kind] * int(np.prod(eval(f'({shape},)')))
  return dict(total)


@pytest.mark.parametrize('remat', ['none', 'block'])
def test_fsdp_gathers_packed_codes_and_no_dense_weight(remat):
  f, trained, base, fixed = setup('dora', 'nf4', remat)
  mesh = make_mesh(fsdp=8)
  g = jax.jit(f, out_shardings=(None, shardings(trained, mesh)))
  compiled = g.lower(*placed(mesh, trained, base, fixed)).compile()
  wire = gathered(compiled)
  layer = jax.tree.map(lambda a: a[0], base['layers'])
  packed = sum(a.size for a in jax.tree.leaves(layer) if a.dtype == jnp.uint8)
  # One layer's codes and absmax in the forward loop, once in the backward's.
  assert wire['u8'] == 2 * packed
  # No float all-gather comes near a dense kernel: activations and embedding.
  floats = sum(n for kind, n in wire.items() if kind != 'u8')
  dense = 2 * 4 * CONFIG.width * CONFIG.ff
  assert floats < dense / 2


def test_packed_leaves_follow_their_kernel():
  mesh = make_mesh(fsdp=4, tensor=2)
  _, trained, base, fixed = setup('dora', 'nf4')
  base = shard(base, mesh)
  up = base['layers']['mlp']['up']['kernel']
  down = base['layers']['mlp']['down']['kernel']
  assert up.codes.sharding.spec == up.absmax.sharding.spec
  assert up.codes.sharding.spec == P(None, 'fsdp', 'tensor')
  assert down.codes.sharding.spec == P(None, 'tensor', 'fsdp')
  assert up.nested.sharding.is_fully_replicated
  assert up.gathered.spec == P(None, 'tensor')
  assert down.gathered.spec == P('tensor', None)
  laid = shardings(trained, mesh)['layers']['mlp']['up']['kernel']
  assert laid.lora_a.spec == P(None, 'fsdp', None)
  assert laid.lora_b.spec == P(None, None, 'tensor')
  assert laid.magnitude.spec == P(None, 'tensor')
  where = shardings(fixed, mesh)['layers']['mlp']['up']['kernel']
  assert where['squared_norm'].spec == P(None, 'tensor')
  state = jax.eval_shape(optax.adamw(1e-3).init, trained)
  mu = shardings(state, mesh)[0].mu['layers']['mlp']['up']['kernel']
  assert mu.lora_a.spec == P(None, 'fsdp', None)


def test_whole_blocks_or_not_at_all():
  """576 = 9 blocks: codes would split over 8 devices, absmax would not."""
  base = quantize(
    {'layers': {'attn': {'q': {'kernel': jnp.ones((2, 576, 64))}}}}, QuantSpec()
  )
  q = shard(base, make_mesh(fsdp=8))['layers']['attn']['q']['kernel']
  assert q.codes.sharding.is_fully_replicated
  assert q.absmax.sharding.is_fully_replicated


def test_a_checkpoint_is_loaded_onto_the_mesh(tmp_path):
  folder = tiny.write_model(tmp_path)
  _, base, _, adapter = load_pretrained(folder, QuantSpec(), AdapterSpec())
  mesh = make_mesh(data=4, tensor=2)
  model, base8, _, adapter8 = load_pretrained(
    folder, QuantSpec(), AdapterSpec(), mesh=mesh
  )
  up = base8['layers']['mlp']['up']['kernel']
  assert up.codes.sharding.spec == P(None, 'fsdp', 'tensor')
  magnitude = adapter8['layers']['mlp']['up']['kernel'].magnitude
  assert magnitude.sharding.spec == P(None, 'tensor')
  for one, many in ((base, base8), (adapter, adapter8)):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)

  @jax.jit
  def logits(base, adapter):
    return model.apply({'params': attach(base, adapter)}, TOKENS)

  np.testing.assert_allclose(
    logits(base, adapter), logits(base8, adapter8), atol=1e-4
  )


def test_wrong_meshes_are_refused():
  with pytest.raises(ValueError, match='data=3, fsdp=1, tensor=1'):
    make_mesh(3, 1, 1)
  with pytest.raises(ValueError, match='at most one may be -1'):
    make_mesh(-1, -1, 1)
