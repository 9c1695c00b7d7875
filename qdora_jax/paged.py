"""Optimizer state that waits in the host's memory, and visits the device.

bitsandbytes keeps its paged state in managed memory, and the driver moves what
is touched. JAX has no demand paging; here the arrays of an optimizer's state
have shardings whose memory kind is `pinned_host`, and the update inside the
jitted step brings them over in pieces of bounded size, each after the one
before, and back (`streaming.py`).

On a GPU a piece crosses PCIe twice in every step; bitsandbytes pays that only
when memory runs out.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdora_jax import streaming
from qdora_jax.sharding import make_mesh, shardings
from qdora_jax.streaming import is_paged

Paged = Literal['none', 'host', 'auto']
HOST = 'pinned_host'


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
  program = streaming.program_of(optimizer.init, trained)
  made = []
  for n, place in enumerate(places):
    number = streaming.constant(program, program.outvars[n])
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
  program = streaming.program_of(update, *given)
  return tree.unflatten(
    streaming.streamed(program, jax.tree.leaves(given), sharding)
  )
