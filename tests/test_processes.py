"""Many processes train as one does; when one is lost, all end and go on later.

Real processes, joined through jax.distributed, with CPU devices of their own.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import processes, run
from qdora_jax.cli import main
from qdora_jax.finetune import fine_tune
from qdora_jax.metrics import read_log

ONE = r'.*/q/kernel'
TWO = r'.*/(q|down)/kernel'
# What a clock and a machine's load decide.
LOOSE = {'seconds', 'tokens_per_second', 'memory_bytes'}
# What C++ and Python say that nobody should have to read.
TRACES = ('Traceback', 'F0000', 'terminate called', '*** Check', '[Gloo]')


@dataclasses.dataclass
class Command:
  """`qdora train` with one config, in processes with some devices each."""

  folder: Path
  config: Path

  def start(self, workdir: Path, *words: str, devices: int = 1, **more: str):
    """Starts it; what it prints goes into files."""
    command = ['train', '--config', str(self.config), '--workdir', str(workdir)]
    env = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'TMPDIR': str(self.folder),
      # Or it says that there is no torch.
      'TRANSFORMERS_NO_ADVISORY_WARNINGS': '1',
      **more,
    }
    out, err = self.outputs(workdir)
    with out.open('w') as stdout, err.open('w') as stderr:
      return subprocess.Popen(
        [sys.executable, '-m', 'qdora_jax.cli', *command, *words],
        stdout=stdout,
        stderr=stderr,
        env=env,
      )

  def run(self, workdir: Path, *words: str, devices: int = 1):
    return self.ended(self.start(workdir, *words, devices=devices), workdir)

  def outputs(self, workdir: Path) -> list[Path]:
    return [self.folder / f'{workdir.name}.{end}' for end in ('out', 'err')]

  def ended(self, process: subprocess.Popen, workdir: Path):
    """(exit code, stdout, stderr), neither with a trace."""
    code = process.wait(timeout=400)
    out, err = (path.read_text() for path in self.outputs(workdir))
    for text in (out, err):
      assert not any(words in text for words in TRACES), text
    return code, out, err


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  return made(tmp_path_factory.mktemp('processes'))


def made(folder, **overrides):
  """A tiny run over all devices, saved at every second step."""
  (folder / 'model').mkdir()
  tiny.write(folder / 'model')
  path = folder / 'sums.jsonl'
  rows = ((a, b) for a in range(8) for b in range(8))
  path.write_text(
    ''.join(
      json.dumps({'prompt': f'{a}+{b}=', 'completion': str(a + b)}) + '\n'
      for a, b in rows
    )
  )
  config = tiny.config_file(
    folder,
    folder / 'model',
    **{
      'data.name': '',
      'data.path': str(path),
      'data.train_size': 0,
      'data.eval_size': 0,
      'adapter.targets': ONE,
      'quant.targets': ONE,
      'adapter.dropout': 0.1,
      'train.steps': 8,
      'mesh.fsdp': -1,
      **overrides,
    },
  )
  return Command(folder, config)


def steady(workdir):
  rows = read_log(workdir / 'metrics.jsonl')
  return [{k: row[k] for k in row.keys() - LOOSE} for row in rows]


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


def assert_same_end(workdir, whole):
  assert steady(workdir) == steady(whole)
  for name in ('adapter_model.safetensors', 'adapter_config.json'):
    mine = (workdir / 'adapter' / name).read_bytes()
    assert mine == (whole / 'adapter' / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
  """On two devices each, beside four of one process; written and said once."""
  command = made(tmp_path, **{'train.steps': 2})
  many = tmp_path / 'many'
  code, out, err = command.run(many, '--processes=2', devices=2)
  assert (code, err) == (0, '')
  assert out.count('trained: ') == out.count('results in') == 1
  summary = json.loads((many / 'summary.json').read_text())
  assert len(summary['devices']) == 4
  config = json.loads((many / 'config.json').read_text())
  config['mesh']['fsdp'] = 4
  fine_tune(tiny.RunConfig.make(config), tmp_path / 'one')
  assert_agree(many, tmp_path / 'one', 1e-5)
  assert not list(tmp_path.glob('qdora-*'))


@pytest.mark.slow
@pytest.mark.parametrize('method', ['none', 'dora'])
def test_eight_devices_of_two_processes_are_eight_of_one(tmp_path, method):
  """Sharded over both, evaluated and generated from while training."""
  overrides = {
    'adapter.method': method,
    'quant.format': 'nf4' if method == 'dora' else 'none',
    'adapter.targets': TWO,
    'quant.targets': TWO,
    'adapter.dropout': 0.0,
    'optim.lr': 1e-3,
    'data.eval_size': 4,
    'eval.every': 2,
    'train.microbatches': 2,
    'train.batch_size': 16,
    'train.keep_best': 1,
    'train.steps': 4,
  }
  command = made(tmp_path, **overrides)
  ends = {}
  for name, count in (('many', 2), ('one', 1)):
    ends[name] = tmp_path / name
    code, out, err = command.run(
      ends[name], f'--processes={count}', devices=8 // count
    )
    assert (code, err) == (0, '')
    assert re.search(r'best checkpoint is of step \d, held-out loss', out)
  if method == 'dora':
    assert_agree(ends['many'], ends['one'], 1e-5)
  for key in ('loss', 'grad_norm', 'held_out_loss'):
    losses = [
      [row[key] for row in steady(end) if key in row] for end in ends.values()
    ]
    assert len(losses[0]) >= 2
    np.testing.assert_allclose(*losses, rtol=1e-5)
  # What two processes saved, one has: on eight devices, and on two.
  best = json.loads((ends['many'] / 'summary.json').read_text())
  best = best['best_checkpoint']
  for devices in (8, 2):
    words = ['evaluate', '--workdir', str(ends['many']), '--checkpoint', 'best']
    flags = f'--xla_force_host_platform_device_count={devices}'
    done = subprocess.run(
      [sys.executable, '-m', 'qdora_jax.cli', *words],
      env={
        **os.environ,
        'XLA_FLAGS': flags,
        'TRANSFORMERS_NO_ADVISORY_WARNINGS': '1',
      },
      capture_output=True,
      text=True,
    )
    assert (done.returncode, done.stderr) == (0, '')
    loss = re.search(r'held-out loss (\S+)', done.stdout)[1]
    assert float(loss) == pytest.approx(best['held_out_loss'], abs=2e-4)


@pytest.fixture(scope='module')
def whole(command):
  """The folder of a run of two processes that nobody disturbed."""
  workdir = command.folder / 'whole'
  code, _, err = command.run(workdir, '--processes=2')
  assert (code, err) == (0, '')
  return workdir


def workers(parent, count=2, timeout=60.0):
  """{index: pid} of a command's processes."""
  until = time.monotonic() + timeout
  while True:
    found = {}
    for path in Path('/proc').glob('[0-9]*'):
      with contextlib.suppress(OSError, ValueError, IndexError):
        if int(stat(path)[1]) != parent.pid:
          continue
        place = re.search(
          rb'QDORA_PROCESS=\S+ \d+ (\d+) ', (path / 'environ').read_bytes()
        )
        if place:
          found[int(place[1])] = int(path.name)
    if len(found) == count:
      return found
    assert parent.poll() is None and time.monotonic() < until
    time.sleep(0.02)


def stat(path):
  """State, parent, ... of a process, as Linux tells."""
  return (path / 'stat').read_text().rpartition(')')[2].split()


def ended_too(pid):
  """Whether a process has ended, or is but waited for."""
  try:
    return stat(Path(f'/proc/{pid}'))[0] == 'Z'
  except OSError:
    return True


def wait_for_rows(process, workdir, count):
  until = time.monotonic() + 300
  path = workdir / 'metrics.jsonl'
  while not path.exists() or len(read_log(path)) < count:
    assert process.poll() is None and time.monotonic() < until
    time.sleep(0.01)


def wait_for_checkpoint(process, workdir):
  until = time.monotonic() + 300
  saved = workdir / 'checkpoints'
  while not any(path.name.isdigit() for path in saved.glob('*')):
    assert process.poll() is None and time.monotonic() < until
    time.sleep(0.01)


linux = pytest.mark.skipif(
  sys.platform != 'linux', reason='finds processes in /proc'
)


@linux
@pytest.mark.slow
@pytest.mark.parametrize('which', [0, 1])
def test_when_one_is_killed_the_others_end_and_the_run_resumes(
  command, whole, which
):
  """At its beginning, in a step, and while it saves."""
  draw = random.Random(which)
  workdir = command.folder / f'killed-{which}'
  for rows in (0, 1, 4):
    process = command.start(workdir, '--processes=2')
    pids = workers(process)
    if rows:
      wait_for_rows(process, workdir, rows)
    if rows == 4:
      # Something is saved by now, from which the run can go on.
      wait_for_checkpoint(process, workdir)
    else:
      time.sleep(draw.uniform(0, 1))
    os.kill(pids[which], signal.SIGKILL)
    began = time.monotonic()
    code, _, err = command.ended(process, workdir)
    assert time.monotonic() - began < 60
    assert code == 1
    assert err == (
      f'qdora: process {which} of 2 was ended by SIGKILL, and all have been '
      'stopped; the same command continues\n'
    )
    assert all(map(ended_too, pids.values()))
  code, out, err = command.run(workdir, '--processes=2')
  assert (code, err) == (0, '')
  assert 'continuing after step' in out
  assert_same_end(workdir, whole)
  assert not list(command.folder.glob('qdora-*'))


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
  ('told', 'name'),
  [
    ('parent', 'SIGTERM'),
    ('parent', 'SIGINT'),
    ('first', 'SIGTERM'),
    ('second', 'SIGTERM'),
  ],
)
def test_a_signal_to_any_of_them_saves_and_ends_all(command, whole, told, name):
  number = signal.Signals[name]
  workdir = command.folder / f'{name}-{told}'
  process = command.start(workdir, '--processes=2')
  pids = {'parent': process.pid}
  pids['first'], pids['second'] = workers(process).values()
  wait_for_rows(process, workdir, 1)
  os.kill(pids[told], number)
  code, _, err = command.ended(process, workdir)
  step = read_log(workdir / 'metrics.jsonl')[-1]['step']
  assert (code, err) == (
    128 + number,
    f'{name}: saved after step {step}; the same command continues\n',
  )
  assert (workdir / 'checkpoints' / str(step)).is_dir()
  code, out, err = command.run(workdir, '--processes=2')
  assert (code, err) == (0, '')
  assert f'continuing after step {step}\n' in out
  assert_same_end(workdir, whole)


@linux
@pytest.mark.slow
def test_when_the_parent_is_killed_its_processes_end(command):
  workdir = command.folder / 'orphans'
  process = command.start(workdir, '--processes=2')
  pids = workers(process)
  wait_for_rows(process, workdir, 1)
  process.kill()
  process.wait()
  until = time.monotonic() + 30
  while not all(map(ended_too, pids.values())):
    assert time.monotonic() < until
    time.sleep(0.05)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_all(command, whole):
  workdir = command.folder / 'damaged'
  code, _, _ = command.run(workdir, '--processes=2')
  assert code == 0
  files = (workdir / 'checkpoints' / '8').glob('state/d/*')
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-100])
  code, out, err = command.run(workdir, '--processes=2')
  assert (code, err) == (0, '')
  assert out.count('checkpoints/8 is damaged') == 1
  assert 'continuing after step 6\n' in out
  assert (workdir / 'checkpoints-damaged' / '8').is_dir()
  assert_same_end(workdir, whole)


@linux
@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
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
  wait_for_rows(machines[0], ends[0], 1)
  os.kill(pids[lost], signal.SIGKILL)
  began = time.monotonic()
  code, _, err = command.ended(machines[lost], ends[lost])
  assert code == 1 and err.startswith(
    f'qdora: process {lost} of 2 was ended by'
  )
  other = 1 - lost
  code, _, err = command.ended(machines[other], ends[other])
  assert time.monotonic() - began < 60
  assert code and err.count('\n') == 1
  assert f'process {other} of 2 ' in err and 'lost' in err
  assert err.endswith('the same command continues\n')


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
  monkeypatch.setattr(run.jax, 'process_count', lambda: 2)
  config = tiny.run_config(tmp_path, **{'mesh.fsdp': 4})
  words = r'uses 4 of 8 devices.* of 2 processes .*expected a product of 8'
  with pytest.raises(ValueError, match=words):
    run._mesh(config)
  assert run._mesh(dataclasses.replace(config, mesh=_eight())).size == 8


def _eight():
  return run.RunConfig.make(tiny.config('m', **{'mesh.fsdp': -1})).mesh
