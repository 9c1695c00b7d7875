"""What is compiled: once, no more for many layers, and kept for the next start.

That a step is traced once by every method is in test_train.py's battery.
"""

import ctypes
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from test_plan import METHODS, decoder
from test_train import ONE, sums
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  compiled,
  init_adapter,
  sharding,
  train,
)
from qdora_jax.job import Job, trees
from qdora_jax.model import Decoder
from qdora_jax.optim import make_optimizer

KEYS = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
  'jax_enable_compilation_cache',
  'jax_compilation_cache_max_size',
)


@pytest.fixture
def settings(monkeypatch, tmp_path):
  """JAX's, as they are at a program's start; QDORA_CACHE is an empty folder."""
  before = {key: getattr(jax.config, key) for key in KEYS}
  jax.config.update('jax_enable_compilation_cache', True)
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  monkeypatch.setenv('QDORA_CACHE', str(tmp_path / 'cache'))
  yield lambda: jax.config.jax_compilation_cache_dir
  for key, value in before.items():
    jax.config.update(key, value)
  compilation_cache.reset_cache()


TIDY = """
import jax, jax.numpy as jnp
from qdora_jax import cli, compiled

class Libc:
  def malloc_trim(self, pad):
    print('trimmed', pad)

compiled.ctypes = type('', (), {'CDLL': lambda _: Libc()})
x = jnp.ones(3)
for _ in range(2):
  assert cli.main(['runs', 'nowhere']) == 1
for compiled.LONG in (0.0, 1e9):
  jax.jit(lambda x: x + compiled.LONG)(x).block_until_ready()
  print('compiled')
"""


def test_what_compiling_leaves_is_given_back(tmp_path):
  """Once, after what took long; the command line sees to it."""
  found = subprocess.run(
    [sys.executable, '-c', TIDY],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, 'QDORA_CACHE': str(tmp_path)},
  )
  assert found.stdout == 'trimmed 0\ncompiled\ncompiled\n'
  if platform.libc_ver()[0] == 'glibc':
    assert ctypes.CDLL(None).malloc_trim(0) in (0, 1)


def test_programs_are_kept_and_taken_again(settings, tmp_path, monkeypatch):
  monkeypatch.setattr(compiled, 'SECONDS', 0.0)
  compiled.keep()
  assert settings() == str(tmp_path / 'cache' / 'compiled')
  events = []

  def listen(event, **_):
    events.append(event)

  jax.monitoring.register_event_listener(listen)
  try:
    results = []
    for _ in range(2):
      program = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x) + 20261124)
      results.append(program(np.eye(5, dtype=np.float32)))
      assert any((tmp_path / 'cache' / 'compiled').iterdir())
  finally:
    jax.monitoring.unregister_event_listener(listen)
  assert events.count('/jax/compilation_cache/cache_misses') == 1
  assert events.count('/jax/compilation_cache/cache_hits') == 1
  np.testing.assert_array_equal(*results)


def test_what_is_kept_has_a_bound(settings, tmp_path, monkeypatch):
  monkeypatch.setattr(compiled, 'SECONDS', 0.0)
  folder = tmp_path / 'cache' / 'compiled'

  def kept():
    return {path.name for path in folder.glob('*-cache')}

  def make(number):
    before = kept()
    jax.jit(lambda x: x + number)(np.ones(3, np.float32))
    return kept() - before

  compiled.keep()
  first = make(20261124.5)
  size = sum(path.stat().st_size for path in folder.glob('*-cache'))
  assert len(first) == 1
  monkeypatch.setattr(compiled, 'MOST', int(1.5 * size))
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  compiled.keep()
  # The next one takes the first one's place.
  second = make(20261125.5)
  assert len(second) == 1 and kept() == second


def test_a_program_cut_short_is_made_anew(settings, tmp_path, monkeypatch):
  monkeypatch.setattr(compiled, 'SECONDS', 0.0)
  folder = tmp_path / 'cache' / 'compiled'

  def run(number):
    x = np.ones(3, np.float32)
    return float(jax.jit(lambda x: (x + number).sum())(x))

  def keep():
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.reset_cache()
    compiled.keep()

  keep()
  first = run(0.25)
  (program,) = folder.glob('*-cache')
  whole = program.read_bytes()
  program.write_bytes(whole[:-9])
  (used,) = folder.glob('*-atime')
  used.unlink()
  # Warnings are errors here: of reading it, and of writing beside it.
  keep()
  assert not program.exists()
  assert (run(0.25), run(0.5)) == (first, first + 0.75)
  assert program.exists() and len(list(folder.glob('*-cache'))) == 2


def test_a_folder_without_locks_keeps_nothing(settings, monkeypatch):
  def refuse(*_):
    raise NotImplementedError('FileSystem does not appear to support flock')

  monkeypatch.setattr(compiled.filelock.FileLock, 'acquire', refuse)
  compiled.keep()
  assert settings() is None


def test_who_told_jax_otherwise_is_heard(settings, tmp_path, monkeypatch):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'mine'))
  compiled.keep()
  assert settings() == str(tmp_path / 'mine')
  jax.config.update('jax_compilation_cache_dir', None)
  jax.config.update('jax_enable_compilation_cache', False)
  compiled.keep()
  assert settings() is None
  # Nor is there anything to be done about a folder that cannot be.
  jax.config.update('jax_enable_compilation_cache', True)
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('QDORA_CACHE', str(tmp_path / 'file'))
  compiled.keep()
  assert settings() is None


COUNTED = """
import sys, jax
from qdora_jax.cli import main
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
code = main(sys.argv[1:])
for what in ('misses', 'hits'):
  print(what, events.count(f'/jax/compilation_cache/cache_{what}'))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_second_start_of_the_command_compiles_nothing(tmp_path):
  """And ends with the same bits, nothing on the terminal but what it says."""
  (tmp_path / 'model').mkdir()
  (tmp_path / 'sums.jsonl').write_text(
    ''.join(
      f'{{"prompt": "{a}+{b}=", "completion": "{a + b}"}}\n'
      for a in range(8)
      for b in range(8)
    )
  )
  config = tiny.config_file(
    tmp_path,
    tiny.write(tmp_path / 'model'),
    **{'data.name': '', 'data.path': str(tmp_path / 'sums.jsonl')},
    **{'data.train_size': 0, 'data.eval_size': 0},
  )
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  env |= {
    'QDORA_CACHE': str(tmp_path / 'cache'),
    'JAX_ENABLE_COMPILATION_CACHE': 'true',
    # All of them: whether one takes a tenth of a second is the machine's mood.
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    # Or it says that there is no torch.
    'TRANSFORMERS_NO_ADVISORY_WARNINGS': '1',
  }
  adapters, counts = [], []
  for name in ('first', 'second'):
    words = ['train', '--config', str(config), '--workdir', tmp_path / name]
    done = subprocess.run(
      [sys.executable, '-c', COUNTED, *words],
      capture_output=True,
      text=True,
      env=env,
    )
    assert (done.returncode, done.stderr) == (0, '')
    last = done.stdout.split('\n')[-3:-1]
    counts.append({w: int(n) for w, n in map(str.split, last)})
    file = tmp_path / name / 'adapter' / 'adapter_model.safetensors'
    adapters.append(file.read_bytes())
  assert counts[0]['misses'] > 0
  assert counts[1]['misses'] == 0 and counts[1]['hits'] > 0
  assert adapters[0] == adapters[1]


@pytest.mark.parametrize('method', ['full', 'qdora'])
def test_thirty_layers_are_no_longer_a_program_than_two(method):
  lines = []
  for layers in (2, 30):
    job = Job(decoder(layers=layers), *METHODS[method], 2, 16, dtype='float32')
    made = trees(job)
    model = Decoder(job.model, jnp.float32, job.remat)
    step = train.make_step(model, make_optimizer(1e-4))
    whole = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    names = ('tokens', 'positions', 'segments', 'loss_at', 'labels')
    batch = dict.fromkeys(names, whole)
    batch['weights'] = jax.ShapeDtypeStruct((2, 16), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (made.trained, made.state, made.base, made.fixed, batch, key)
    lines.append(step.lower(*args).as_text().count('\n'))
  assert lines[0] == lines[1] > 100


def test_thirty_layers_adapters_are_drawn_by_no_longer_a_program_than_two():
  def lines(layers):
    base = trees(Job(decoder(layers=layers))).base
    spec = AdapterSpec('dora', rank=4)

    def draw(key, base):
      return init_adapter(key, base, spec)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(draw).lower(key, base).as_text().count('\n')

  assert lines(2) == lines(30)


@pytest.mark.parametrize(
  'case',
  [
    pytest.param('float16', marks=pytest.mark.slow),
    pytest.param('float32', marks=tiny.AGAIN),
    pytest.param('eight devices', marks=pytest.mark.slow),
  ],
)
def test_after_the_first_step_nothing_is_compiled(case):
  """By `fit`: neither the step again, nor anything beside it."""
  quant = None if case == 'eight devices' else QuantSpec()
  model, base, _ = tiny.loaded(quant=quant)
  adapter = init_adapter(
    jax.random.key(0), base, AdapterSpec('dora', 4, targets=ONE)
  )
  mesh = None
  if case == 'float16':
    model = model.clone(dtype=jnp.float16)
  if case == 'eight devices':
    mesh = sharding.make_mesh(fsdp=4, data=2)
    base = sharding.shard(base, mesh)
  seen, compiles = [], []

  def listen(event, _, **__):
    if event == '/jax/core/compile/backend_compile_duration':
      compiles.append(event)

  def batches():
    for batch in sums(batch_size=8):
      seen.append(len(compiles))
      yield batch

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    train.fit(model, base, adapter, batches(), steps=4, mesh=mesh)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  # Counted before each step.
  assert seen[0] < seen[1] == seen[2] == seen[3]
