"""Many processes train as one does; when one is lost, all end and go on later.

Real processes, joined through jax.distributed, with CPU devices of their own.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from command import (
  PATIENCE,
  Command,
  assert_ends_like,
  half_saved,
  new_row,
  newest,
  steady,
  wait_for,
)
from tiny import quick_compiles  # noqa: F401

from qdora_jax import opening, processes, run
from qdora_jax.cli import main
from qdora_jax.finetune import fine_tune
from qdora_jax.metrics import read_log

ONE = r'.*/q/kernel'
TWO = r'.*/(q|down)/kernel'
STEPS = 30


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  return made(tmp_path_factory.mktemp('processes'))


def made(folder, **overrides):
  """A tiny run over all devices, saved at every second step."""
  path = folder / 'sums.jsonl'
  rows = ((a, b) for a in range(8) for b in range(8))
  path.write_text(
    ''.join(
      json.dumps({'prompt': f'{a}+{b}=', 'completion': str(a + b)}) + '\n'
      for a, b in rows
    )
  )
  return Command.make(
    folder,
    **{
      'data.name': '',
      'data.path': str(path),
      'data.train_size': 0,
      'data.eval_size': 0,
      'adapter.targets': ONE,
      'quant.targets': ONE,
      'adapter.dropout': 0.1,
      'train.steps': STEPS,
      'mesh.fsdp': -1,
      **overrides,
    },
  )


def weights(workdir):
  path = workdir / 'adapter' / 'adapter_model.safetensors'
  return safetensors.numpy.load_file(path)


def assert_agree(many, one, rtol):
  """Logs and adapters, these by their largest numbers.

  AdamW's first steps are as long for the smallest gradients as for others.
  """
  assert len(steady(many)) == len(steady(one))
  for a, b in zip(steady(many), steady(one), strict=True):
    assert a.keys() == b.keys()
    for key in a.keys() - {'samples'}:
      np.testing.assert_allclose(a[key], b[key], rtol=rtol, err_msg=key)
    assert ('samples' in a) == ('samples' in b)
  want = weights(one)
  assert weights(many).keys() == want.keys()
  for name, array in weights(many).items():
    assert tiny.relative(array, want[name]) <= 20 * rtol, name


@pytest.fixture
def hang_up():
  """hang_up(action) says what SIGHUP does here; whoever began us may differ."""
  before = signal.getsignal(signal.SIGHUP)
  yield lambda action: signal.signal(signal.SIGHUP, action)
  signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_a_called_command_hears_our_signals(tmp_path, hang_up, name):
  hang_up(signal.SIG_DFL)
  number, heard = signal.Signals[name], tmp_path / 'heard'
  child = f"""
import os, pathlib, signal, sys, time
def hear(number, frame):
  pathlib.Path({str(heard)!r}).write_text(str(number))
  sys.exit(9)
signal.signal({number}, hear)
os.kill(os.getppid(), {number})
time.sleep(60)
"""
  with pytest.raises(KeyboardInterrupt, match=name) as error:
    processes.call([sys.executable, '-c', child])
  assert error.value.signal == number
  assert heard.read_text() == str(int(number))


def test_under_nohup_a_called_command_ends_by_itself(hang_up):
  hang_up(signal.SIG_IGN)
  tell = (
    f'import os, sys; os.kill(os.getppid(), {int(signal.SIGHUP)}); sys.exit(3)'
  )
  assert processes.call([sys.executable, '-c', tell]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
  'method', [pytest.param('none', marks=pytest.mark.exhaustive), 'dora']
)
def test_eight_devices_of_two_processes_are_eight_of_one(tmp_path, method):
  """Sharded over both, evaluated and generated from while training.

  Written and said once; and what two processes saved, one has.
  """
  overrides = {
    'adapter.method': method,
    'quant.format': 'nf4' if method == 'dora' else 'none',
    'adapter.targets': TWO,
    'quant.targets': TWO,
    'adapter.dropout': 0.1 * (method == 'dora'),
    'optim.lr': 1e-3,
    'data.eval_size': 4,
    'eval.every': 2,
    'eval.exact_match': method == 'dora',
    'train.microbatches': 2,
    'train.batch_size': 16,
    'train.keep_best': 1,
    'train.steps': 4,
  }
  command = made(tmp_path, **overrides)
  many, one = tmp_path / 'many', tmp_path / 'one'
  code, out, err = command.run(many, '--processes=2', devices=4)
  assert (code, err) == (0, '')
  assert out.count('trained: ') == out.count('results in') == 1
  assert re.search(r'best checkpoint is of step \d, held-out loss', out)
  assert not list(tmp_path.glob('qdora-*'))
  summary = json.loads((many / 'summary.json').read_text())
  assert len(summary['devices']) == 8
  config = json.loads((many / 'config.json').read_text())
  fine_tune(tiny.RunConfig.make(config), one)
  if method == 'dora':
    assert_agree(many, one, 1e-5)
  for key in ('loss', 'grad_norm', 'held_out_loss'):
    losses = [
      [row[key] for row in steady(end) if key in row] for end in (many, one)
    ]
    assert len(losses[0]) >= 2
    np.testing.assert_allclose(*losses, rtol=1e-5)
  # On eight devices, and on two.
  best = summary['best_checkpoint']['held_out_loss']
  loaded = run.load_run(many, 'best')
  assert loaded.mesh.size == 8
  found = loaded.held_out_loss(loaded.params())
  assert found == pytest.approx(best, rel=1e-5)
  words = ['evaluate', '--workdir', str(many), '--checkpoint', 'best']
  done = subprocess.run(
    [sys.executable, '-m', 'qdora_jax.cli', *words],
    env=command.environment(devices=2),
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, '')
  loss = re.search(r'held-out loss (\S+)', done.stdout)[1]
  assert float(loss) == pytest.approx(best, abs=2e-4)


@pytest.fixture(scope='module')
def whole(command):
  """The folder of a run of two processes that nobody disturbed."""
  workdir = command.folder / 'whole'
  code, _, err = command.run(workdir, '--processes=2')
  assert (code, err) == (0, '')
  return workdir


def workers(parent, count=2):
  """{index: pid} of a command's processes."""
  found = {}

  def all_there():
    for path in Path('/proc').glob('[0-9]*'):
      with contextlib.suppress(OSError, ValueError, IndexError):
        if int(stat(path)[1]) != parent.pid:
          continue
        place = re.search(
          rb'QDORA_PROCESS=\S+ \d+ (\d+) ', (path / 'environ').read_bytes()
        )
        if place:
          found[int(place[1])] = int(path.name)
    return len(found) == count

  assert wait_for(parent, all_there)
  return found


def stat(path):
  """State, parent, ... of a process, as Linux tells."""
  return (path / 'stat').read_text().rpartition(')')[2].split()


def ended_too(pid):
  """Whether a process has ended, or is but waited for."""
  try:
    return stat(Path(f'/proc/{pid}'))[0] == 'Z'
  except OSError:
    return True


linux = pytest.mark.skipif(
  sys.platform != 'linux', reason='finds processes in /proc'
)


def stopped(command, workdir, told, number, when, draw):
  """Starts two processes and signals one of them or their parent.

  Args:
    told: 0, 1 or 'parent'.
    when: 'start', 'step' or 'save'.
    draw: gives the delays.

  Returns:
    What the command ended with; all processes have.
  """
  before = half_saved(workdir)
  process = command.start(workdir, '--processes=2')
  pids = {**workers(process), 'parent': process.pid}
  if when == 'start':
    time.sleep(draw.uniform(0, 1))
  else:
    assert wait_for(process, new_row(workdir))
    time.sleep(draw.uniform(0, 0.2))
  if when == 'save':
    # Not the first one: there is something to go on from.
    assert wait_for(process, lambda: newest(workdir))
    assert wait_for(process, lambda: half_saved(workdir) - before)
  os.kill(pids[told], number)
  ended = command.ended(process, workdir)
  if (told, number) == ('parent', signal.SIGKILL):
    # Its processes see that themselves.
    until = time.monotonic() + PATIENCE
    while not all(ended_too(pids[n]) for n in range(2)):
      assert time.monotonic() < until
      time.sleep(0.05)
  assert all(ended_too(pids[n]) for n in range(2))
  return ended


@linux
@pytest.mark.slow
def test_when_one_is_killed_the_others_end_and_the_run_resumes(command, whole):
  """At its beginning, in a step, and while it saves; their parent, too."""
  draw = random.Random(0)
  workdir = command.folder / 'killed'
  for when, which in (('start', 1), ('step', 0), ('save', 0), ('save', 1)):
    code, _, err = stopped(command, workdir, which, signal.SIGKILL, when, draw)
    assert code == 1
    assert err == (
      f'qdora: process {which} of 2 was ended by SIGKILL, and all have been '
      'stopped; the same command continues\n'
    )
  assert not list(command.folder.glob('qdora-*'))
  code, _, _ = stopped(command, workdir, 'parent', signal.SIGKILL, 'step', draw)
  assert code == -signal.SIGKILL
  code, out, err = command.run(workdir, '--processes=2')
  assert (code, err) == (0, '')
  assert 'continuing after step' in out
  assert_ends_like(workdir, whole)


@linux
@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_signal_to_any_of_them_saves_and_ends_all(command, whole):
  draw = random.Random(1)
  workdir = command.folder / 'told'
  step = 0
  for told, name in (
    ('parent', 'SIGTERM'),
    ('parent', 'SIGINT'),
    (0, 'SIGTERM'),
    (1, 'SIGTERM'),
  ):
    number = signal.Signals[name]
    code, out, err = stopped(command, workdir, told, number, 'step', draw)
    if step:
      assert f'continuing after step {step}\n' in out
    step = read_log(workdir / 'metrics.jsonl')[-1]['step']
    assert step < STEPS
    assert (code, err) == (
      128 + number,
      f'{name}: saved after step {step}; the same command continues\n',
    )
    assert newest(workdir) == step
  code, out, err = command.run(workdir, '--processes=2')
  assert (code, err) == (0, '')
  assert f'continuing after step {step}\n' in out
  assert_ends_like(workdir, whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_all(command, whole):
  workdir = shutil.copytree(whole, command.folder / 'damaged')
  files = (workdir / 'checkpoints' / str(STEPS)).glob('state/d/*')
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-100])
  code, out, err = command.run(workdir, '--processes=2')
  assert (code, err) == (0, '')
  assert out.count(f'checkpoints/{STEPS} is damaged') == 1
  assert f'continuing after step {STEPS - 2}\n' in out
  assert (workdir / 'checkpoints-damaged' / str(STEPS)).is_dir()
  assert_ends_like(workdir, whole)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
  'lost', [0, pytest.param(1, marks=pytest.mark.exhaustive)]
)
def test_machines_of_a_cluster_tell_of_one_that_is_lost(command, lost):
  """Each with a command of its own, as on two machines."""
  (place,) = {place.coordinator for place in processes.local(2)}
  ends = [command.folder / f'machine-{n}-{lost}' for n in range(2)]
  shared = command.folder / f'cluster-{lost}'
  shared.mkdir()
  for n in range(2):
    # One run folder that both see.
    ends[n].symlink_to(shared)
  machines = [
    command.start(
      ends[n],
      f'--coordinator={place}',
      '--num-processes=2',
      f'--process-id={n}',
    )
    for n in range(2)
  ]
  pids = workers(machines[0], 1) | workers(machines[1], 1)
  assert wait_for(machines[0], new_row(ends[0]))
  os.kill(pids[lost], signal.SIGKILL)
  code, _, err = command.ended(machines[lost], ends[lost])
  assert code == 1 and err.startswith(
    f'qdora: process {lost} of 2 was ended by'
  )
  other = 1 - lost
  code, _, err = command.ended(machines[other], ends[other])
  assert code and err.count('\n') == 1
  assert f'process {other} of 2 ' in err and 'lost' in err
  assert err.endswith('the same command continues\n')


def test_who_is_lost_is_missed_within_a_minute():
  assert processes.HEARTBEAT + processes.GRACE < 60


def refused(capsys, tmp_path, *words):
  config = tiny.config_file(tmp_path, tmp_path)
  args = ['--config', str(config), '--workdir', str(tmp_path / 'run')]
  assert main(['train', *args, *words]) == 1
  assert not (tmp_path / 'run').exists()
  return capsys.readouterr().err


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--processes=0'], '--processes=0: expected at least 1'),
    (['--num-processes=2', '--process-id=1'], 'are given together'),
    (
      ['--processes=2', '--coordinator=a:1'],
      'on one machine, --processes alone',
    ),
    (
      ['--coordinator=a', '--num-processes=2', '--process-id=1'],
      '--coordinator=a: expected HOST:PORT',
    ),
    (
      ['--coordinator=a:1', '--num-processes=2', '--process-id=2'],
      '--process-id=2: expected at least 0 and less than --num-processes=2',
    ),
  ],
)
def test_places_that_cannot_be_are_refused(capsys, tmp_path, words, message):
  err = refused(capsys, tmp_path, *words)
  assert message in err and err.count('\n') == 1


def test_more_processes_than_gpus_are_refused(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5')
  for count in (3, 4):
    err = refused(capsys, tmp_path, f'--processes={count}')
    assert f'--processes={count}: 2 GPUs cannot be shared equally' in err
  shares = processes._shares(2)
  assert [s['CUDA_VISIBLE_DEVICES'] for s in shares] == ['4', '5']
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert processes._shares(4) == [{}] * 4


def test_a_mesh_takes_all_devices_of_many_processes(monkeypatch, tmp_path):
  monkeypatch.setattr(opening.jax, 'process_count', lambda: 2)
  config = tiny.run_config(tmp_path, **{'mesh.fsdp': 4})
  words = r'uses 4 of 8 devices.* of 2 processes .*expected a product of 8'
  with pytest.raises(ValueError, match=words):
    opening.mesh_of(config)
  assert opening.mesh_of(dataclasses.replace(config, mesh=_eight())).size == 8


def _eight():
  return run.RunConfig.make(tiny.config('m', **{'mesh.fsdp': -1})).mesh
