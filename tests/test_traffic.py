"""From compiled programs on eight devices: what travels, and how often."""

import collections
import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import QuantSpec, joined, loss, paths, rope
from qdora_jax.model import LayerKind, ModelConfig

traffic = tiny.script('benchmarks/traffic.py')
LAYERS = 3
CONFIG = ModelConfig(
  vocab=512,
  width=512,
  ff=1024,
  layers=LAYERS,
  heads=8,
  kv_heads=4,
  head_dim=64,
  kinds=(LayerKind(rope.plain(1e4, 64)),) * LAYERS,
  tied=False,
)
SLOW = pytest.mark.slow
# A use in the forward pass and one in the backward pass.
USES = 2


def packed_leaves(base):
  return [
    leaf for leaf in paths.flatten(base).values() if hasattr(leaf, 'codes')
  ]


def stacks(base):
  """Shapes of whole stacks of codes, and of the kernels they stand for."""
  leaves = packed_leaves(base)
  return {q.codes.shape for q in leaves} | {q.shape for q in leaves}


@pytest.mark.parametrize(
  ('method', 'double', 'remat', 'sizes', 'dtype'),
  [
    ('dora', True, 'block', (1, 8, 1), 'float32'),
    pytest.param('dora', True, 'block', (1, 8, 1), 'bfloat16', marks=SLOW),
    ('lora', False, 'none', (2, 4, 1), 'float32'),
    pytest.param('dora', False, 'dots', (1, 4, 2), 'float32', marks=tiny.AGAIN),
    pytest.param('dora', True, 'offload', (1, 8, 1), 'float32', marks=SLOW),
    pytest.param('lora', True, 'block', (1, 2, 4), 'float32', marks=SLOW),
    pytest.param(
      'lora', True, 'block', (1, 2, 4), 'bfloat16', marks=tiny.AGAIN
    ),
    pytest.param('dora', False, 'none', (1, 8, 1), 'float32', marks=tiny.AGAIN),
  ],
)
def test_kernels_travel_packed_inside_the_scan(
  method, double, remat, sizes, dtype
):
  tensor = sizes[2]
  # A rank and a length by which no count of blocks can be mistaken for it, and
  # no tokens of a device for inputs of a kernel.
  with joined.on('gpu'):
    step, base, trained = traffic.compiled_step(
      CONFIG,
      method,
      QuantSpec(double_quant=double),
      sizes=sizes,
      remat=remat,
      rank=3,
      length=36,
      dtype=jnp.dtype(dtype),
    )
  program = step.as_text()
  found = traffic.moved(program)
  shapes = traffic.layer_shapes(base, trained, tensor)
  gathers = [
    array
    for array in found
    if array.collective == 'all-gather'
    and (array.dtype, array.shape) in shapes
    and shapes[array.dtype, array.shape] == 'packed kernels'
  ]
  packed = sum(
    a.size * a.dtype.itemsize
    for leaf in packed_leaves(base)
    for a in (leaf.codes, leaf.absmax)
  )
  wire = sum(array.nbytes for array in gathers)
  assert USES * packed / tensor <= wire <= 1.02 * USES * packed / tensor
  # Within the layers' loops, each kernel by itself.
  assert {array.times for array in gathers} == {LAYERS}
  assert len(gathers) == USES * 2 * len(packed_leaves(base))
  # Nothing of a kernel's dense shape travels, in whatever precision.
  dense = {leaf.shape[1:] for leaf in packed_leaves(base)}
  dense |= {(i // tensor, o) for i, o in dense}
  dense |= {(i, o // tensor) for i, o in dense}
  floats = {a.shape for a in found if a.dtype != 'u8' and a.times > 1}
  assert not floats & dense
  # No stack is anywhere whole: not gathered, not saved for the way back.
  # (Split over `tensor`, one kernel's part looks like another's whole.)
  if tensor == 1:
    assert not _arrays(program) & stacks(base)


def _arrays(program):
  return {
    tuple(int(n) for n in sizes.split(',') if n)
    for _, sizes in traffic._ARRAY.findall(program)
  }


@pytest.mark.slow
@pytest.mark.parametrize('method', ['dora', 'full'])
def test_activations_stay_where_their_rows_are(method):
  """No sum of partial products: only the embedding's rows change places."""
  quant = QuantSpec() if method == 'dora' else None
  step, _, trained = traffic.compiled_step(
    CONFIG, method, quant, sizes=(1, 8, 1), rows=8, length=48
  )
  found = traffic.moved(step.as_text())
  for array in found:
    if 48 in array.shape or 47 in array.shape:
      # Token ids to look up, and what was found.
      assert array.times == 1, array
      assert array.dtype == 's32' or array.collective == 'all-to-all', array
  # What is trained is summed over the devices, once a layer.
  summed = {
    array.shape
    for array in found
    if array.collective in ('all-reduce', 'reduce-scatter')
    and array.times == LAYERS
  }
  up = paths.flatten(trained)['layers/mlp/up/kernel']
  for part in [up] if method == 'full' else [up.lora_a, up.lora_b]:
    assert {part.shape[1:], part.shape[:0:-1]} & summed


@pytest.mark.parametrize(
  ('method', 'sizes'),
  [
    ('full', (2, 2, 2)),
    pytest.param('full', (8, 1, 1), marks=pytest.mark.slow),
    pytest.param('dora', (2, 2, 2), marks=pytest.mark.slow),
  ],
)
def test_the_head_and_its_gradient_travel_once(method, sizes, monkeypatch):
  """However many chunks of tokens the loss is made of."""
  monkeypatch.setattr(loss, 'best_chunk', lambda backend: 8)
  config = dataclasses.replace(CONFIG, vocab=500)
  step, *_ = traffic.compiled_step(config, method, sizes=sizes, length=48)
  program = step.as_text()
  chunks = 12 if sizes[2] == 2 else 6  # 47 tokens, of two rows or of one.
  assert re.search(rf'known_trip_count\D*{chunks}\b', program)
  of_head = collections.Counter()
  for array in traffic.moved(program):
    if 500 // sizes[2] in array.shape:
      of_head[array.collective] += array.times
  assert of_head.pop('all-gather', 0) == (sizes[1] > 1)
  # That of the embedding, whose gradient meets once, too, is as large.
  assert sum(of_head.values()) == 2 * (method == 'full')


@pytest.mark.slow
def test_the_readme_has_these_figures(capsys):
  traffic.main()
  kinds = '|'.join(traffic.KINDS)
  lines = re.findall(
    rf'^({kinds}) +(.+?) +([\d.]+) MB$', capsys.readouterr().out, re.M
  )
  megabytes = {(how, what): float(n) for how, what, n in lines}
  readme = (Path(__file__).parents[1] / 'README.md').read_text()
  table = {
    'packed kernels': [('all-gather', 'packed kernels')],
    'adapter: A, B, gains': [('all-gather', 'adapter')],
    'its gradients': [('all-reduce', 'adapter')],
    'the head, in float32': [('all-gather', 'full precision')],
    'rows of the embedding': [('all-to-all', 'activations and sums')],
  }
  rest = set(megabytes) - {key for keys in table.values() for key in keys}
  table['all else'] = sorted(rest)
  for words, keys in table.items():
    (written,) = re.findall(rf'^\| {words} \| ([\d.]+) \|', readme, re.M)
    places = len(written.partition('.')[2])
    here = sum(megabytes[key] for key in keys)
    assert float(written) == round(here, places), words


def test_a_loop_counts_as_often_as_it_runs():
  program = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ag = f32[1,8,4]{2,1,0} all-gather(%x), dimensions={1}
}
%cond (p: (s32[], f32[4])) -> pred[] {
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[2], f32[16]) all-gather-start(%y), dimensions={0}
  %r = (f32[3], u8[5]) all-reduce(%a, %b), to_apply=%sum
}
"""
  program = re.sub(r'\\\n', '', program)
  assert traffic.moved(program) == [
    traffic.Moved('all-gather', 'f32', (16,), 1, True),
    traffic.Moved('all-reduce', 'f32', (3,), 1, False),
    traffic.Moved('all-reduce', 'u8', (5,), 1, False),
    traffic.Moved('all-gather', 'f32', (8, 4), 5, False),
  ]


def test_a_loop_of_unknown_length_may_move_nothing():
  """Attention in chunks has one: over those that see each other."""
  program = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %d = f32[8,4]{1,0} dot(%x, %y)
}
%cond (p: (s32[], f32[4])) -> pred[] {
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body
}
"""
  assert traffic.moved(program) == []
  program = program.replace('dot(%x, %y)', 'all-gather(%x), dimensions={1}')
  with pytest.raises(ValueError, match='unknown length moves something'):
    traffic.moved(program)
