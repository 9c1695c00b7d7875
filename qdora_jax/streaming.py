"""An update computed a piece at a time, its state brought over for each.

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
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Bytes of one piece on one device. One layer's moments of the largest kernel of
# an 8B model (4096 x 14336, float32, twice) are 448 MiB.
PIECE = 2**29
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def is_paged(array: Any) -> bool:
  """Whether an array, or a traced one, lies in the host's memory."""
  return jax.typeof(array).memory_space == _HOST


class Program(NamedTuple):
  """A jaxpr without calls: equations, and constants beside them."""

  eqns: list[Any]
  invars: list[Any]
  outvars: list[Any]
  consts: dict[Any, Any]


def program_of(function: Any, *trees: Any) -> Program:
  """A function traced for trees of such shapes, its calls looked into."""
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), trees)
  closed = jax.make_jaxpr(function)(*shapes)
  flat = functools.partial(_inlined, closed.jaxpr, closed.consts)
  closed = jax.make_jaxpr(flat)(*closed.in_avals)
  jaxpr = closed.jaxpr
  consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  return Program(jaxpr.eqns, jaxpr.invars, jaxpr.outvars, consts)


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


def constant(program: Program, var: Any) -> Any:
  """The number an array is filled with, None if it is not one number."""
  if isinstance(var, core.Literal):
    return var.val
  for eqn in program.eqns:
    if var in eqn.outvars:
      if eqn.primitive.name != 'broadcast_in_dim' or eqn.invars[0].aval.shape:
        return None
      return constant(program, eqn.invars[0])
  return None


def streamed(
  program: Program, leaves: Sequence[Any], sharding: Any
) -> list[Any]:
  """The program's results, piece by piece.

  Args:
    program: of which result n is what becomes of argument n.
    leaves: its arguments; some lie in the host's memory, and stay there.
    sharding: of the results, on a mesh; None without.
  """
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


def _needs(program: Program, away: set[int]) -> dict[Any, frozenset[int]]:
  """Which inputs from the host each variable is made of."""
  needs = {v: frozenset({n} & away) for n, v in enumerate(program.invars)}
  needs |= dict.fromkeys(program.consts, frozenset())
  for eqn in program.eqns:
    found = frozenset().union(*(needs[v] for v in _vars(eqn.invars)))
    needs |= dict.fromkeys(eqn.outvars, found)
  return needs


def _pieces(
  program: Program, needs: dict[Any, frozenset[int]], count: int
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


def _evaluate(program: Program, env: dict[Any, Any], wanted: set[Any]) -> None:
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
  program: Program,
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
