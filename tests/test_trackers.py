"""Who follows a run hears what is logged, and cannot end it."""

import json
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import cli, trackers
from qdora_jax.config import LogSection
from qdora_jax.finetune import fine_tune
from qdora_jax.metrics import read_log

ROWS = [
  {'step': 1, 'loss': 2.5, 'lr': 1e-3},
  {'step': 2, 'loss': None, 'lr': 1e-3, 'skipped': 1},
  {'step': 3, 'loss': 1.5, 'held_out_loss': 1.25, 'samples': [['q', 'a', 'e']]},
]


def follow(section: LogSection, folder, rows=ROWS) -> None:
  with trackers.following(section, folder, {'seed': 3}) as followers:
    for row in rows:
      followers.write(row)


def events(folder) -> list:
  """All events of a folder, in the order they were written."""
  event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2')
  found = []
  for path in sorted(folder.glob('events*')):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack('<Q', data[:8])
      found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[12 + size + 4 :]
  return found


def scalars(folder) -> dict[tuple[str, int], float]:
  """What TensorBoard shows: steps that were taken again by their last value."""
  shown = {}
  for event in events(folder):
    if event.session_log.status == 1:  # START: later steps are purged.
      shown = {k: v for k, v in shown.items() if k[1] < event.step}
    for value in event.summary.value:
      if value.WhichOneof('value') == 'simple_value':
        shown[value.tag, event.step] = value.simple_value
  return shown


def test_tensorboard(tmp_path):
  pytest.importorskip('tensorboardX')
  follow(LogSection(tensorboard=True), tmp_path)
  folder = tmp_path / 'tensorboard'
  want = {
    ('loss', 1): 2.5,
    ('lr', 1): 1e-3,
    ('lr', 2): 1e-3,
    ('skipped', 2): 1.0,
    ('loss', 3): 1.5,
    ('held_out_loss', 3): 1.25,
  }
  assert scalars(folder) == pytest.approx(want)
  written = str(events(folder))
  assert '**q**' in written and 'answered: a' in written
  assert 'seed' in written
  # A finished run is asked again, and has its final figures alone to tell.
  follow(LogSection(tensorboard=True), tmp_path, [{'step': 3, 'right': 0.5}])
  assert scalars(folder) == pytest.approx({**want, ('right', 3): 0.5})
  # A run goes on after step 1: what came later is hidden.
  follow(LogSection(tensorboard=True), tmp_path, [{'step': 2, 'loss': 9.0}])
  want = {('loss', 1): 2.5, ('lr', 1): 1e-3, ('loss', 2): 9.0}
  assert scalars(folder) == pytest.approx(want)


def stored(path) -> Iterator[bytes]:
  """Records of a .wandb file: LevelDB's log behind a header of 7 bytes."""
  data, at, part = path.read_bytes(), 7, b''
  while at + 7 <= len(data):
    left = 32768 - at % 32768
    _, size, kind = struct.unpack('<IHB', data[at : at + 7])
    if left < 7 or kind == 0:
      at += left
      continue
    part += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # Whole, or the last part.
      yield part
      part = b''


def test_weights_and_biases_offline(tmp_path, monkeypatch):
  pytest.importorskip('wandb')
  from wandb.proto import wandb_internal_pb2

  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_DIR', str(tmp_path))
  run = tmp_path / 'run'
  run.mkdir()
  follow(LogSection(wandb='tests'), run)
  (path,) = run.glob('wandb/offline-run-*/*.wandb')
  # wandb's own process may still be writing when `finish` has returned.
  for _ in range(300):
    records = [
      wandb_internal_pb2.Record.FromString(data) for data in stored(path)
    ]
    if any(r.WhichOneof('record_type') == 'exit' for r in records):
      break
    time.sleep(0.1)
  text = ''.join(str(record.run) for record in records)
  history = [
    {
      item.key or '/'.join(item.nested_key): json.loads(item.value_json)
      for item in record.history.item
    }
    for record in records
    if record.WhichOneof('record_type') == 'history'
  ]
  assert 'tests' in text and 'seed' in text
  assert [row['step'] for row in history] == [1, 2, 3]
  assert history[0]['loss'] == 2.5 and 'loss' not in history[1]
  assert history[2]['held_out_loss'] == 1.25
  assert history[2]['samples/nrows'] == 1


def test_what_fails_hears_nothing_more(tmp_path, capsys):
  class Broken:
    def write(self, row):
      raise RuntimeError('no route to host')

    def close(self):
      raise AssertionError('closed')

  class Works(list):
    write = list.append

    def close(self):
      self.append('closed')

  works = Works()
  followers = trackers.Guarded()
  followers.open(lambda: works)
  followers.open(Broken)
  for row in ROWS:
    followers.write(row)
  followers.close()
  assert works == [*ROWS, 'closed']
  err = capsys.readouterr().err
  assert err.count('Broken follows this run no longer: no route to host') == 1


def test_a_package_that_is_not_there(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  trackers.check(LogSection())
  with pytest.raises(ImportError, match=r'tensorboardX.*qdora_jax\[track\]'):
    trackers.check(LogSection(tensorboard=True))
  with pytest.raises(ImportError, match='asks for wandb'):
    trackers.check(LogSection(wandb='a project'))


@pytest.mark.slow
def test_a_run_is_followed_whoever_did_so_before(tmp_path, monkeypatch, capsys):
  """It is the same run with a tracker and without; every row arrives."""
  pytest.importorskip('tensorboardX')
  tiny.use_sums(monkeypatch)
  model = tiny.write(tmp_path / 'model')
  options = {'eval.before': False, 'eval.every': 2, 'train.steps': 4}
  real = trackers.Guarded.write

  def write(self, row):
    real(self, row)
    if row['step'] == 3:
      raise KeyboardInterrupt

  monkeypatch.setattr(trackers.Guarded, 'write', write)
  with pytest.raises(KeyboardInterrupt):
    fine_tune(tiny.run_config(model, **options), tmp_path / 'run')
  monkeypatch.setattr(trackers.Guarded, 'write', real)
  options['log.tensorboard'] = True
  fine_tune(tiny.run_config(model, **options), tmp_path / 'run')
  capsys.readouterr()
  assert cli.main(['runs', str(tmp_path / 'run'), '--history']) == 0
  said = capsys.readouterr().out
  logged = {r['step']: r for r in read_log(tmp_path / 'run/metrics.jsonl')}
  shown = scalars(tmp_path / 'run' / 'tensorboard')
  first = min(step for _, step in shown)
  assert first > 1 and ('held-out_loss', 4) in shown
  for step in range(first, 5):
    for name, value in trackers.numbers(logged[step]).items():
      np.testing.assert_allclose(shown[name, step], value, rtol=1e-6)
  # In the terminal: what was seen at step 2.
  held = logged[2]['held_out_loss']
  mean = (logged[1]['loss'] + logged[2]['loss']) / 2
  lines = [line.split() for line in said.splitlines()]
  assert ['2', f'{mean:.4f}', f'{held:.4f}'] in lines
  assert 'answers at step 2:\n  0+0=' in said and 'expected: 0' in said
