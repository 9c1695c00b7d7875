"""Pure functions from parameter tree to parameter tree.

`base` is frozen and maybe quantized; `adapter` holds what is trained. They meet
in `attach`, inside the loss, so that differentiation and the optimizer see the
adapter alone:

  base = quantize(params, QuantSpec())
  adapter = init_adapter(key, base, AdapterSpec(method='dora'))
  loss = lambda adapter: f(model.apply({'params': attach(base, adapter)}, x))

QLoRA is LoRA over a quantized base, QDoRA is DoRA over one; no function here
knows whether it is.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import nf4, paths, vera
from qdora_jax.adapter import Adapter, check_kernel
from qdora_jax.dora import DoraWeight
from qdora_jax.linear import kind, materialize, per_layer, squared_norm
from qdora_jax.linear import norm as norm_of
from qdora_jax.lora import LoraWeight
from qdora_jax.specs import QuantSpec

Tree = dict[str, Any]


def quantize(params: Tree, spec: QuantSpec) -> Tree:
  """Turns the kernels that spec.targets matches into NF4Arrays.

  Args:
    params: nested dicts of arrays [..., I, O].
    spec: what and how.

  Returns:
    A tree of the same paths. Kernels whose in axis the block size does not
    divide are returned as they are (see `unquantized`).

  Raises:
    ValueError: if targets match nothing, only some layers of a stack, or
      something that is already quantized.

  Example:
    >>> base = quantize(params, QuantSpec(double_quant=False))
  """
  flat = paths.flatten(params)
  skipped = unquantized(params, spec)
  for path, hits in paths.select(params, spec.targets, 'quant.targets').items():
    check_kernel(path, flat[path], spec.targets)
    if path in skipped:
      continue
    if not all(hits):
      missed = paths.names(path, flat[path])[hits.index(False)]
      raise ValueError(
        f'targets={spec.targets!r} match some layers of {path} but not '
        f'{missed}; the layers of a stack are quantized together'
      )
    if kind(flat[path]).startswith('nf4'):
      raise ValueError(f'{path} is already quantized: {kind(flat[path])}')
    flat[path] = _quantize(flat[path], spec.block_size, spec.double_quant)
  return paths.unflatten(flat)


_quantize = jax.jit(nf4.quantize, static_argnums=(1, 2))


def unquantized(params: Tree, spec: QuantSpec) -> dict[str, str]:
  """{path: reason} of the targets that `quantize` leaves in full precision."""
  flat = paths.flatten(params)
  chosen = paths.select(params, spec.targets, 'quant.targets')
  reasons = {}
  for path in chosen:
    try:
      nf4.check(flat[path].shape, flat[path].dtype, spec.block_size)
    except ValueError as error:
      reasons[path] = str(error)
  if len(reasons) == len(chosen):
    path, why = next(iter(reasons.items()))
    raise ValueError(
      f'nothing that targets={spec.targets!r} match can be quantized: {path}: '
      f'{why}; {len(reasons) - 1} more like it. Set another quant.block_size'
    )
  return reasons


def norms(base: Tree, adapter: Tree | None = None) -> Tree:
  """Squared norms of the base per output feature, computed once.

  Args:
    base: parameter tree.
    adapter: restricts the answer to the kernels it trains a magnitude of; else
      every 'kernel' has one.

  Returns:
    Nested dicts with a `squared_norm`, f32 [..., O], at each kernel's path;
    pass it to `attach` and keep it in neither tree.
  """
  flat = paths.flatten(base)
  if adapter is not None:
    wanted = _with_magnitude(adapter)
  else:
    wanted = [path for path in flat if path.split('/')[-1] == 'kernel']
  return paths.unflatten(
    {
      f'{path}/squared_norm': per_layer(squared_norm, flat[path])
      for path in wanted
    }
  )


def _with_magnitude(adapter: Tree) -> list[str]:
  """Paths of the kernels whose magnitude is trained."""
  return [
    path
    for path, node in paths.flatten(adapter).items()
    if isinstance(node, Adapter) and node.magnitude is not None
  ]


def adapted_norms(base: Tree, adapter: Tree, norms: Tree | None = None) -> Tree:
  """||V|| of every DoRA kernel at the adapter's present values.

  The detached norm depends on the adapter alone, so one call serves all
  microbatches of an optimizer step, and all tokens of a generation.

  Returns:
    Nested dicts with a `norm`, f32 [..., O], held constant, at each kernel's
    path; pass it to `attach`, and DoRA computes no norm at all.
  """
  flat = paths.flatten(attach(base, adapter, norms=norms))
  return paths.unflatten(
    {
      f'{path}/norm': jax.lax.stop_gradient(per_layer(norm_of, flat[path]))
      for path in _with_magnitude(adapter)
    }
  )


def attach(
  base: Tree,
  adapter: Tree,
  *,
  norms: Tree | None = None,
  dropout_key: jax.Array | None = None,
) -> Tree:
  """Puts an adapter on its base: the tree a model is applied to.

  Cheap and pure; call it inside the loss. A leaf of `adapter` that is a plain
  array (a trained norm, a head) takes the place of the base's; full fine-tuning
  is an empty base under the whole tree.

  Args:
    base: frozen parameter tree, quantized or not.
    adapter: what `init_adapter` made.
    norms: what `norms(base)` or `adapted_norms(base, adapter)` gave; without
      it DoRA computes ||W||^2 at every use.
    dropout_key: PRNG key; switches adapter dropout on.

  Returns:
    base's tree with LoraWeights and DoraWeights at the adapted paths.

  Raises:
    ValueError: if the adapter has a path that the base has not, or shapes that
      do not fit.
  """
  flat = paths.flatten(base)
  known = paths.flatten(norms) if norms is not None else {}
  shared = _shared(adapter, flat)
  for path, node in paths.flatten(adapter).items():
    if not isinstance(node, Adapter):
      if base and (path not in flat or flat[path].shape != node.shape):
        has = flat[path].shape if path in flat else paths.near(path, flat)
        raise ValueError(
          f'{path} of shape {node.shape} takes the place of nothing in the '
          f'base, which has {has}'
        )
      flat[path] = node
      continue
    if path not in flat:
      raise ValueError(
        f'the adapter has {path}, the base has not; it has '
        f'{", ".join(paths.near(path, flat))}'
      )
    _check_fit(path, node, flat[path])
    keys = None
    if dropout_key is not None and node.spec.dropout:
      keys = jax.random.fold_in(dropout_key, zlib.crc32(path.encode()))
      if flat[path].ndim > 2:
        keys = jax.random.split(keys, flat[path].shape[0])
    here = {
      part: known[f'{path}/{part}']
      for part in ('squared_norm', 'norm')
      if f'{path}/{part}' in known
    }
    if node.lambda_d is not None:
      pair = vera.pair(
        shared, node.lambda_d, node.lambda_b, flat[path].shape[-2]
      )
      node = node.replace(lora_a=pair[0], lora_b=pair[1])
    flat[path] = _weight(node, flat[path], here, keys)
  return paths.unflatten(flat)


def _shared(adapter: Tree, base: Tree) -> tuple[jax.Array, jax.Array] | None:
  """VeRA's A and B, of the size of the largest kernel adapted; None without."""
  nodes = {
    path: node
    for path, node in paths.flatten(adapter).items()
    if isinstance(node, Adapter) and node.lambda_d is not None
  }
  shapes = [base[path].shape for path in nodes if path in base]
  if not shapes:
    return None
  spec = next(iter(nodes.values())).spec
  i, o = (max(shape[axis] for shape in shapes) for axis in (-2, -1))
  return vera.projections(spec.projection_seed, i, spec.rank, o)


def _weight(
  node: Adapter, base: Any, norms: dict[str, jax.Array], keys: Any
) -> LoraWeight | DoraWeight:
  """The leaf that an Adapter and its base make."""
  spec = node.spec
  scales = np.array([spec.scale_of(n) for n in node.names], np.float32)
  scale = jnp.asarray(scales if base.ndim > 2 else scales[0])
  ab = (node.lora_a, node.lora_b)
  if node.magnitude is None:
    return LoraWeight(base, *ab, scale, keys, spec.dropout)
  return DoraWeight(
    base,
    *ab,
    node.magnitude,
    scale,
    dropout_key=keys,
    dropout=spec.dropout,
    factored=spec.factored,
    detach=spec.detach,
    **norms,
  )


def _check_fit(path: str, node: Adapter, base: Any) -> None:
  *lead, i, o = base.shape
  have = {
    'lora_a': (node.lora_a, (*lead, i)),
    'lora_b': (node.lora_b, (*lead, o)),
    'magnitude': (node.magnitude, (*lead, o)),
    'lambda_d': (node.lambda_d, (*lead, node.spec.rank)),
    'lambda_b': (node.lambda_b, (*lead, o)),
  }
  for name, (array, expected) in have.items():
    if array is None:
      continue
    shape = tuple(array.shape)
    rank = {'lora_a': -1, 'lora_b': -2}
    if name in rank:
      shape = tuple(np.delete(shape, rank[name]).tolist())
    if shape != expected:
      raise ValueError(
        f'{path}: {name} {tuple(array.shape)} does not fit the base '
        f'{tuple(base.shape)}; is the adapter of another model?'
      )


def freeze(base: Tree, adapter: Tree) -> Tree:
  """`attach` for inference: DoRA's norms are computed here, once and for all.

  Decoding then costs what LoRA costs, over any base and without a copy of it.
  """
  return attach(base, adapter, norms=_adapted_norms(base, adapter))


_adapted_norms = jax.jit(adapted_norms)


def merge(base: Tree, adapter: Tree) -> Tree:
  """The tree of plain arrays that base and adapter stand for, [..., I, O]."""
  flat = paths.flatten(attach(base, adapter))
  return paths.unflatten({path: materialize(w) for path, w in flat.items()})
