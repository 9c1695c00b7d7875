"""Whatever ends a run, the same command again makes the same adapter.

Real commands in processes of their own are killed, told to stop, given damaged
checkpoints and full disks; what they end with is compared, bit for bit, with
what one of them made that nobody disturbed.
"""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny
from command import (
  Command,
  assert_ends_like,
  half_saved,
  new_row,
  newest,
  steady,
  wait_for,
)
from tiny import quick_compiles  # noqa: F401

from qdora_jax import AdapterSpec, QuantSpec, checkpoint, init_adapter, train
from qdora_jax.chat import encode
from qdora_jax.checkpoint import Checkpoints
from qdora_jax.data import Batches
from qdora_jax.metrics import read_log

STEPS = 24
# One kernel keeps the many starts short.
ONE = r'.*/q/kernel'


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  """Two mixed sources, packed; dropout, a schedule, microbatches."""
  folder = tmp_path_factory.mktemp('resume')
  sources = {}
  for name, low, weight in (('easy', 0, 1.0), ('hard', 30, 3.0)):
    rows = (
      {'prompt': f'{a}+{b}=', 'completion': str(a + b)}
      for a in range(low, low + 6)
      for b in range(low, low + 6)
    )
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    sources[f'data.mix[{str(path)!r}]'] = weight
  return Command.make(
    folder,
    **sources,
    **{
      'data.packing': True,
      'data.train_size': 0,
      'data.eval_size': 0,
      'train.seq_len': 40,
      'train.steps': STEPS,
      'train.save_every': 1,
      'train.microbatches': 2,
      'adapter.dropout': 0.1,
      'adapter.targets': ONE,
      'quant.targets': ONE,
      'optim.schedule': 'cosine',
      'optim.warmup_steps': 3,
    },
  )


@pytest.fixture(scope='module')
def whole(command):
  """The folder of a run that nobody disturbed."""
  workdir = command.folder / 'whole'
  code, _, err = command.run(workdir)
  assert (code, err) == (0, '')
  assert [row['step'] for row in steady(workdir)] == list(range(1, STEPS + 1))
  return workdir


def kill(command, workdir, aim, draw):
  """Starts the command and kills it; says where that hit, None if it had ended.

  Args:
    aim: 'start' kills soon, 'step' after a row of the log, 'save' while orbax
      writes.
    draw: gives the delays.
  """
  before = half_saved(workdir)
  process = command.start(workdir)
  try:
    running = new_row(workdir)
    began = running()
    if aim == 'start':
      time.sleep(draw.uniform(0, 3))
    elif wait_for(process, running):
      time.sleep(draw.uniform(0, 0.3))
      if aim == 'save':
        # Not the first one: there is something to go on from.
        wait_for(process, lambda: newest(workdir))
        wait_for(process, lambda: half_saved(workdir) - before)
        # All of its phases: beginning, arrays, renaming.
        time.sleep(draw.choice([0, draw.uniform(0, 0.15)]))
      else:
        # On a busy machine some save is nearly always under way.
        wait_for(process, lambda: not half_saved(workdir) - before)
  finally:
    began = running()
    process.kill()
  code = process.wait()
  assert code in (0, -signal.SIGKILL)
  if code == 0:
    return None
  if half_saved(workdir) - before:
    return 'save'
  return 'step' if began else 'start'


def killed_and_continued(command, whole, name, aims, draw):
  """Kills as often as there are aims, in as many runs as that takes."""
  hits, n = Counter(), 0
  while sum(hits.values()) < len(aims):
    workdir = command.folder / f'{name}-{n}'
    n += 1
    while sum(hits.values()) < len(aims):
      hit = kill(command, workdir, aims[sum(hits.values())], draw)
      if hit is None:
        break
      hits[hit] += 1
    code, _, err = command.run(workdir)
    assert (code, err) == (0, '')
    assert_ends_like(workdir, whole)
  return hits


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(command, whole):
  draw = random.Random(0)
  aims = 5 * ['start'] + 6 * ['step'] + 9 * ['save']
  draw.shuffle(aims)
  hits = killed_and_continued(command, whole, 'killed', aims, draw)
  print(dict(hits))
  assert hits.total() == len(aims) >= 20
  assert hits['save'] >= 3
  assert hits['start'] >= 2 and hits['step'] >= 2


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_and_the_command_continues(command, whole):
  workdir = command.folder / 'stopped'
  for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
    process = command.start(workdir)
    assert wait_for(process, new_row(workdir))
    process.send_signal(number)
    got, _, err = command.ended(process, workdir)
    assert got == code
    step = read_log(workdir / 'metrics.jsonl')[-1]['step']
    assert step < STEPS
    assert err == (
      f'{number.name}: saved after step {step}; the same command continues\n'
    )
    assert newest(workdir) == step
    assert not half_saved(workdir)
  code, out, err = command.run(workdir)
  assert (code, err) == (0, '')
  assert f'continuing after step {step}\n' in out
  assert_ends_like(workdir, whole)


def copied(whole, name):
  """The finished run without its adapter, in another folder."""
  workdir = shutil.copytree(whole, whole.with_name(name))
  shutil.rmtree(workdir / 'adapter')
  return workdir


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_alone(command, whole):
  """Named and set aside, where the next one is saved; with leftovers."""
  workdir = copied(whole, 'damaged')
  saved = workdir / 'checkpoints'
  largest = max(
    saved.glob(f'{STEPS}/state/d/*'), key=lambda p: p.stat().st_size
  )
  largest.write_bytes(largest.read_bytes()[:-100])
  (saved / str(STEPS + 1)).mkdir()
  (saved / f'{STEPS + 1}.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  code, out, err = command.run(workdir)
  assert (code, err) == (0, '')
  assert f'the checkpoint {saved}/{STEPS} is damaged' in out
  assert f'moved to {workdir}/checkpoints-damaged/{STEPS}\n' in out
  assert f'continuing after step {STEPS - 1}\n' in out
  assert_ends_like(workdir, whole)
  assert (workdir / 'checkpoints-damaged' / str(STEPS) / 'state').is_dir()
  assert (saved / str(STEPS) / 'state').is_dir()


@functools.cache
def state_of(step):
  """An adapter, its moments and a key; arrays large and small."""
  _, base, _ = tiny.loaded()
  spec = AdapterSpec('dora', 8, targets=ONE)
  adapter = init_adapter(jax.random.key(0), base, spec)
  adapter = tiny.perturbed(adapter, seed=step)
  optimizer = optax.adamw(1e-3)
  grads = jax.tree.map(jnp.sin, adapter)
  _, moments = optimizer.update(grads, optimizer.init(adapter), adapter)
  key = jax.random.key_data(jax.random.key(step))
  return {'trained': adapter, 'optimizer': moments, 'rng': key}


def meta_of(step):
  return {
    'base': 'llama nf4',
    'data': {'next_index': 3 * step},
    'skipped': step - 1,
    'log': 1000 * step,
  }


BASE = {'base': 'llama nf4'}


@pytest.fixture
def saved(tmp_path):
  """Steps 1 and 2 in tmp_path/checkpoints."""
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  for step in (1, 2):
    checkpoints.save(step, state_of(step), meta_of(step))
  checkpoints.close()
  return tmp_path / 'checkpoints'


def restored(directory, **options):
  """(what is restored, what was printed), as another process would."""
  checkpoints = Checkpoints(directory)
  like = jax.tree.map(jnp.zeros_like, state_of(1))
  try:
    with contextlib.redirect_stdout(io.StringIO()) as out:
      return checkpoints.restore(like, BASE, **options), out.getvalue()
  finally:
    checkpoints.close()


def assert_is(got, step):
  assert got.step == step
  tiny.assert_same(got.state, state_of(step))
  assert {key: got.meta[key] for key in meta_of(step)} == meta_of(step)


def damages(data):
  """What may become of a file: {name: bytes, or None for no file}."""
  middle = len(data) // 2
  flipped = bytearray(data)
  if data:
    flipped[middle] ^= 4
  return {
    'cut': data[:middle],
    'emptied': b'',
    'deleted': None,
    'flipped': bytes(flipped),
  }


def test_any_damage_to_any_file_is_named_or_harmless(saved):
  """Every file of the newest checkpoint, in four ways."""
  files = [p for p in sorted((saved / '2').rglob('*')) if p.is_file()]
  named = set()
  for path in files:
    data = path.read_bytes()
    for damage, left in damages(data).items():
      if left is None:
        path.unlink()
      else:
        path.write_bytes(left)
      got, out = restored(saved)
      path.write_bytes(data)
      if got.step == 2:
        assert out == ''
        assert_is(got, 2)
        continue
      named.add((str(path.relative_to(saved / '2')), damage))
      assert_is(got, 1)
      assert out.startswith(f'the checkpoint {saved}/2 is damaged (')
      assert out.endswith('); passed over\n') and out.count('\n') == 1
  # Nothing of meta, of the arrays and of what finds them goes unseen.
  for damage in damages(b'..'):
    assert ('meta/metadata', damage) in named
    assert ('state/manifest.ocdbt', damage) in named
    assert any(p.startswith('state/d/') for p, d in named if d == damage)
  assert_is(restored(saved)[0], 2)


def test_any_bit_of_meta_is_watched_over(saved):
  """Wherever data and log stood: JSON stays JSON when a digit changes."""
  path = saved / '2' / 'meta' / 'metadata'
  data = path.read_bytes()
  for word in (b'llama', b'"next_index": 6', b'"skipped": 1', b'2000'):
    assert data.count(word) == 1
    flipped = bytearray(data)
    flipped[data.index(word) + len(word) - 1] ^= 1
    path.write_bytes(bytes(flipped))
    got, out = restored(saved)
    assert_is(got, 1)
    assert '/2 is damaged (meta is not what was saved)' in out
  path.write_bytes(data)
  assert_is(restored(saved)[0], 2)


def test_a_checksum_tells_any_constant_from_any_other():
  """As magnitudes and fresh moments are: much alike."""
  sums = {
    int(checkpoint._checksum(jnp.full(shape, value, jnp.float32)))
    for shape in ((64,), (32, 32))
    for value in (0.0, 1.0, 2.0, -2.0, 4.0)
  }
  assert len(sums) == 10


def test_arrays_that_were_swapped_are_noticed(tmp_path):
  """Whole files, each sound in itself, in the wrong checkpoint."""
  like = {'a': jnp.zeros((64, 64)), 'b': jnp.zeros((64, 64))}
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2):
    tree = {'a': jnp.full((64, 64), step), 'b': jnp.full((64, 64), -step)}
    checkpoints.save(step, jax.tree.map(jnp.float32, tree), {})
  checkpoints.close()
  shutil.rmtree(tmp_path / '2' / 'state')
  shutil.copytree(tmp_path / '1' / 'state', tmp_path / '2' / 'state')
  checkpoints = Checkpoints(tmp_path)
  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert checkpoints.restore(like, {}).step == 1
  checkpoints.close()
  assert '/2 is damaged (a is not what was saved)' in out.getvalue()


def test_what_a_kill_leaves_behind_is_passed_over(saved):
  (saved / '5').mkdir()
  (saved / '4.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  (saved / '3').mkdir()
  (saved / '3' / '_CHECKPOINT_METADATA').write_text('')
  got, out = restored(saved, set_aside=True)
  assert_is(got, 2)
  for step in (5, 3):
    assert f'the checkpoint {saved}/{step} is damaged' in out
    assert f'moved to {saved}-damaged/{step}\n' in out
    assert not (saved / str(step)).exists()
  # And all of these steps can be saved.
  checkpoints = Checkpoints(saved)
  for step in (3, 4, 5):
    checkpoints.save(step, state_of(step), meta_of(step))
  checkpoints.close()
  got, out = restored(saved)
  assert_is(got, 5)
  assert out == ''


def test_if_none_is_whole_nothing_is_touched(saved):
  for step in (1, 2):
    path = saved / str(step) / 'state' / 'manifest.ocdbt'
    path.write_bytes(path.read_bytes()[:20])
  before = listing(saved.parent)
  words = rf'no checkpoint in {saved} is whole \(steps 2, 1\); .*--workdir'
  for _ in range(2):
    with pytest.raises(ValueError, match=words):
      restored(saved, set_aside=True)
    assert listing(saved.parent) == before


def listing(folder):
  """{path: bytes} of all files."""
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in sorted(folder.rglob('*'))
    if p.is_file()
  }


def refused(command, workdir, *overrides):
  """What stderr says of a command that fails and changes nothing."""
  before = listing(workdir)
  code, _, err = command.run(workdir, *overrides)
  assert code == 1
  assert listing(workdir) == before
  assert err.startswith('qdora train: ') and err.count('\n') == 1
  return err


@pytest.mark.slow
def test_a_folder_of_another_config_is_refused(command, whole):
  workdir = copied(whole, 'other')
  err = refused(command, workdir, '--config.optim.lr=0.5')
  assert f'{workdir} holds a run of another config: ' in err
  assert 'config.optim.lr was 0.01, is 0.5' in err
  assert f'--workdir, such as {workdir}-2' in err


@pytest.mark.slow
def test_a_checkpoint_of_another_base_is_refused(command, whole):
  workdir = copied(whole, 'base')
  path = command.folder / 'model' / 'config.json'
  text = path.read_text()
  path.write_text(json.dumps(json.loads(text) | {'rms_norm_eps': 1e-3}))
  try:
    err = refused(command, workdir)
  finally:
    path.write_text(text)
  assert f'{workdir}/checkpoints/{STEPS} belongs to another base: ' in err
  assert ', here ' in err


@pytest.fixture
def mounted(tmp_path):
  """mounted(size) is a folder on a disk of that many bytes, where permitted."""
  folders = []

  def mount(size):
    folder = tmp_path / f'disk-{len(folders)}'
    folder.mkdir()
    options = ['-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)]
    done = subprocess.run(['mount', *options], capture_output=True)
    if done.returncode:
      pytest.skip('mounting a small disk is not permitted here')
    folders.append(folder)
    return folder

  yield mount
  for folder in folders:
    subprocess.run(['umount', '-l', str(folder)], check=True)


def size_of(folder):
  """Bytes on a disk of 4 KiB pages."""
  sizes = [p.stat().st_size for p in folder.rglob('*') if p.is_file()]
  return sum(4096 * -(-size // 4096) for size in sizes)


def fill(disk, room):
  """A file that leaves so many bytes."""
  free = shutil.disk_usage(disk).free
  (disk / 'filler').write_bytes(bytes(free - room))


@pytest.mark.slow
def test_a_full_disk_says_so_and_room_continues(command, whole, mounted):
  one = size_of(whole / 'checkpoints') // 2
  disk = mounted(32 * 2**20)
  workdir = disk / 'run'
  # For one, but not for another.
  fill(disk, 2**20 + one)
  code, _, err = command.run(workdir)
  assert code == 1
  assert err.count('\n') == 1
  saved = workdir / 'checkpoints'
  words = f'qdora train: no checkpoint could be written to {saved} (No space'
  assert err.startswith(words)
  assert f'MB free; {saved}/1 is whole)' in err
  assert err.endswith('make room, and the same command continues\n')
  (disk / 'filler').unlink()
  code, out, err = command.run(workdir)
  assert (code, err) == (0, '')
  assert 'damaged' not in out
  assert_ends_like(workdir, whole)


@pytest.mark.slow
def test_results_for_which_there_is_no_room(command, whole, mounted):
  disk = mounted(32 * 2**20)
  workdir = disk / 'run'
  shutil.copytree(whole, workdir, ignore=lambda *_: ['adapter'])
  fill(disk, 4096)
  code, _, err = command.run(workdir)
  assert (code, err) == (
    1,
    f'qdora train: --workdir={workdir} cannot be written (No space left on '
    'device); expected a folder that can be written, with room for '
    'checkpoints: the same command then continues\n',
  )
  assert listing(workdir / 'checkpoints') == listing(whole / 'checkpoints')
  (disk / 'filler').unlink()
  assert command.run(workdir)[0] == 0
  assert_ends_like(workdir, whole)


@pytest.mark.slow
def test_a_log_that_cannot_be_written_says_so_and_room_continues(
  command, whole
):
  workdir = copied(whole, 'log')
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  log, kept = workdir / 'metrics.jsonl', workdir / 'kept'
  log.rename(kept)
  # What is written there fails with ENOSPC.
  log.symlink_to('/dev/full')
  code, _, err = command.run(workdir)
  assert (code, err) == (
    1,
    f'qdora train: {log}: No space left on device; make room, and the same '
    'command continues\n',
  )
  kept.rename(log)
  code, _, err = command.run(workdir)
  assert (code, err) == (0, '')
  assert_ends_like(workdir, whole)


@pytest.fixture
def read_only():
  """read_only(folder) takes the right to write to all in it."""
  folders = []

  def take(folder):
    if os.geteuid():
      for path in (folder, *folder.rglob('*')):
        path.chmod(path.stat().st_mode & ~0o222)
    else:
      # No mode stops the superuser.
      done = subprocess.run(
        ['mount', '--bind', str(folder), str(folder)], capture_output=True
      )
      if done.returncode:
        pytest.skip('making a folder read-only is not permitted here')
      command = ['mount', '-o', 'remount,bind,ro', str(folder)]
      subprocess.run(command, check=True)
    folders.append(folder)

  yield take
  for folder in folders:
    if os.geteuid():
      for path in (folder, *folder.rglob('*')):
        path.chmod(path.stat().st_mode | 0o200)
    else:
      subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named(
  command, whole, tmp_path, read_only
):
  workdir = copied(whole, 'read-only')
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  empty = tmp_path / 'empty'
  empty.mkdir()
  for folder in (workdir, empty):
    read_only(folder)
  for place in (empty / 'run', workdir):
    err = refused(command, place)
    assert f'--workdir={place} cannot be written (' in err
    assert 'expected a folder that can be written' in err


def parts():
  """(model, base, adapter, batches) as in a notebook."""
  model, base, tokenizer = tiny.loaded(quant=QuantSpec(ONE))
  spec = AdapterSpec('dora', 4, targets=ONE, dropout=0.1)
  adapter = init_adapter(jax.random.key(0), base, spec)
  easy, hard = (
    [
      encode(tokenizer, {'prompt': f'{a}+7=', 'completion': str(a + 7)})
      for a in range(low, low + 20)
    ]
    for low in (0, 90)
  )
  batches = Batches({'easy': easy, 'hard': hard}, 4, 32, packing=True)
  return model, base, adapter, batches


OPTIONS = {
  'steps': 6,
  'lr': optax.cosine_decay_schedule(1e-2, 6),
  'save_every': 2,
}


def interrupt(step, row, trained):
  if step == 6:
    raise KeyboardInterrupt


def enough(step, row, trained):
  if step == 3:
    raise StopIteration


@pytest.mark.parametrize('source', ['Batches', 'list'])
@pytest.mark.slow
def test_the_same_fit_again_continues(tmp_path, source):
  """Stopped by a callback, by Ctrl-C in one, and by data that end."""
  model, base, adapter, batches = parts()
  if source == 'list':
    batches = [batches[n] for n in range(6)]
  want, rows = train.fit(model, base, adapter, batches, **OPTIONS)
  options = {**OPTIONS, 'workdir': tmp_path}

  if source == 'list':
    train.fit(model, base, adapter, batches[:3], **options)
    last = 3
  else:
    train.fit(model, base, adapter, batches, callbacks=[enough], **options)
    with pytest.raises(KeyboardInterrupt):
      train.fit(model, base, adapter, batches, callbacks=[interrupt], **options)
    # One row more than are saved: it will be written again.
    assert len(steady(tmp_path)) == 5
    last = 4
  got = train.fit(model, base, adapter, batches, **options)
  assert [row['step'] for row in got.rows] == list(range(last + 1, 7))
  tiny.assert_same(got.trained, want)
  for mine, other in zip(steady(tmp_path), rows, strict=True):
    assert mine == {k: other[k] for k in mine}
  # There is nothing left to do.
  again = train.fit(model, base, adapter, batches, **options)
  assert again.rows == []
  tiny.assert_same(again.trained, want)


def test_fits_identity_refuses_another_one(tmp_path):
  model, base, adapter, batches = parts()
  options = {**OPTIONS, 'steps': 1, 'workdir': tmp_path}
  train.fit(model, base, adapter, batches, identity={'base': 'a'}, **options)
  before = listing(tmp_path)
  for identity in ({'base': 'b'}, {'base': 'a', 'config': 'c'}):
    what, here = list(identity.items())[-1]
    words = f'checkpoints/1 belongs to another {what}: .*, here {here}'
    with pytest.raises(ValueError, match=words):
      train.fit(model, base, adapter, batches, identity=identity, **options)
    assert listing(tmp_path) == before
