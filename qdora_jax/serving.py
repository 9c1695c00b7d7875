"""Several adapters on one base, in one batch.

Switching adapters is `attach` with another tree: the base is never copied. Here
rows of one batch go through adapters of their own, and the base is multiplied
once for all of them.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qdora_jax import dora, paths
from qdora_jax.adapter import Adapter
from qdora_jax.several import SeveralWeight
from qdora_jax.transforms import freeze

Tree = dict[str, Any]


def attach_several(base: Tree, adapters: Sequence[Tree], rows: Any) -> Tree:
  """The tree in which every row of a batch goes through an adapter of its own.

  For inference; DoRA's norms are computed here, once.

  Args:
    base: frozen parameter tree, quantized or not.
    adapters: LoRA, DoRA or magnitude-only trees, of any ranks and targets.
    rows: int [B], which adapter each row of the batch goes through.

  Returns:
    base's tree with SeveralWeights where any of the adapters has a kernel.

  Raises:
    ValueError: if an adapter does not fit the base, or trains more than kernels
      (a norm, a head), which cannot differ by row; if a row names no adapter.

  Example:
    >>> params = attach_several(base, [maths, poems], jnp.array([0, 1, 1]))
    >>> logits = model.apply({'params': params}, tokens_3xL)
  """
  rows = np.asarray(rows)
  fits = rows.ndim == 1 and rows.size and np.issubdtype(rows.dtype, np.integer)
  if not fits or rows.min() < 0 or rows.max() >= len(adapters):
    raise ValueError(
      f'rows={rows.tolist()}: expected one of 0 to {len(adapters) - 1} for '
      'each row of the batch'
    )
  nodes = [paths.flatten(adapter) for adapter in adapters]
  for path, node in (pair for flat in nodes for pair in flat.items()):
    if not isinstance(node, Adapter):
      raise ValueError(
        f'{path} is trained in full: rows of one batch share it. Merge it into '
        'the base, or give each adapter its own batch'
      )
  frozen = [paths.flatten(freeze(base, adapter)) for adapter in adapters]
  flat = paths.flatten(base)
  for path in dict.fromkeys(path for tree in nodes for path in tree):
    pairs = [
      (tree[path], leaves[path]) if path in tree else None
      for tree, leaves in zip(nodes, frozen, strict=True)
    ]
    flat[path] = _several(pairs, flat[path], rows)
  return paths.unflatten(flat)


def _several(
  pairs: Sequence[tuple[Adapter, Any] | None], base: Any, rows: np.ndarray
) -> SeveralWeight:
  """One kernel with all adapters; (node, attached leaf) or None for each."""
  *lead, i, o = base.shape
  leaves = [pair[1] for pair in pairs if pair is not None]
  widths = [w.lora_a.shape[-1] for w in leaves if w.lora_a is not None]
  widest = max(widths, default=1)
  parts = []
  for pair in pairs:
    a, b = jnp.zeros((*lead, i, widest)), jnp.zeros((*lead, widest, o))
    scale, gain = jnp.zeros(lead), jnp.ones((*lead, o))
    if pair is not None:
      node, w = pair
      scale = w.scale
      if node.magnitude is not None:
        gain = dora.gain(w.magnitude, w.norm, w.scale)
      if w.lora_a is not None:
        r = w.lora_a.shape[-1]
        a = a.at[..., :r].set(w.lora_a)
        b = b.at[..., :r, :].set(w.lora_b)
    parts.append((a, b, scale, gain))
  # Behind the layer axis, which a scan takes off.
  stacks = (jnp.stack(part, len(lead)) for part in zip(*parts, strict=True))
  each = jnp.broadcast_to(jnp.asarray(rows), (*lead, len(rows)))
  return SeveralWeight(base, *stacks, each)
