"""The training loop: a step, and `fit`, which repeats it.

Nothing here knows of configs or run folders (`run.py` does): `fit` takes plain
values, any iterable of batches, and callbacks.
"""

import collections
import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdora_jax import optim, processes, scaling
from qdora_jax import paged as paging
from qdora_jax.adapter import Adapter
from qdora_jax.checkpoint import Checkpoints
from qdora_jax.data import Batch
from qdora_jax.loss import summed_loss
from qdora_jax.metrics import Log, Progress
from qdora_jax.model import Decoder
from qdora_jax.paged import Paged
from qdora_jax.sharding import BATCH, shard, shard_batch
from qdora_jax.streaming import is_paged
from qdora_jax.tally import Tally
from qdora_jax.transforms import adapted_norms, attach, norms

Tree = dict[str, Any]
Callback = Callable[[int, dict[str, Any], Tree], Mapping[str, Any] | None]


def make_step(
  model: Decoder,
  optimizer: optax.GradientTransformation,
  microbatches: int = 1,
  like: tuple[Tree, Any] | None = None,
  rate: optim.Scaled | None = None,
) -> Callable[..., tuple[Tree, Any, dict[str, jax.Array]]]:
  """The jitted step: (trained, opt_state, base, norms, batch, key) -> moved on.

  The loss is the mean over the learned tokens of the whole batch, however many
  microbatches and devices it is split over. If it or its gradient is not
  finite, nothing moves. `trained` and `opt_state` are donated. Two arguments
  may follow: a `scaling.LossScale`, and what it becomes is then among what is
  returned; and the peak of `rate`.

  Args:
    model: the decoder.
    optimizer: any optax transformation.
    microbatches: gradients are accumulated over so many slices of the batch;
      DoRA's detached norms are then computed once for all of them.
    like: (trained, opt_state) on a mesh, or with state in the host's memory: so
      they leave the step, too. (Left to itself XLA lays gradients out
      differently from what they are of.) State in the host's memory is streamed
      through the update, see paged.py.
    rate: the optimizer's learning rate, if its peak is to be an argument.
  """
  rate = rate or optim.Scaled(optax.constant_schedule(1.0), 1.0)
  optimizer = optax.with_extra_args_support(optimizer)
  placed = jax.tree.map(lambda a: a.sharding, like)
  shards = None if like is None else jax.tree.leaves(placed)
  mesh = None if like is None else _mesh_of(jax.tree.leaves(placed)[0])
  if mesh is not None:
    model = model.clone(mesh=mesh)

  def step(trained, opt_state, base, norms, batch, key, scale=None, peak=None):
    total = jnp.maximum(jnp.sum(batch['weights']), 1)
    if scale is not None:
      total /= scale.value
    if microbatches > 1 and _detached(trained):
      norms = adapted_norms(base, trained, norms)

    def gradient(part, key):
      def objective(trained):
        params = attach(base, trained, norms=norms, dropout_key=key)
        return summed_loss(model, params, part) / total

      return jax.value_and_grad(objective)(trained)

    def accumulate(sums, part_and_key):
      return jax.tree.map(jnp.add, sums, gradient(*part_and_key)), None

    if microbatches == 1:
      value, grads = gradient(batch, key)
    else:
      parts = jax.tree.map(lambda a: _slices(a, microbatches, mesh), batch)
      zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
      keys = jax.random.split(key, microbatches)
      (value, grads), _ = jax.lax.scan(accumulate, zero, (parts, keys))
    if scale is not None:
      value, grads = jax.tree.map(lambda a: a / scale.value, (value, grads))
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    with rate.given(peak):
      trained, opt_state = paging.move(
        optimizer, trained, grads, opt_state, finite, value, shards
      )
    seen = {'loss': value, 'grad_norm': grad_norm, 'finite': finite}
    if scale is not None:
      seen |= {'loss_scale': scale.value, 'scale': scaling.after(scale, finite)}
    return trained, opt_state, seen

  if like is None:
    return jax.jit(step, donate_argnums=(0, 1))
  return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*placed, None))


def _mesh_of(sharding: jax.sharding.Sharding) -> jax.sharding.Mesh | None:
  named = isinstance(sharding, jax.sharding.NamedSharding)
  return sharding.mesh if named else None


def _slices(
  array: jax.Array, count: int, mesh: jax.sharding.Mesh | None
) -> jax.Array:
  """[B, ...] as [count, B/count, ...]: every device slices what it has."""
  slices = array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)
  if mesh is None:
    return slices
  spec = jax.sharding.PartitionSpec(None, *BATCH)
  return jax.lax.with_sharding_constraint(
    slices, jax.sharding.NamedSharding(mesh, spec)
  )


def _detached(trained: Tree) -> bool:
  """Whether every norm in the tree is a constant of differentiation."""
  nodes = jax.tree.leaves(trained, is_leaf=lambda x: isinstance(x, Adapter))
  return all(n.spec.detach for n in nodes if isinstance(n, Adapter))


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
    stopped = stack.enter_context(_signals(checkpoints is not None))
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


@contextlib.contextmanager
def _signals(active: bool) -> Iterator[Callable[[bool], str | None]]:
  """Notes SIGTERM and SIGINT while a step runs; a second SIGINT interrupts.

  An error that comes after one is its end: Interrupted, with the error's words.

  What is noted by one of many processes is told to all: at once, or when they
  ask again, which waits for nothing that was begun since.
  """
  noted: list[int] = []
  telling: collections.deque[Any] = collections.deque()
  # Only the main thread can be told of signals.
  active = active and threading.current_thread() is threading.main_thread()
  before = {}

  def note(number: int, frame: Any) -> None:
    if noted and number == signal.SIGINT:
      raise KeyboardInterrupt
    noted.append(number)

  def asked(at_once: bool) -> str | None:
    telling.append(processes.largest(noted[0] if noted else 0))
    at_once |= jax.process_count() == 1
    number = 0
    while len(telling) > (0 if at_once else 1):
      number = max(number, int(telling.popleft()))
    return signal.Signals(number).name if number else None

  if active:
    for number in (signal.SIGTERM, signal.SIGINT):
      before[number] = signal.signal(number, note)
  try:
    yield asked
  except Exception as error:
    # Who was told to end ends, and does not try what is next.
    if noted:
      raise processes.Interrupted(noted[0], f'not saved: {error}') from error
    raise
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


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
