"""Others who follow a run beside metrics.jsonl: TensorBoard, Weights & Biases.

A tracker takes rows of the log, {'step': 3, 'loss': 1.2, ...}. It cannot hurt a
run: one that fails says so once, and hears nothing more. metrics.jsonl holds
everything whatever becomes of it.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from qdora_jax.config import LogSection

Row = Mapping[str, Any]


class Tracker(Protocol):
  """Takes rows until it is closed."""

  def write(self, row: Row) -> None: ...

  def close(self) -> None: ...


def check(section: LogSection) -> None:
  """Raises ImportError, with the remedy, if a package is not there."""
  for wanted, package in (
    (section.tensorboard, 'tensorboardX'),
    (section.wandb, 'wandb'),
  ):
    if wanted and importlib.util.find_spec(package) is None:
      raise ImportError(
        f'config.log asks for {package}, which is not installed: '
        'pip install "qdora_jax[track]"'
      )


class TensorBoard:
  """Events in a folder, for `tensorboard --logdir`.

  What an interrupted run has written of steps that it takes again is hidden.
  A row without a loss is no step: what a finished run adds hides nothing.
  """

  def __init__(self, folder: Path, config: Mapping[str, Any]):
    self._folder, self._config, self._writer = folder, config, None

  def write(self, row: Row) -> None:
    step = row['step']
    if self._writer is None:
      from tensorboardX import SummaryWriter

      # Without the suffix two of one second would be one file; they are read
      # in the order of their names.
      count = len(list(self._folder.glob('events*')))
      self._writer = SummaryWriter(
        str(self._folder),
        purge_step=step if 'loss' in row else None,
        filename_suffix=f'.{count:04}',
      )
      text = json.dumps(self._config, indent=2)
      self._writer.add_text('config', f'```\n{text}\n```', step)
    for name, value in numbers(row).items():
      self._writer.add_scalar(name, value, step)
    if 'samples' in row:
      self._writer.add_text('samples', _as_markdown(row['samples']), step)

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


class WandB:
  """A run of Weights & Biases; offline with WANDB_MODE=offline.

  The same run folder is the same run there, however often it is continued.
  """

  def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
    import wandb

    self._wandb = wandb
    place = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]
    self._run = wandb.init(
      project=project,
      name=folder.name,
      id=f'{folder.name}-{place}',
      resume='allow',
      dir=str(folder),
      config=dict(config),
      settings=wandb.Settings(silent=True),
    )
    # Steps that are taken again overwrite nothing otherwise.
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def write(self, row: Row) -> None:
    values: dict[str, Any] = {'step': row['step'], **numbers(row)}
    if 'samples' in row:
      columns = ['question', 'answered', 'expected']
      values['samples'] = self._wandb.Table(columns, list(row['samples']))
    self._run.log(values)

  def close(self) -> None:
    self._run.finish()


def numbers(row: Row) -> dict[str, float]:
  """What a curve can be drawn of."""
  return {
    key.replace(' ', '_'): float(value)
    for key, value in row.items()
    if key != 'step' and isinstance(value, int | float) and math.isfinite(value)
  }


class Guarded:
  """Trackers that cannot end the run they follow."""

  def __init__(self) -> None:
    self._trackers: list[Tracker] = []

  def open(self, make: Any, *args: Any) -> None:
    with self._guard(make.__name__):
      self._trackers.append(make(*args))

  def write(self, row: Row) -> None:
    for tracker in list(self._trackers):
      with self._guard(type(tracker).__name__, tracker):
        tracker.write(row)

  def close(self) -> None:
    for tracker in self._trackers:
      with self._guard(type(tracker).__name__):
        tracker.close()

  @contextlib.contextmanager
  def _guard(self, name: str, tracker: Tracker | None = None) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      # Whatever a foreign service does, the run goes on.
      if tracker is not None:
        self._trackers.remove(tracker)
      print(
        f'{name} follows this run no longer: {error}; metrics.jsonl goes on',
        file=sys.stderr,
        flush=True,
      )


@contextlib.contextmanager
def following(
  section: LogSection, folder: Path, config: Mapping[str, Any]
) -> Iterator[Guarded]:
  """The trackers that a config asks for, closed at the end.

  Args:
    section: config.log.
    folder: of the run; TensorBoard's events go to tensorboard/ in it.
    config: every key, to be shown beside the curves.
  """
  trackers = Guarded()
  if section.tensorboard:
    trackers.open(TensorBoard, folder / 'tensorboard', config)
  if section.wandb:
    trackers.open(WandB, folder, section.wandb, config)
  try:
    yield trackers
  finally:
    trackers.close()


def _as_markdown(samples: Any) -> str:
  return '\n\n'.join(
    f'**{question}**\n\nanswered: {given}\n\nexpected: {expected}'
    for question, given, expected in samples
  )
