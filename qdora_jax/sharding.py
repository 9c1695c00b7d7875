"""The one mesh maker, and where each array of a tree lives on it.

A rule gives a kernel's PartitionSpec over (I, O); everything stored for that
kernel follows: packed codes and absmax have its axes (I in whole blocks only,
decided for both together), A has its in axis, B and the magnitude its out axis,
nested scales and those of 8-bit moments are replicated. Leading axes (layers,
experts) are never sharded.

Axes of the mesh: `data` splits the batch, `fsdp` the batch and the weights,
`tensor` the features.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdora_jax import paths

AXES = ('data', 'fsdp', 'tensor')
# First match wins. Projections into heads and feed-forward split their output
# over `tensor`, those out of them their input (Megatron, arXiv 1909.08053).
RULES: tuple[tuple[str, P], ...] = (
  (r'.*/(o|down)/kernel', P('tensor', 'fsdp')),
  (r'.*/kernel', P('fsdp', 'tensor')),
  (r'.*/embedding', P('tensor', 'fsdp')),
)
BATCH = P(('data', 'fsdp'))


def make_mesh(
  data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Any = None
) -> Mesh:
  """A mesh of all devices; a size of -1 takes what the others leave.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) > 1:
    raise ValueError(f'mesh sizes {sizes}: at most one may be -1')
  if -1 in sizes:
    known = max(1, -math.prod(sizes))
    sizes[sizes.index(-1)] = max(1, len(devices) // known)
  if math.prod(sizes) != len(devices):
    shape = ', '.join(f'{a}={n}' for a, n in zip(AXES, sizes, strict=True))
    raise ValueError(f'a mesh of {shape} does not use {len(devices)} devices')
  # Auto axes: under Explicit ones a codebook lookup on sharded codes fails.
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(tuple(sizes), AXES, auto, devices=devices)


def shardings(
  tree: Any, mesh: Mesh, rules: tuple[tuple[str, P], ...] = RULES
) -> Any:
  """A tree of NamedShardings for params, an adapter or optimizer state.

  Args:
    tree: arrays or ShapeDtypeStructs; names are found in any nesting that ends
      with a parameter's path, so optimizer state works.
    mesh: from `make_mesh`.
    rules: (regex over paths, spec of the kernel's last two axes) pairs.

  Returns:
    The same tree; an axis that a mesh axis does not divide is replicated (see
    `unsharded`).
  """

  def place(path: Any, leaf: Any) -> NamedSharding:
    spec = _wanted(paths.of(path), rules)
    return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))

  return _align(jax.tree_util.tree_map_with_path(place, tree))


def _wanted(name: str, rules: tuple[tuple[str, P], ...]) -> P:
  """What the rules say of an array's last axes."""
  kernel, _, part = name.rpartition('/')
  if part == 'codes8':
    # An 8-bit moment lies as what it is a moment of; see adam8bit.py.
    name = kernel
    kernel, _, part = name.rpartition('/')
  if part not in _PARTS:
    return paths.first_match(rules, name, P())
  spec = paths.first_match(rules, kernel, P(None, None))
  return P(*(spec[a] if a is not None else None for a in _PARTS[part]))


def unsharded(
  tree: Any, mesh: Mesh, rules: tuple[tuple[str, P], ...] = RULES
) -> dict[str, str]:
  """{path: reason} of arrays that a rule splits and their size does not.

  Args:
    tree: arrays or ShapeDtypeStructs.
    mesh: from `make_mesh`.
    rules: as for `shardings`.
  """
  reasons: dict[str, str] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = paths.of(path)
    if name.endswith('/codes'):
      continue  # As absmax.
    spec = _wanted(name, rules)
    sizes = leaf.shape[len(leaf.shape) - len(spec) :]
    for n, (axis, size) in enumerate(zip(spec, sizes, strict=True)):
      if axis and size % _size(mesh, axis):
        in_blocks = name.endswith('/absmax') and n == 0
        what = 'blocks' if in_blocks else 'features'
        kernel = name.removesuffix('/absmax')
        reasons[kernel] = (
          f'{size} {what} do not divide over {axis}={_size(mesh, axis)}'
        )
  return reasons


# Which axis of its kernel (0: I, 1: O) each axis of a stored part follows.
_PARTS: dict[str, tuple[int | None, ...]] = {
  'codes': (0, 1),
  'absmax': (0, 1),
  'nested': (),
  'offset': (),
  'lora_a': (0, None),
  'lora_b': (None, 1),
  'magnitude': (1,),
  'lambda_d': (None,),
  'lambda_b': (1,),
  'squared_norm': (1,),
  'norm': (1,),
}


def _fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
  """Aligns a spec with the last axes, dropping what does not divide."""
  full = [None] * (len(shape) - len(spec)) + list(spec)
  return P(
    *(
      axis if axis and n % _size(mesh, axis) == 0 else None
      for axis, n in zip(full, shape, strict=True)
    )
  )


def _size(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
  """Devices along an axis of the mesh, or along several together."""
  axes = (axis,) if isinstance(axis, str) else axis
  return math.prod(mesh.shape[a] for a in axes)


def _align(tree: Any) -> Any:
  """Codes follow absmax: I is sharded in whole blocks or not at all."""

  def node(leaf: Any) -> Any:
    if not hasattr(leaf, 'codes'):
      return leaf
    return leaf.replace(codes=leaf.absmax)

  return jax.tree.map(node, tree, is_leaf=lambda x: hasattr(x, 'codes'))


def shard(tree: Any, mesh: Mesh, rules: Any = RULES) -> Any:
  """Puts a tree on the mesh; packed leaves learn where to be gathered.

  The result is used like the tree itself. Inside `linear`, one layer's packed
  arrays are brought together over `fsdp` - as four-bit codes - and stay split
  over `tensor`.
  """
  placed = jax.tree.map(put, tree, shardings(tree, mesh, rules))
  return gathering(placed, mesh)


def gathering(placed: Any, mesh: Mesh) -> Any:
  """A tree on the mesh, whose packed leaves learn where to be gathered."""
  if mesh.size == 1:
    return placed  # They are together.

  def node(leaf: Any) -> Any:
    if not hasattr(leaf, 'codes'):
      return leaf
    spec = leaf.codes.sharding.spec[-2:]
    # What gathers over `fsdp` must not lose its split over `tensor`.
    split = mesh.shape['tensor'] > 1
    kept = (axis if axis == 'tensor' and split else None for axis in spec)
    kept = P(*kept)
    return leaf.replace(gathered=NamedSharding(mesh, kept))

  return jax.tree.map(node, placed, is_leaf=lambda x: hasattr(x, 'codes'))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Splits the leading axis of every array over `data` and `fsdp`.

  Of many processes each makes the same batch, and puts its own rows alone.
  """
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(lambda a: put(np.asarray(a), sharding), batch)


def by_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Inside jit: x [B, ...] split by rows alone, as the batch it came from is.

  Told nothing, XLA may split activations by their features instead, as the
  weights they meet are, and then sum partial products over all devices.
  """
  if mesh is None or len(x) % _size(mesh, BATCH[0]):
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def row_parts(rows: int, mesh: Mesh | None) -> int:
  """Parts that a batch of so many rows is split into; 1 if it is not."""
  parts = 1 if mesh is None else _size(mesh, BATCH[0])
  return 1 if rows % parts else parts


def by_rows(
  summed: Callable[[Any, Any], tuple[Any, Any]], mesh: Mesh
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Inside jit: every device sums over its own rows, and the sums meet once.

  Left to itself XLA lets partial sums of a loop meet in each of its turns.

  Args:
    summed: (given, rows) -> (sums, results), of one device's rows.
    mesh: over whose `data` and `fsdp` axes rows are split.

  Returns:
    The same function of all rows: given as it is, rows and results [N, B, ...]
    split by B.
  """

  def of_rows(given: Any, rows: Any) -> tuple[Any, Any]:
    (axes,) = BATCH
    sums, results = summed(jax.lax.pcast(given, axes, to='varying'), rows)
    return jax.lax.psum(sums, axes), results

  split = P(None, *BATCH)
  return jax.shard_map(
    of_rows,
    mesh=mesh,
    axis_names=set(BATCH[0]),
    in_specs=(P(), split),
    out_specs=(P(), split),
  )


def put(array: Any, sharding: NamedSharding) -> jax.Array:
  """Places an array that every process holds; each puts its own part.

  (Left to itself `device_put` has all processes compare the whole array.)
  """
  here = not isinstance(array, jax.Array) or array.is_fully_addressable
  if sharding.is_fully_addressable or not here:
    return jax.device_put(array, sharding)
  whole = np.asarray(array)
  return jax.make_array_from_callback(
    whole.shape, sharding, lambda part: whole[part]
  )


def gather(tree: Any) -> Any:
  """Every array whole, on every host; all processes must ask for it."""

  def whole(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
      return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)

  return jax.tree.map(whole, tree)
