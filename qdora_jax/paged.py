"""Optimizer state that waits in the host's memory, and visits the device.

bitsandbytes keeps its paged state in managed memory, and the driver moves what
is touched. JAX has no demand paging; here the arrays of an optimizer's state
have shardings whose memory kind is `pinned_host`, and the update inside the
jitted step brings them over in pieces of bounded size, each after the one
before, and back.

Which pieces there can be is read from the update itself. It is traced to a
jaxpr, and followed backward from every new array: an array and the moments that
it is made of are one piece, whatever the optimizer, its masks and its rates by
name are. What needs no state from the host (the norm that is clipped, the
schedule, the corrections by step) is computed once for all of them. A piece
larger than `PIECE` is cut along its leading axis, the layers of a stack, and
looped over, if its part of the jaxpr treats every index of that axis alike and
the axis is not split over devices. An update that mixes all state (few do) is
one piece, and one that mixes its axes (Muon) a piece for each array.
Nothing is computed otherwise than without paging: updates are the same bits.
(With rates that differ by layer, and only in arrays that are cut, XLA may round
the last bit of a product otherwise: seen on JAX 0.12, not on 0.10.)

On a GPU a piece crosses PCIe twice in every step; bitsandbytes pays that only
when memory runs out.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from qdora_jax.sharding import make_mesh, shardings

Paged = Literal['none', 'host', 'auto']
HOST = 'pinned_host'
# Bytes of one piece on one device. One layer's moments of the largest kernel of
# an 8B model (4096 x 14336, float32, twice) are 448 MiB.
PIECE = 2**29
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def choose(
  leaves: Sequence[jax.ShapeDtypeStruct],
  places: Sequence[jax.sharding.Sharding],
  paged: Paged,
  room: int | None = None,
) -> list[jax.sharding.Sharding]:
  """Where arrays of an optimizer's state are to lie.

  Args:
    leaves: the state's arrays, or their shapes.
    places: their shardings.
    paged: 'none'; 'host' for everything but numbers, such as counts; 'auto'
      for the largest arrays, until the others fit into room.
    room: bytes that are left for this state on each device; None if that is
      not known: then 'auto' pages nothing.

  Returns:
    The shardings, some of them in the host's memory.
  """
  sizes = [_bytes(a, s) for a, s in zip(leaves, places, strict=True)]
  largest = sorted(range(len(leaves)), key=lambda n: -sizes[n])
  away = {n for n in largest if leaves[n].ndim} if paged == 'host' else set()
  if paged == 'auto' and room is not None:
    left = sum(sizes)
    for n in largest:
      if left > room and leaves[n].ndim:
        away.add(n)
        left -= sizes[n]
  return [_hosted(s) if n in away else s for n, s in enumerate(places)]


def _hosted(sharding: jax.sharding.Sharding) -> jax.sharding.NamedSharding:
  """The same place, in the host's memory."""
  if not isinstance(sharding, jax.sharding.NamedSharding):
    # JAX forgets the memory of what jit returns on a SingleDeviceSharding.
    mesh = make_mesh(devices=list(sharding.device_set))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return sharding.with_memory_kind(HOST)


def _bytes(array: Any, sharding: jax.sharding.Sharding) -> int:
  """Of one device's shard."""
  return math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize


def is_paged(array: Any) -> bool:
  """Whether an array, or a traced one, lies in the host's memory."""
  return jax.typeof(array).memory_space == _HOST


def initial(
  optimizer: optax.GradientTransformation,
  trained: Any,
  mesh: jax.sharding.Mesh | None = None,
  paged: Paged = 'none',
  room: int | None = None,
) -> Any:
  """`optimizer.init(trained)` on the mesh, each array where `choose` puts it.

  What is constant, as moments at their start are, is made where it will lie;
  the rest one array after the other: the state is never whole on a device.
  """
  if paged == 'none' and mesh is None:
    return _own(optimizer.init(trained), trained)
  shapes = jax.eval_shape(optimizer.init, trained)
  if mesh is None:
    here = jax.tree.leaves(trained)[0].sharding
    placed = jax.tree.map(lambda _: here, shapes)
  else:
    placed = shardings(shapes, mesh)
  if paged == 'none':
    made = jax.jit(optimizer.init, out_shardings=placed)(trained)
    return _own(made, trained)
  leaves, tree = jax.tree.flatten(shapes)
  places = choose(leaves, jax.tree.leaves(placed), paged, room)
  program = _program(optimizer.init, trained)
  made = []
  for n, place in enumerate(places):
    number = _constant(program, program.outvars[n])
    if number is None:
      one = jax.jit(
        lambda t, n=n: jax.tree.leaves(optimizer.init(t))[n],
        out_shardings=place,
      )
      made.append(_own(one(trained), trained))
    else:
      made.append(_filled(leaves[n], number, place))
  return tree.unflatten(made)


def _own(state: Any, trained: Any) -> Any:
  """Copies what is trained's own array: a step gives both away."""
  theirs = {id(a) for a in jax.tree.leaves(trained)}
  return jax.tree.map(lambda a: jnp.copy(a) if id(a) in theirs else a, state)


def _filled(aval: Any, number: Any, sharding: Any) -> jax.Array:
  """An array of one number, each shard made where it will lie."""
  part = np.full(sharding.shard_shape(aval.shape), number, aval.dtype)
  one = functools.partial(
    jax.sharding.SingleDeviceSharding, memory_kind=sharding.memory_kind
  )
  return jax.make_array_from_single_device_arrays(
    aval.shape,
    sharding,
    [jax.device_put(part, one(d)) for d in sharding.addressable_devices],
  )


def move(
  optimizer: optax.GradientTransformation,
  trained: Any,
  grads: Any,
  state: Any,
  finite: jax.Array,
  value: jax.Array,
  sharding: Sequence[jax.sharding.Sharding] | None = None,
) -> tuple[Any, Any]:
  """(trained, state) after an update; as they were if it is not finite.

  Args:
    optimizer: any of optax.
    trained: the tree that is trained.
    grads: of the same structure.
    state: of the optimizer; what of it lies in the host's memory is streamed.
    finite: bool [], whether anything moves.
    value: f32 [], the loss, for optimizers that look at it.
    sharding: of trained and state's leaves, on a mesh: an axis that is split
      over devices is not cut into pieces.
  """

  def update(trained: Any, state: Any, grads: Any, *rest: Any) -> Any:
    finite, value = rest
    updates, new = optimizer.update(grads, state, trained, value=value)
    return jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (optax.apply_updates(trained, updates), new),
      (trained, state),
    )

  given = (trained, state, grads, finite, value)
  leaves, tree = jax.tree.flatten((trained, state))
  if not any(map(is_paged, leaves)):
    return update(*given)
  program = _program(update, *given)
  return tree.unflatten(_streamed(program, jax.tree.leaves(given), sharding))


class _Program(NamedTuple):
  """A jaxpr without calls: equations, and constants beside them."""

  eqns: list[Any]
  invars: list[Any]
  outvars: list[Any]
  consts: dict[Any, Any]


def _program(function: Any, *trees: Any) -> _Program:
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), trees)
  closed = jax.make_jaxpr(function)(*shapes)
  flat = functools.partial(_inlined, closed.jaxpr, closed.consts)
  closed = jax.make_jaxpr(flat)(*closed.in_avals)
  jaxpr = closed.jaxpr
  consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  return _Program(jaxpr.eqns, jaxpr.invars, jaxpr.outvars, consts)


# Calls are looked into; loops and branches are one operation each.
_CALLS = {'pjit': 'jaxpr', 'jit': 'jaxpr', 'closed_call': 'call_jaxpr'}
_CALLS |= {'custom_jvp_call': 'call_jaxpr', 'custom_vjp_call': 'call_jaxpr'}


def _inlined(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
  names, values = [*jaxpr.constvars, *jaxpr.invars], [*consts, *args]
  env = dict(zip(names, values, strict=True))
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in _CALLS:
      inner = eqn.params[_CALLS[eqn.primitive.name]]
      values = [_read(env, v) for v in eqn.invars]
      found = _inlined(inner.jaxpr, inner.consts, *values)
      env.update(zip(eqn.outvars, found, strict=True))
    else:
      _run(eqn, env)
  return [_read(env, v) for v in jaxpr.outvars]


def _read(env: dict[Any, Any], var: Any) -> Any:
  return var.val if isinstance(var, core.Literal) else env[var]


def _vars(atoms: Iterable[Any]) -> set[Any]:
  return {v for v in atoms if not isinstance(v, core.Literal)}


def _constant(program: _Program, var: Any) -> Any:
  """The number an array is filled with, None if it is not one number."""
  if isinstance(var, core.Literal):
    return var.val
  for eqn in program.eqns:
    if var in eqn.outvars:
      if eqn.primitive.name != 'broadcast_in_dim' or eqn.invars[0].aval.shape:
        return None
      return _constant(program, eqn.invars[0])
  return None


def _streamed(
  program: _Program, leaves: Sequence[Any], sharding: Any
) -> list[Any]:
  """The program's results, piece by piece."""
  count = len(program.outvars)
  away = {n for n in range(count) if is_paged(leaves[n])}
  env = dict(zip(program.invars, leaves, strict=True)) | program.consts
  needs = _needs(program, away)
  results: list[Any] = [None] * count
  pieces = _pieces(program, needs, count)
  together = {n for outs in pieces for n in outs}
  rest = [n for n in range(count) if n not in together]
  # What every piece shares is computed before the first, and only once.
  numbers = {
    v
    for eqn in program.eqns
    for v in eqn.outvars
    if not v.aval.shape and not needs[v]
  }
  _evaluate(program, env, numbers | _vars(program.outvars[n] for n in rest))
  for n in rest:
    results[n] = _read(env, program.outvars[n])
  before: Sequence[Any] = ()
  for piece in pieces:
    ins = [program.invars[n] for n in piece]
    outs = [program.outvars[n] for n in piece]
    # Not before the piece before is done.
    old, before = jax.lax.optimization_barrier(
      ([leaves[n] for n in piece], before)
    )
    split = _cut(program, needs, piece, leaves, sharding)
    if split is None:
      here = [jax.device_put(a, _DEVICE) if is_paged(a) else a for a in old]
      own = env | dict(zip(ins, here, strict=True))
      _evaluate(program, own, _vars(outs))
      before = [_read(own, v) for v in outs]
      new = [
        jax.device_put(array, _HOST) if n in away else array
        for n, array in zip(piece, before, strict=True)
      ]
    else:
      _evaluate(program, env, split.whole)
      before = new = _looped(env, split, ins, outs, old)
    for n, array in zip(piece, new, strict=True):
      results[n] = array
  return results


def _needs(program: _Program, away: set[int]) -> dict[Any, frozenset[int]]:
  """Which inputs from the host each variable is made of."""
  needs = {v: frozenset({n} & away) for n, v in enumerate(program.invars)}
  needs |= dict.fromkeys(program.consts, frozenset())
  for eqn in program.eqns:
    found = frozenset().union(*(needs[v] for v in _vars(eqn.invars)))
    needs |= dict.fromkeys(eqn.outvars, found)
  return needs


def _pieces(
  program: _Program, needs: dict[Any, frozenset[int]], count: int
) -> list[list[int]]:
  """Results that share what they need from the host, as sets of numbers."""
  pieces: list[tuple[set[int], set[int]]] = []
  for n in range(count):
    found = set().union(*(needs[v] for v in _vars([program.outvars[n]])))
    if not found:
      continue
    outs = {n}
    for other in [p for p in pieces if p[0] & found]:
      pieces.remove(other)
      found, outs = found | other[0], outs | other[1]
    pieces.append((found, outs))
  return [sorted(found | outs) for found, outs in pieces]


def _evaluate(program: _Program, env: dict[Any, Any], wanted: set[Any]) -> None:
  """Adds what is wanted to env, and what that needs."""
  wanted, needed = set(wanted), []
  for eqn in reversed(program.eqns):
    if wanted & set(eqn.outvars) and not env.keys() >= set(eqn.outvars):
      needed.append(eqn)
      wanted |= _vars(eqn.invars)
  for eqn in reversed(needed):
    _run(eqn, env)


class _Split(NamedTuple):
  """How a piece is cut.

  Attributes:
    rows: of its arrays.
    size: rows at a time.
    eqns: run on the rows at hand.
    given: variables of which these need the rows at hand.
    whole: variables that are computed before, for all rows.
  """

  rows: int
  size: int
  eqns: list[Any]
  given: set[Any]
  whole: set[Any]


def _cut(
  program: _Program,
  needs: dict[Any, frozenset[int]],
  outs: Sequence[int],
  leaves: Sequence[Any],
  sharding: Sequence[jax.sharding.Sharding] | None,
) -> _Split | None:
  """Cuts a piece that is too large; None if it is not, or cannot be cut."""
  arrays = [leaves[n] for n in outs]
  shards = [a.shape for a in arrays]
  if sharding is not None:
    shards = [sharding[n].shard_shape(leaves[n].shape) for n in outs]
  moved = sum(
    math.prod(shape) * array.dtype.itemsize
    for shape, array in zip(shards, arrays, strict=True)
    if is_paged(array)
  )
  heads = {a.shape[:1] for a in arrays} | {shape[:1] for shape in shards}
  if moved <= PIECE or len(heads) > 1 or heads & {(), (1,)}:
    return None
  ((rows,),) = heads
  sliced = _vars(program.outvars[n] for n in outs)
  beside: set[Any] = set()  # What the rows at hand need of all rows.
  whole: set[Any] = set()
  eqns: list[Any] = []
  for eqn in reversed(program.eqns):
    made = set(eqn.outvars)
    if made & sliced:
      along = _along(eqn, rows)
      if along is None:
        whole |= made
      else:
        eqns.append(eqn)
        for var, cut in zip(eqn.invars, along, strict=True):
          (sliced if cut else beside).update(_vars([var]))
    if made & (whole | beside):
      whole |= _vars(eqn.invars)
  if beside & sliced or any(needs[v] for v in whole | beside):
    return None
  given = sliced - {v for eqn in eqns for v in eqn.outvars}
  size = max(1, rows * PIECE // moved)
  return _Split(rows, size, eqns[::-1], given, beside | (given & whole))


def _looped(
  env: dict[Any, Any],
  split: _Split,
  ins: Sequence[Any],
  outs: Sequence[Any],
  arrays: Sequence[Any],
) -> list[Any]:
  """New arrays of a piece, a few rows at a time, each in its own place."""

  def part(array: Any, start: Any, size: int) -> Any:
    rows = jax.lax.dynamic_slice_in_dim(array, start, size)
    return jax.device_put(rows, _DEVICE) if is_paged(array) else rows

  def put(array: Any, rows: Any, start: Any) -> Any:
    rows = jax.device_put(rows, _HOST) if is_paged(array) else rows
    return jax.lax.dynamic_update_slice_in_dim(array, rows, start, 0)

  def move(start: Any, arrays: Sequence[Any], size: int) -> list[Any]:
    now = env | dict(zip(ins, arrays, strict=True))
    local = now | {v: part(now[v], start, size) for v in split.given}
    for eqn in split.eqns:
      _run(eqn, local, size)
    return [
      put(array, _read(local, out), start)
      for array, out in zip(arrays, outs, strict=True)
    ]

  times, left = divmod(split.rows, split.size)
  arrays = jax.lax.fori_loop(
    0, times, lambda n, a: move(n * split.size, a, split.size), list(arrays)
  )
  return move(times * split.size, arrays, left) if left else arrays


# Operations on one number of each operand, and of the same place.
_EACH = frozenset(
  re.findall(
    r'\w+',
    'abs add add_any and cbrt ceil clamp convert_element_type copy copy_p '
    'cos div eq erf erf_inv exp exp2 expm1 floor ge gt integer_pow '
    'is_finite le log log1p logistic lt max min mul ne neg nextafter not or '
    'pow reduce_precision rem round rsqrt select_n shift_left '
    'shift_right_arithmetic shift_right_logical sign sin sqrt square '
    'stop_gradient sub tan tanh xor ',
  )
)
_REDUCED = ('reduce_and', 'reduce_max', 'reduce_min', 'reduce_or', 'reduce_sum')
_REDUCED += ('argmax', 'argmin')


def _along(eqn: Any, rows: int) -> list[bool] | None:
  """Which operands to cut for some rows of the result; None if it cannot be."""
  name, params = eqn.primitive.name, eqn.params
  shapes = [v.aval.shape for v in eqn.invars]
  results = {v.aval.shape for v in eqn.outvars}
  if len(results) > 1 or not all(s[:1] == (rows,) for s in results):
    return None
  if name in _EACH:
    # Of the result's shape, or stretched along axes of size 1, or numbers.
    return [shape[:1] == (rows,) for shape in shapes]
  if name == 'broadcast_in_dim' and len(shapes) == 1:
    first = params['broadcast_dimensions'][:1] == (0,)
    return [first and shapes[0][0] == rows]
  if name == 'reshape' and shapes[0][:1] == (rows,):
    return [True]
  if name in _REDUCED and 0 not in params['axes']:
    return [True]
  if name == 'pad' and params['padding_config'][0] == (0, 0, 0):
    return [True, False]
  if name == 'slice' and shapes[0][:1] == (rows,):
    return [True] if params['strides'] is None else None
  if name == 'gather' and shapes[1][:1] == (rows,):
    dims = params['dimension_numbers']
    if 0 not in dims.offset_dims and not dims.operand_batching_dims:
      return [False, True]
  return None


# Where an operation's parameters hold the shape of its result.
_SIZED = {
  'broadcast_in_dim': 'shape',
  'reshape': 'new_sizes',
  'slice': 'limit_indices',
}


def _run(eqn: Any, env: dict[Any, Any], rows: int | None = None) -> None:
  """Adds an equation's results to env, or so many rows of them."""
  params = dict(eqn.params)
  if rows is not None and eqn.primitive.name in _SIZED:
    key = _SIZED[eqn.primitive.name]
    params[key] = (rows, *params[key][1:])
  params = eqn.primitive.get_bind_params(params)
  values = [_read(env, v) for v in eqn.invars]
  found = eqn.primitive.bind(*values, **params)
  found = found if eqn.primitive.multiple_results else [found]
  env.update(zip(eqn.outvars, found, strict=True))
