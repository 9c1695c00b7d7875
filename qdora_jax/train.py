"""The training loop: `fit` repeats the step (`step.py`).

Nothing here knows of configs or run folders (`run.py` does): `fit` takes plain
values, any iterable of batches, and callbacks.
"""

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdora_jax import optim, processes, scaling, signals
from qdora_jax import paged as paging
from qdora_jax.checkpoint import Checkpoints
from qdora_jax.data import Batch
from qdora_jax.metrics import Log, Progress
from qdora_jax.model import Decoder
from qdora_jax.paged import Paged
from qdora_jax.sharding import shard, shard_batch
from qdora_jax.step import make_step
from qdora_jax.streaming import is_paged
from qdora_jax.tally import Tally
from qdora_jax.transforms import norms

Tree = dict[str, Any]
Callback = Callable[[int, dict[str, Any], Tree], Mapping[str, Any] | None]


class Fitted(NamedTuple):
  """What `fit` gives: the trained tree, and this call's rows of the log."""

  trained: Tree
  rows: list[dict[str, Any]]


class NotFiniteError(ArithmeticError):
  """Loss or gradient were not finite, again and again."""


def fit(
  model: Decoder,
  base: Tree,
  trained: Tree,
  batches: Iterable[Batch],
  *,
  steps: int,
  lr: float | optax.Schedule = 2e-4,
  optimizer: Callable[
    [float | optax.Schedule], optax.GradientTransformation
  ] = optim.make_optimizer,
  microbatches: int = 1,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
  workdir: str | Path | None = None,
  save_every: int = 100,
  keep_last: int = 2,
  keep_best: int = 0,
  identity: Mapping[str, str] | None = None,
  callbacks: Sequence[Callback] = (),
  call_every: int = 1,
  writers: Sequence[Callable[[Mapping[str, Any]], None]] = (),
  max_skipped: int = 5,
  donate: bool = False,
  paged: Paged = 'none',
  room: int | None = None,
) -> Fitted:
  """Trains a tree on batches.

  A step is waited for when the next one has begun, so that devices never wait
  for what the host does with its results; but for steps after which what is
  trained is looked at: those of callbacks, of checkpoints and the last.

  Args:
    model: the decoder.
    base: frozen tree, quantized or not; {} for full fine-tuning.
    trained: what `init_adapter` made; or all parameters, in float32.
    batches: dicts of arrays as `data.Batches` makes them, its instances among
      them. What ends early ends the training.
    steps: optimizer steps, those of earlier calls in workdir included.
    lr: learning rate, or an optax schedule.
    optimizer: makes an optax optimizer from lr, such as `optax.adamw`; AdamW
      without weight decay otherwise.
    microbatches: each batch is split into so many, one after the other.
    seed: of adapter dropout.
    mesh: from `make_mesh`, and base already on it.
    workdir: for metrics.jsonl and checkpoints/; the same call again then
      continues, bit for bit. SIGTERM and Ctrl-C save before they end it.
    save_every: steps between checkpoints.
    keep_last: checkpoints that are kept; older ones are deleted,
    keep_best: but for so many of those with the lowest held_out_loss, which a
      callback gave; what has one is saved, too.
    identity: what a checkpoint must belong to, {what it is: value}.
    callbacks: each is called as f(step, row, trained) after every step, or as
      often as call_every says; row is what will be logged, and a mapping that
      it returns is logged too.
      `trained` is valid until the next step, which takes its memory: copy what
      you keep (`jax.tree.map(jnp.copy, trained)`). Raising StopIteration ends
      the training early. Of many processes each calls its own, and they do the
      same.
    call_every: steps between calls of the callbacks; after the last step they
      are called, too. With 1 every step is waited for.
    writers: each is called as f(row) with every row that is logged, a step
      late; nothing waits for what they take.
    max_skipped: steps in a row that may be skipped for not being finite.
    donate: gives away the memory of `trained`, instead of copying it.
    paged: 'host' keeps the optimizer's state in the host's memory, 'auto' what
      of it does not fit into room; see paged.py. The result is the same.
    room: bytes each device has left for the optimizer's state; None if that is
      not known.

  Returns:
    The trained tree and the rows logged: step, loss (nats per learned token),
    lr, grad_norm, tokens (of the batch, without padding), skipped (steps so
    far), seconds (since the step before was done), tokens_per_second,
    memory_bytes; of a model that computes in float16 also loss_scale and
    overflowed (steps so far that only lowered it).

  Raises:
    NotFiniteError: after max_skipped steps in a row without a finite loss and
      gradient, naming the last good checkpoint.
    OSError: if a checkpoint cannot be written.
    ValueError: if workdir holds checkpoints of something else.

  Example:
    >>> batches = Batches(examples, batch_size=8)
    >>> adapter, rows = fit(model, base, adapter, batches, steps=100)
  """
  rate = lr if callable(lr) else optax.constant_schedule(lr)
  transformation = optimizer(lr)
  if not donate:
    trained = jax.tree.map(lambda a: jnp.array(a, copy=True), trained)
  state = initial_state(
    trained, transformation, seed, mesh, paged, room, model.dtype
  )
  start, skipped, overflowed, position, checkpoints = 0, 0, 0, 0, None
  source = iter(batches)
  if workdir is not None:
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir / 'checkpoints', keep_last, keep_best)
    if checkpoints.latest() is not None:
      start, state, meta = checkpoints.restore(
        state, identity or {}, set_aside=True
      )
      skipped, position = meta['skipped'], meta['log']
      overflowed = meta['overflowed'] if 'overflowed' in meta else 0
      _forward(source, meta['data'], start)
      print(f'continuing after step {start}', flush=True)
  like = (state['trained'], state['optimizer'])
  if mesh is None and not any(map(is_paged, jax.tree.leaves(like))):
    like = None
  scaled = lr if isinstance(lr, optim.Scaled) else None
  # Of numpy: every process has it, whatever devices the step runs on.
  peak = None if scaled is None else np.float32(scaled.peak)
  step = make_step(model, transformation, microbatches, like, scaled)
  fixed = jax.jit(norms)(base, state['trained'])
  rng = jax.random.wrap_key_data(state['rng'])
  rows: list[dict[str, Any]] = []

  def called(n: int) -> bool:
    return bool(callbacks) and (n % call_every == 0 or n == steps)

  def saved(n: int) -> bool:
    return n == steps or (checkpoints is not None and n % save_every == 0)

  def save(n: int, held_out_loss: float | None = None) -> None:
    if checkpoints is not None and checkpoints.latest() != n:
      meta = {**(identity or {}), 'data': _position(source)}
      meta |= {'skipped': tally.skipped, 'log': log.position()}
      meta['held_out_loss'] = held_out_loss
      if state['scale'] is not None:
        meta['overflowed'] = tally.overflowed
      checkpoints.save(n, state, meta)

  def settle(late: int) -> str | None:
    """Logs the steps begun, but so many of the last; who ends the training."""
    ended = None
    for row in tally.rows(late):
      try:
        for callback in callbacks if called(row['step']) else ():
          row |= callback(row['step'], row, state['trained']) or {}
      except StopIteration:
        ended = 'a callback'
      log.write(row)
      for write in writers:
        write(row)
      rows.append(row)
      progress.show(row['step'], row)
      if tally.in_a_row >= max_skipped:
        raise NotFiniteError(_persistent(row, tally.in_a_row, checkpoints))
    return ended

  with contextlib.ExitStack() as stack:
    # First: a second signal does not end the writing of what is saved.
    stopped = stack.enter_context(signals.noted(checkpoints is not None))
    if checkpoints is not None:
      stack.callback(checkpoints.close)
    logged = workdir is not None and processes.first()
    path = workdir / 'metrics.jsonl' if logged else None
    log = stack.enter_context(Log(path, position))
    progress = stack.enter_context(Progress(start, steps))
    tally = Tally(
      *(rate if scaled is None else scaled.shape, mesh, skipped, overflowed),
      1.0 if scaled is None else scaled.peak,
    )
    for n in range(start + 1, steps + 1):
      batch = next(source, None)
      if batch is None:
        settle(0)
        print(f'the data ended after {n - 1} of {steps} steps', flush=True)
        if n > 1:
          save(n - 1)
        break
      tokens = (batch['segments'] > 0).sum()
      if mesh is not None:
        batch = shard_batch(batch, mesh)
      state['trained'], state['optimizer'], seen = step(
        *(state['trained'], state['optimizer'], base, fixed, batch),
        *(jax.random.fold_in(rng, n - 1), state['scale'], peak),
      )
      if 'scale' in seen:
        state['scale'] = seen.pop('scale')
      tally.begin(n, tokens, seen)
      # The next step takes the memory of what is trained: who wants to look at
      # it does so before.
      in_step = saved(n) or called(n)
      # Every process asks.
      ended = settle(0 if in_step else 1) or stopped(in_step)
      if ended:
        settle(0)
      last = rows[-1] if not tally.waiting else {}
      held_out = last['held_out_loss'] if 'held_out_loss' in last else None
      rated = keep_best and held_out is not None
      if ended or rated or saved(n):
        save(n, held_out)
      if not tally.waiting:
        tally.rest()
      if ended == 'a callback':
        print(f'a callback ended the training after step {n}', flush=True)
        break
      if ended:
        number = signal.Signals[ended]
        raise processes.Interrupted(number, f'saved after step {n}')
  return Fitted(state['trained'], rows)


def initial_state(
  trained: Tree,
  optimizer: optax.GradientTransformation,
  seed: int,
  mesh: jax.sharding.Mesh | None = None,
  paged: Paged = 'none',
  room: int | None = None,
  dtype: Any = jnp.float32,
) -> dict[str, Any]:
  """What a checkpoint holds, before the first step; placed on the mesh.

  Args:
    trained: the tree.
    optimizer: whose state it is.
    seed: of adapter dropout.
    mesh: from `make_mesh`.
    paged: which of the state is made in the host's memory, see `fit`.
    room: see `fit`.
    dtype: the model's, of its products; float16 has a loss scale.
  """
  rng = jax.random.key_data(jax.random.key(seed))
  scale = scaling.start() if jnp.dtype(dtype) == jnp.float16 else None
  if mesh is not None:
    trained, rng, scale = (shard(tree, mesh) for tree in (trained, rng, scale))
  elif paged != 'none':
    # Told where it is: what a step returns is, and would be another program's.
    trained = jax.tree.map(lambda a: jax.device_put(a, a.sharding), trained)
  state = paging.initial(optimizer, trained, mesh, paged, room)
  return {'trained': trained, 'optimizer': state, 'rng': rng, 'scale': scale}


def _position(source: Iterator[Batch]) -> Any:
  """Where a grain iterator stands; of others only their steps are known."""
  return source.get_state() if hasattr(source, 'get_state') else None


def _forward(source: Iterator[Batch], position: Any, steps: int) -> None:
  """Moves fresh data to where it stood."""
  if position is not None:
    source.set_state(position)
    return
  for _ in range(steps):
    next(source, None)


def _persistent(
  row: Mapping[str, Any], count: int, checkpoints: Checkpoints | None
) -> str:
  good = checkpoints and checkpoints.latest()
  where = (
    f'the last good checkpoint is {checkpoints.directory / str(good)}'
    if good
    else 'there is no checkpoint yet'
  )
  half = (
    "; or activations pass float16's end, 65504: set "
    "config.model.dtype='float32'"
  )
  return (
    f'loss or gradient not finite in {count} steps in a row, up to step '
    f'{row["step"]}; {where}. Lower config.optim.lr, set config.optim.clip, or '
    f'look at the data of these steps{half if "loss_scale" in row else ""}'
  )
