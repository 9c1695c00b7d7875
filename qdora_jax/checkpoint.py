"""Orbax checkpoints of what is trained; the base is named, not copied."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of a run: {path: array}, readable without this package."""

  def __init__(self, directory: Path, keep: int = 2):
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def latest(self) -> int | None:
    """The newest step saved, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, base: str) -> None:
    """Saves a tree, with the fingerprint of the base it belongs to.

    Returns at once; the writing goes on behind. Call `close` at the end.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_flat(state)),
        meta=ocp.args.JsonSave({'base': base}),
      ),
    )

  def restore(self, state: Any, base: str, step: int | None = None) -> Any:
    """A saved tree.

    Args:
      state: a tree of the same structure: arrays, or abstract ones.
      base: fingerprint of the present base.
      step: which; the newest if None.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it belongs to another base.
    """
    step = self.latest() if step is None else step
    if step is None:
      raise FileNotFoundError(
        f'no checkpoint in {self._manager.directory}; train first'
      )
    saved = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(
          jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(state))
        ),
        meta=ocp.args.JsonRestore(),
      ),
    )
    if saved.meta['base'] != base:
      raise ValueError(
        f'the checkpoint in {self._manager.directory} belongs to another base: '
        f'{saved.meta["base"]}, here {base}'
      )
    leaves = [saved.state[name] for name in _flat(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.wait_until_finished()
    self._manager.close()


def _flat(tree: Any) -> dict[str, Any]:
  """{'0/layers/attn/q/kernel/lora_a': array}, in the tree's order."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
