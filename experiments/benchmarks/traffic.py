"""What a training step moves between devices, from the compiled program.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python experiments/benchmarks/traffic.py [METHOD] [FSDP] [TENSOR]

Compiles the step of `step.make_step` for a Llama of four wide layers on all
devices there are, without weights, and lists every collective: bytes that it
brings to each device, how often it runs in a step, and what it moves - packed
kernels, the adapter, full-precision parameters, activations. Where XLA says so
(on GPU), also whether it runs beside computation. Nothing is executed.
"""

import collections
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  init_adapter,
  norms,
  paths,
  quantize,
  rope,
)
from qdora_jax.model import Decoder, LayerKind, ModelConfig
from qdora_jax.sharding import BATCH, gathering, make_mesh, shardings
from qdora_jax.step import make_step

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all')
KINDS += ('collective-permute',)
BYTES = {'pred': 1, 'u8': 1, 's8': 1, 'bf16': 2, 'f16': 2, 'u32': 4}
BYTES |= {'f32': 4, 's32': 4, 's64': 8, 'f64': 8}
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Moved:
  """One array of one collective.

  Attributes:
    collective: one of KINDS.
    dtype: as XLA writes it: 'u8', 'f32'.
    shape: of what each device has afterwards, axes of 1 left out.
    times: how often a step does it.
    overlaps: whether it is started and awaited at different places.
  """

  collective: str
  dtype: str
  shape: tuple[int, ...]
  times: int
  overlaps: bool

  @property
  def nbytes(self) -> int:
    """Of all times."""
    return self.times * BYTES[self.dtype] * math.prod(self.shape)


def moved(program: str) -> list[Moved]:
  """Every array that a compiled program's collectives give.

  Args:
    program: `compiled.as_text()`.
  """
  bodies: dict[str, list[str]] = {}
  lines: list[str] = []
  entry = ''
  for line in program.splitlines():
    if match := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
      lines = bodies.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    lines.append(line.strip())
  times: collections.Counter[str] = collections.Counter()
  uncounted: dict[str, str] = {}

  def visit(name: str, count: int, within: str = '') -> None:
    times[name] += count
    if within:
      uncounted[name] = within
    for line in bodies[name]:
      loop, unknown = 1, within
      if ' while(' in line:
        known = re.search(r'known_trip_count\D*(\d+)', line)
        loop = int(known[1]) if known else 1
        unknown = within if known else line
      called = r'(?:body|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)'
      for callee in re.findall(called, line):
        if callee in bodies:
          visit(callee, count * loop, unknown)

  visit(entry, 1)
  found = []
  for name, count in times.items():
    for line in bodies[name]:
      match = re.search(rf' ({"|".join(KINDS)})(-start)?\(', line)
      if match is None or '=' not in line[: match.start()]:
        continue
      if name in uncounted:
        raise ValueError(
          f'a loop of unknown length moves something: {uncounted[name][:80]}'
        )
      arrays = _ARRAY.findall(line[: match.start()].split('=', 1)[1])
      if match[2]:
        arrays = arrays[len(arrays) // 2 :]  # (operands, results)
      for dtype, sizes in arrays:
        shape = tuple(int(n) for n in sizes.split(',') if n and n != '1')
        found.append(Moved(match[1], dtype, shape, count, bool(match[2])))
  return found


def layer_shapes(base: Any, trained: Any, tensor: int) -> dict[Any, str]:
  """{(dtype, shape): what it is} of what may be gathered of one layer.

  Args:
    base, trained: abstract trees.
    tensor: devices that features stay split over.
  """
  found: dict[Any, str] = {}

  def note(array: Any, what: str, stacked: bool) -> None:
    name = {'uint8': 'u8', 'float32': 'f32', 'bfloat16': 'bf16'}
    dtype = name[str(array.dtype)]
    shape = array.shape[1:] if stacked else array.shape
    found[dtype, shape] = what
    for axis, size in enumerate(shape):
      if size % tensor == 0:
        part = (*shape[:axis], size // tensor, *shape[axis + 1 :])
        found.setdefault((dtype, part), what)

  for path, leaf in paths.flatten(base).items():
    what = 'packed kernels' if hasattr(leaf, 'codes') else 'full precision'
    stacked = paths.names(path, leaf) != [path]
    for array in jax.tree.leaves(leaf):
      note(array, what, stacked)
  for path, node in paths.flatten(trained).items():
    adapter = hasattr(node, 'lora_a')
    what = 'adapter' if adapter else 'full precision'
    for array in jax.tree.leaves(node):
      note(array, what, paths.STACK in path.split('/'))
  return found


def compiled_step(
  config: ModelConfig,
  method: str = 'dora',
  quant: QuantSpec | None = None,
  *,
  sizes: tuple[int, int, int] = (1, -1, 1),
  rows: int = 8,
  length: int = 32,
  rank: int = 4,
  remat: str = 'block',
  dtype: Any = jnp.float32,
  microbatches: int = 1,
) -> tuple[Any, Any, Any]:
  """(the compiled step, abstract base, abstract trained tree) on a mesh.

  Args:
    config: of the model.
    method: 'lora', 'dora' or 'full'.
    quant: of the base; None leaves it as it is.
    sizes: of the mesh's axes data, fsdp, tensor.
    rows, length: of the batch, over all devices.
    rank: R.
    remat, dtype: the decoder's.
    microbatches: as in `make_step`.
  """
  mesh = make_mesh(*sizes)
  model = Decoder(config, dtype, remat)
  one = jnp.zeros((1, 1), jnp.int32)
  base = jax.eval_shape(model.init, jax.random.key(0), one)['params']
  if quant is not None:
    base = jax.eval_shape(lambda p: quantize(p, quant), base)
  if method == 'full':
    base, trained = {}, base
  else:
    spec = AdapterSpec(method, rank=rank)
    make = functools.partial(init_adapter, jax.random.key(0), spec=spec)
    trained = jax.eval_shape(make, base)
  optimizer = optax.adamw(1e-3)
  fixed = jax.eval_shape(norms, base, trained)
  state = jax.eval_shape(optimizer.init, trained)

  def place(tree: Any) -> Any:
    placed = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      tree,
      shardings(tree, mesh),
    )
    return gathering(placed, mesh)

  def batch(dtype: Any, length: int) -> Any:
    where = jax.sharding.NamedSharding(mesh, BATCH)
    return jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)

  whole = ('tokens', 'positions', 'segments')
  batches = {name: batch(np.int32, length) for name in whole}
  batches |= {n: batch(np.int32, length - 1) for n in ('loss_at', 'labels')}
  batches['weights'] = batch(np.float32, length - 1)
  trained_on, state_on = place(trained), place(state)
  like = trained_on, state_on
  step = make_step(model, optimizer, microbatches, like)
  key = jax.eval_shape(lambda: jax.random.key(0))
  lowered = step.lower(*like, place(base), place(fixed), batches, key)
  return lowered.compile(), base, trained


def by_what(
  found: list[Moved], shapes: Mapping[Any, str]
) -> dict[tuple[str, str], int]:
  """{(collective, what it moves): bytes a step brings to each device}."""
  sums: collections.Counter[tuple[str, str]] = collections.Counter()
  for array in found:
    key = (array.dtype, array.shape)
    squeezed = {
      (d, tuple(n for n in s if n != 1)): w for (d, s), w in shapes.items()
    }
    what = squeezed[key] if key in squeezed else 'activations and sums'
    sums[array.collective, what] += array.nbytes
  return dict(sums)


def main(method: str = 'dora', fsdp: str = '-1', tensor: str = '1') -> None:
  kind = LayerKind(rope.plain(5e5, 128))
  config = ModelConfig(
    vocab=32000,
    width=4096,
    ff=14336,
    layers=4,
    heads=32,
    kv_heads=8,
    head_dim=128,
    kinds=(kind,) * 4,
    tied=False,
  )
  quant = None if method == 'full' else QuantSpec()
  sizes = (1, int(fsdp), int(tensor))
  step, base, trained = compiled_step(
    config, method, quant, sizes=sizes, length=512, rank=16
  )
  found = moved(step.as_text())
  shapes = layer_shapes(base, trained, int(tensor))
  packed = sum(
    a.size * a.dtype.itemsize
    for leaf in paths.flatten(base).values()
    if hasattr(leaf, 'codes')
    for a in (leaf.codes, leaf.absmax)
  )
  print(
    f'{method}, {len(jax.devices())} devices, packed {packed / 1e6:,.1f} MB'
  )
  for (collective, what), nbytes in sorted(by_what(found, shapes).items()):
    print(f'{collective:<20} {what:<22} {nbytes / 1e6:12,.2f} MB')
  beside = sum(array.overlaps for array in found)
  print(
    f'{beside} of {len(found)} run beside computation'
    if beside
    else 'whether they overlap with computation: not said by this backend'
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
