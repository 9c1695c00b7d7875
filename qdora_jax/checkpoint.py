"""Orbax checkpoints of what is trained; the base is named, not copied.

A checkpoint is two items: `state`, {path: array}, readable without this
package, and `meta`, JSON: which base and config it belongs to, where data and
log stood, and checksums of every array and of itself, so that a damaged one is
never taken for whole.
"""

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore as ts

from qdora_jax import paths, processes
from qdora_jax.streaming import is_paged


class Restored(NamedTuple):
  """A checkpoint: after how many steps, the tree, and what was noted."""

  step: int
  state: Any
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of a run, one directory a step."""

  def __init__(self, directory: Path, keep_last: int = 2, keep_best: int = 0):
    """Opens a directory, or makes it.

    Args:
      directory: of this run alone.
      keep_last: so many of the newest are kept,
      keep_best: and so many of those with the lowest held-out loss: `save`'s
        meta['held_out_loss'].
    """
    self.directory = directory.absolute()
    self._keep = (keep_last, keep_best)
    self._losses: dict[int, float] = {}
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self, create=True
      ),
    )
    for step in self._manager.all_steps():
      with contextlib.suppress(*_DAMAGE):
        self._note(step, _meta(self.directory / str(step)))

  def _note(self, step: int, meta: Mapping[str, Any]) -> None:
    if 'held_out_loss' in meta and meta['held_out_loss'] is not None:
      self._losses[step] = meta['held_out_loss']

  def should_preserve(
    self, found: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Which checkpoints stay; orbax asks before it deletes any."""
    last, best = self._keep
    steps = sorted(checkpoint.step for checkpoint in found)
    kept = {*steps[-last:], *self._best(steps)[:best]}
    return [checkpoint.step in kept for checkpoint in found]

  def _best(self, steps: Sequence[int]) -> list[int]:
    """Those with a held-out loss, the lowest first; of equal ones the older."""
    some = (step for step in sorted(steps) if step in self._losses)
    return sorted(some, key=self._losses.__getitem__)

  def latest(self) -> int | None:
    """The newest step saved, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Saves a tree, and JSON values beside it.

    Returns at once; the writing goes on behind. Call `close` at the end.

    Raises:
      OSError: if this one, or the one before, could not be written.
    """
    flat = _flat(state)
    self._note(step, meta)
    meta = {**meta, 'arrays': _describe(flat)}
    with self._writing():
      self._manager.wait_until_finished()
      self._check_room(flat)
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(flat),
          meta=ocp.args.JsonSave({'checksum': _checksum_of(meta), **meta}),
        ),
      )

  def _check_room(self, flat: Mapping[str, jax.Array]) -> None:
    """Beforehand: orbax's writers fail one by one, each with its trace."""
    # Random numbers grow a little under zstd; a megabyte is for what describes
    # them, and for the log.
    need = int(1.02 * sum(a.nbytes for a in flat.values())) + 2**20
    free = shutil.disk_usage(self.directory).free
    if processes.agree(free < need):
      raise OSError(
        f'No space left on device: {need / 1e6:.1f} MB needed, '
        f'{free / 1e6:.1f} MB free'
      )

  def restore(
    self,
    state: Any,
    identity: Mapping[str, str],
    *,
    which: str | int = 'last',
    set_aside: bool = False,
  ) -> Restored:
    """The newest checkpoint that is whole, or another.

    One that is not is named and passed over.

    Args:
      state: a tree of the same structure: arrays, or abstract ones; what is
        restored lies where they do, on however many devices it was saved.
      identity: entries of meta that must be the same, {what it is: value}.
      which: 'last', 'best' (of the lowest held-out loss) or a step.
      set_aside: moves damaged checkpoints out of the way, so that their steps
        can be saved again.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it belongs to something else, or none is whole.
    """
    flat, damaged = _flat(state), []
    for step in self._found(which):
      where = self.directory / str(step)
      meta, saved, wrong, reason = {}, {}, '', ''
      try:
        meta = _meta(where)
        wrong = _mismatch(meta, identity, flat)
        saved = {} if wrong else _arrays(where, flat)
      except _DAMAGE as error:
        reason = _reason(error)
      # Each process has read its own part.
      if processes.agree(bool(reason)):
        reason = reason or 'as another process found'
      elif saved:
        reason = _changed(saved, meta['arrays'])
      if reason:
        damaged.append(step)
        print(f'the checkpoint {where} is damaged ({reason}); passed over')
        continue
      if wrong:
        raise ValueError(f'the checkpoint {where} {wrong}')
      if set_aside:
        self._set_aside(damaged)
      tree = jax.tree.unflatten(jax.tree.structure(state), saved.values())
      return Restored(step, tree, meta)
    raise ValueError(
      f'no checkpoint in {self.directory} is whole (steps '
      f'{", ".join(map(str, damaged))}); start again with another --workdir'
    )

  def _found(self, which: str | int) -> list[int]:
    """Steps to try, in this order."""
    steps = sorted(self._manager.all_steps(), reverse=True)
    have = ', '.join(map(str, steps))
    if not steps:
      raise FileNotFoundError(f'no checkpoint in {self.directory}; train first')
    if which == 'last':
      return steps
    if which == 'best':
      if not self._best(steps):
        raise FileNotFoundError(
          f'no checkpoint in {self.directory} has a held-out loss to be the '
          f'best by (steps {have}); expected a run with config.train.keep_best '
          'and config.eval.every'
        )
      return self._best(steps)
    if which not in steps:
      raise FileNotFoundError(
        f'no checkpoint of step {which} in {self.directory}; there are steps '
        f'{have}'
      )
    return [which]

  def _set_aside(self, damaged: list[int]) -> None:
    """Their steps can be saved again."""
    aside = self.directory.with_name(f'{self.directory.name}-damaged')
    for step in damaged if processes.first() else []:
      aside.mkdir(exist_ok=True)
      to = aside / str(step)
      while to.exists():
        to = to.with_name(f'{to.name}x')
      (self.directory / str(step)).rename(to)
      print(f'moved to {to}', flush=True)
    if damaged:
      processes.agree(0)  # It is done.
      self._manager.reload()

  def close(self) -> None:
    """Waits until everything is written.

    Raises:
      OSError: if it could not be.
    """
    with self._writing():
      self._manager.wait_until_finished()
    self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except (ValueError, OSError) as error:
      good = self.latest()
      last = f'{self.directory / str(good)} is whole' if good else 'none before'
      raise OSError(
        f'no checkpoint could be written to {self.directory} '
        f'({_reason(error)}; {last}); make room, and the same command continues'
      ) from error


# What orbax, tensorstore and json say of files cut short, changed or missing;
# not what JAX says when memory runs out, which is a RuntimeError.
_DAMAGE = (ValueError, KeyError, TypeError, OSError)


def _reason(error: Exception) -> str:
  """tensorstore's words are long; before its own details stands the reason."""
  words = str(error).strip().split('\n')[0].split(' [')[0]
  return ': '.join(words.split(': ')[-2:])[:200]


def _meta(where: Path) -> dict[str, Any]:
  """What was noted; checked against its checksum."""
  meta = json.loads((where / 'meta' / 'metadata').read_text())
  if meta.pop('checksum') != _checksum_of(meta):
    raise ValueError('meta is not what was saved')
  return meta


def _arrays(where: Path, flat: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Each array where `flat` has it: a device's part is read for it alone.

  Not by orbax: of files that are damaged it tells on every device, with traces.
  """
  return {name: _array(where, name, like) for name, like in flat.items()}


def _array(where: Path, name: str, like: Any) -> jax.Array:
  # As orbax writes it: zarr arrays in one OCDBT database.
  base = {'driver': 'file', 'path': f'{where}/state/'}
  store = {'driver': 'ocdbt', 'base': base, 'path': name}
  stored = ts.open({'driver': 'zarr', 'kvstore': store}, open=True).result()
  place = like.sharding
  if place is None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.make_array_from_callback(
    stored.shape, place, lambda part: stored[part].read().result()
  )


def _mismatch(
  meta: Mapping[str, Any], identity: Mapping[str, str], flat: Mapping[str, Any]
) -> str:
  """What of a checkpoint belongs to something else, in words; or ''."""
  for what, value in identity.items():
    theirs = meta[what] if what in meta else None
    if theirs != value:
      return f'belongs to another {what}: {theirs}, here {value}'
  have = {name: tuple(a['shape']) for name, a in meta['arrays'].items()}
  want = {name: leaf.shape for name, leaf in flat.items()}
  for name in {**want, **have}:
    ours = want[name] if name in want else 'nothing'
    theirs = have[name] if name in have else 'nothing'
    if ours != theirs:
      return f'is of another model or rank: {name} is {theirs}, here {ours}'
  return ''


def _describe(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
  """{name: {shape, checksum}} of arrays."""
  sums = jax.device_get(_checksums(dict(flat)))
  return {
    name: {'shape': list(array.shape), 'checksum': int(sums[name])}
    for name, array in flat.items()
  }


def _changed(saved: Mapping[str, jax.Array], then: Mapping[str, Any]) -> str:
  """Which array is not what was saved, in words; or ''."""
  now = _describe(saved)
  for name in now:
    if now[name] != then[name]:
      return f'{name} is not what was saved'
  return ''


def _checksum_of(meta: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(meta).encode())


@jax.jit
def _checksums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
  # One program: many small ones with collectives can deadlock on CPU devices.
  sums: dict[str, jax.Array] = {}
  before: Any = ()
  for name, array in flat.items():
    if is_paged(array):
      # From the host's memory one after the other.
      array, _ = jax.lax.optimization_barrier((array, before))
      array = jax.device_put(array, jax.memory.Space.Device)
    sums[name] = before = _checksum(array)
  return sums


def _checksum(array: jax.Array) -> jax.Array:
  """Sum of its words, each stirred together with its place, mod 2^32."""
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(
    array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
  )
  place = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(array.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, array.shape, axis
    )
  # MurmurHash3's fmix32: every bit reaches all others. A plain weighted sum
  # takes an array of 2.0 for one of 0.0.
  word = bits.astype(jnp.uint32) ^ place * jnp.uint32(0x9E3779B9)
  word = (word ^ word >> 16) * jnp.uint32(0x85EBCA6B)
  word = (word ^ word >> 13) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(word ^ word >> 16, dtype=jnp.uint32)


def _flat(tree: Any) -> dict[str, Any]:
  """{'trained/layers/attn/q/kernel/lora_a': array}, in the tree's order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {paths.of(path): leaf for path, leaf in leaves}
