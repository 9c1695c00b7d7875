"""From host arrays to where a parameter lives, a layer at a time.

A stack of layers is made on the devices: an empty array of its final shape and
sharding, into which each layer is written in place. So the host holds one layer
of one kernel at a time, and a process only its own devices' part of it: `part`
says which part of a tensor that is, before it is read.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qdora_jax import nf4, sharding
from qdora_jax.interop.hf import Part
from qdora_jax.nf4 import NF4Array


class Placement:
  """Where one parameter lives.

  Attributes:
    part: the slices of one layer's tensor that this process's devices hold, in
      our axis order: (I, O) of a kernel.
    whole: all of the tensor.
  """

  def __init__(
    self, path: str, form: Any, mesh: Mesh | None, stacked: bool
  ) -> None:
    """Finds the place.

    Args:
      path: of the parameter, for the mesh's rules.
      form: the leaf in abstract arrays, layers included.
      mesh: from `make_mesh`; None for the default device.
      stacked: whether the leaf is a stack of layers.
    """
    self._form, self._mesh, self._stacked = form, mesh, stacked
    shape = form.shape[1:] if stacked else form.shape
    self.whole: Part = tuple(slice(0, n) for n in shape)
    self.part, self._stacks, self._layers = self.whole, form, form
    if mesh is None:
      return
    self._stacks = sharding.shardings({path: form}, mesh)[path]
    self._layers = self._stacks
    if stacked:
      self._layers = jax.tree.map(
        lambda where: NamedSharding(mesh, P(*where.spec[1:])), self._stacks
      )
    # A packed kernel is cut between the blocks that share a scale.
    unit = getattr(form, 'absmax', form)
    sizes = unit.shape[1:] if stacked else unit.shape
    box = _box(getattr(self._layers, 'absmax', self._layers), sizes)
    self.part = tuple(
      slice(s.start * n // size, s.stop * n // size)
      for s, n, size in zip(box, shape, sizes, strict=True)
    )

  def single(self, host: Any, part: Part) -> Any:
    """A leaf that is no stack, on its devices.

    Args:
      host: host arrays of a part of it, as `store` gives them.
      part: which part: `self.part`, or `self.whole`.
    """
    return self._done(self._put(host, part))

  def stack(self, hosts: Iterator[Any], part: Part) -> Any:
    """A stack of layers on its devices, written one after the other."""
    forms = tuple((a.shape, a.dtype) for a in jax.tree.leaves(self._form))
    alone = self._mesh is None
    blank, write = _programs(
      forms, None if alone else tuple(jax.tree.leaves(self._stacks))
    )
    arrays = blank()
    for n, host in enumerate(hosts):
      layer = jax.tree.leaves(self._put(host, part))
      arrays = write(arrays, layer, np.int32(n))
    return self._done(
      jax.tree.unflatten(jax.tree.structure(self._form), arrays)
    )

  def _done(self, leaf: Any) -> Any:
    return leaf if self._mesh is None else sharding.gathering(leaf, self._mesh)

  def _put(self, host: Any, part: Part) -> Any:
    """One layer, or a leaf without any, on the devices."""
    if getattr(self._form, 'nested', None) is not None:
      host = self._compressed(host, part)
    form, host = jax.tree.leaves(self._form), jax.tree.leaves(host)
    layers = jax.tree.leaves(self._layers)
    kernel = tuple(s.stop for s in self.whole)
    arrays = []
    for array, like, where in zip(host, form, layers, strict=True):
      shape = like.shape[1:] if self._stacked else like.shape
      start = (0,) * len(shape)
      # Nested scales are of the whole tensor, whatever part was read.
      if array.shape != shape:
        start = tuple(
          s.start * n // k for s, n, k in zip(part, shape, kernel, strict=True)
        )
      if self._mesh is None:
        arrays.append(jnp.asarray(array, like.dtype))
      else:
        arrays.append(_place(array, start, like.dtype, shape, where))
    return jax.tree.unflatten(jax.tree.structure(self._form), arrays)

  def _compressed(self, q: NF4Array, part: Part) -> NF4Array:
    """With absmax in 8 bits, which needs the scales of the whole tensor."""
    if q.nested is not None:
      return q
    if part != self.whole:
      blocks = self._layers.absmax
      ib, o = self._form.absmax.shape[-2:]
      start = (part[0].start // q.block_size, part[1].start)
      mine = _place(q.absmax, start, np.float32, (ib, o), blocks)
      q = q.replace(absmax=sharding.gather(mine))
    return nf4.compress_host(q)


def _box(where: Any, shape: tuple[int, ...]) -> Part:
  """The smallest part that holds what this process's devices hold."""
  held = where.addressable_devices_indices_map(shape).values()
  return tuple(
    slice(
      min(index[axis].indices(size)[0] for index in held),
      max(index[axis].indices(size)[1] for index in held),
    )
    for axis, size in enumerate(shape)
  )


def _place(
  array: np.ndarray,
  start: tuple[int, ...],
  dtype: Any,
  shape: tuple[int, ...],
  where: Any,
) -> jax.Array:
  """An array of which the host has what begins at `start`."""

  def local(index: Part) -> np.ndarray:
    inside = tuple(
      slice(begin - first, end - first)
      for (begin, end, _), first in zip(
        (s.indices(n) for s, n in zip(index, shape, strict=True)),
        start,
        strict=True,
      )
    )
    return np.asarray(array[inside], dtype)

  return jax.make_array_from_callback(shape, where, local)


@functools.cache
def _programs(
  forms: tuple[Any, ...], shardings: tuple[Any, ...] | None
) -> tuple[Any, Any]:
  """(makes an empty stack, writes layer n into one in place)."""
  where = None if shardings is None else [*shardings]
  blank = jax.jit(
    lambda: [jnp.zeros(*form) for form in forms], out_shardings=where
  )

  def write(stack: list[Any], layer: list[Any], n: Any) -> list[Any]:
    update = jax.lax.dynamic_update_index_in_dim
    return [update(s, a, n, 0) for s, a in zip(stack, layer, strict=True)]

  return blank, jax.jit(write, donate_argnums=0, out_shardings=where)
