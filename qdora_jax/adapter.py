"""Adapters: what is trained of a kernel, and how it starts.

An adapter tree has the base's paths, with an Adapter at each kernel that is
adapted and a float32 array at whatever is trained in full beside them.
`transforms.attach` puts it on its base.
"""

import functools
import zlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import dora, lora, paths, vera
from qdora_jax.linear import kind, per_layer, squared_norm
from qdora_jax.specs import FRESH, TAKEN, AdapterSpec

Tree = dict[str, Any]


class Adapter(flax.struct.PyTreeNode):
  """The trained arrays of one kernel: the leaves of an adapter tree.

  Attributes:
    lora_a: f32 [..., I, R] or None; R is the largest rank of a stack, smaller
      ones are padded with zeros.
    lora_b: f32 [..., R, O] or None.
    magnitude: f32 [..., O] or None.
    lambda_d: VeRA's d, f32 [..., R], or None.
    lambda_b: VeRA's b, f32 [..., O], or None.
    names: the kernel's name, or one per layer of a stack.
    spec: ranks, scales and options, by name.
  """

  lora_a: jax.Array | None
  lora_b: jax.Array | None
  magnitude: jax.Array | None
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)
  spec: AdapterSpec = flax.struct.field(pytree_node=False)
  lambda_d: jax.Array | None = None
  lambda_b: jax.Array | None = None

  @property
  def ranks(self) -> tuple[int, ...]:
    return tuple(map(self.spec.rank_of, self.names))


def init_adapter(key: jax.Array, base: Tree, spec: AdapterSpec) -> Tree:
  """Makes the adapter tree: at each target an Adapter that changes nothing yet.

  A and B start as spec.init says, the magnitude as the norm of the base as it
  stands (dequantized). Initial values depend on a kernel's name and the
  key alone, not on how layers are stacked.

  Args:
    key: PRNG key.
    base: parameter tree, quantized or not.
    spec: what and how.

  Returns:
    Nested dicts whose leaves are `Adapter`s, with base's paths; and float32
    copies of what spec.trainable matches.

  Raises:
    ValueError: if targets or a pattern match nothing or no kernel, a rank
      exceeds a kernel's smaller side, or spec.init changes the base.
  """
  if spec.init in TAKEN:
    raise ValueError(
      f'init={spec.init!r} takes the adapter out of the weights and changes '
      'the base: only load_pretrained can do that, while it reads them; '
      f'expected one of {FRESH}'
    )
  flat = paths.flatten(base)
  for field in ('rank_pattern', 'alpha_pattern'):
    for pattern, _ in getattr(spec, field):
      paths.select(base, pattern, f'adapter.{field}')
  adapter = {}
  for path in paths.select(base, spec.targets, 'adapter.targets'):
    leaf = flat[path]
    names = tuple(paths.names(path, leaf))
    check_kernel(path, leaf, spec.targets)
    adapter[path] = _init(key, leaf, names, spec)
  if spec.trainable:
    for path, hits in paths.select(
      base, spec.trainable, 'adapter.trainable'
    ).items():
      if path in adapter or not all(hits) or kind(flat[path]).startswith('nf4'):
        raise ValueError(
          f'trainable={spec.trainable!r} matches {path}, which is '
          f'{_why_not(path, adapter, hits, flat[path])}; expected unquantized '
          'parameters beside the adapter, in all layers'
        )
      # A copy: a training step gives away the memory of what it trains.
      adapter[path] = jnp.array(flat[path], jnp.float32, copy=True)
  return paths.unflatten(adapter)


def _why_not(path: str, adapter: Tree, hits: Any, leaf: Any) -> str:
  """Why a parameter cannot be trained in full beside an adapter."""
  if path in adapter:
    return 'adapted already'
  return (
    f'stored as {kind(leaf)}' if all(hits) else 'chosen in some layers only'
  )


def check_kernel(path: str, leaf: Any, targets: str) -> None:
  """A rule's match must be a kernel, with a layer axis if it is stacked."""
  stacked = paths.names(path, leaf) != [path]
  if leaf.ndim != 2 + stacked or path.endswith('embedding'):
    raise ValueError(
      f'targets={targets!r} match {path} of shape {leaf.shape}; expected '
      'kernels [I, O] alone'
    )


def _init(
  key: jax.Array, leaf: Any, names: tuple[str, ...], spec: AdapterSpec
) -> Adapter:
  """The Adapter of one kernel, or of one stack of kernels."""
  *lead, i, o = leaf.shape
  ranks = [spec.rank_of(name) for name in names]
  for name, rank in zip(names, ranks, strict=True):
    if spec.method in ('lora', 'dora') and not 0 <= rank <= min(i, o):
      raise ValueError(
        f'rank {rank} for {name}: expected 1 to {min(i, o)}, the smaller side '
        f'of its kernel {(i, o)}; lower adapter.rank, or set its own in '
        'adapter.rank_pattern (0 leaves it unadapted)'
      )
    if spec.init == 'orthogonal' and rank % 2:
      raise ValueError(
        f"rank {rank} for {name}: init='orthogonal' needs an even one"
      )
  a = b = magnitude = lambda_d = lambda_b = None
  if spec.shared:
    lambda_d = jnp.full((*lead, spec.rank), vera.D_INITIAL, jnp.float32)
    lambda_b = jnp.zeros((*lead, o), jnp.float32)
  if spec.method in ('lora', 'dora'):
    # crc32 and not hash(): the same in every process.
    named = jnp.asarray([zlib.crc32(n.encode()) for n in names], jnp.uint32)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(named)
    a, b = _drawn(keys, spec.init, i, ranks, o)
    a, b = a.reshape(*lead, i, -1), b.reshape(*lead, -1, o)
  if spec.has_magnitude:
    magnitude = dora.root(per_layer(squared_norm, leaf))
  return Adapter(a, b, magnitude, names, spec, lambda_d, lambda_b)


def _drawn(
  keys: jax.Array, init: str, i: int, ranks: list[int], o: int
) -> tuple[jax.Array, jax.Array]:
  """A [N, I, R] and B [N, R, O] of N layers, by `lora.init`, together.

  Layers of one rank are one program, however many they are.
  """
  a = jnp.zeros((len(ranks), i, max(ranks)))
  b = jnp.zeros((len(ranks), max(ranks), o))
  for rank in sorted(set(ranks)):
    here = np.flatnonzero(np.asarray(ranks) == rank)
    draw = functools.partial(lora.init, init=init, i=i, rank=rank, o=o)
    a_here, b_here = jax.vmap(draw)(keys[here])
    a = a.at[here, :, :rank].set(a_here)
    b = b.at[here, :rank].set(b_here)
  return a, b


def stack_ranks(
  pairs: list[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
  """A [N, I, R], B [N, R, O] of N layers, smaller ranks padded with zeros."""
  widest = max(a.shape[1] for a, _ in pairs)
  pad = [widest - a.shape[1] for a, _ in pairs]
  return (
    jnp.stack(
      [
        jnp.pad(a, [(0, 0), (0, n)])
        for (a, _), n in zip(pairs, pad, strict=True)
      ]
    ),
    jnp.stack(
      [
        jnp.pad(b, [(0, n), (0, 0)])
        for (_, b), n in zip(pairs, pad, strict=True)
      ]
    ),
  )
