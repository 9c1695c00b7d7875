"""reasoning_gym.load: a make-believe package, then the real one if at hand."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdora_jax.interop import pypi, reasoning_gym

# reasoning_gym's skeleton. `hard` does to packages that are not there what the
# real one's class bodies, annotations and module constants do.
_FAKE = {
  '__init__.py': """
from . import easy, hard
from .factory import create_dataset
""",
  'factory.py': """
DATASETS = {}
def create_dataset(name, **options):
  cls, config = DATASETS[name]
  config = config(**options)
  assert config.length > 0, 'length must be positive'
  return cls(config)
""",
  'easy.py': """
import dataclasses
from .factory import DATASETS
@dataclasses.dataclass
class Config:
  seed: int = 0
  size: int = 5
  length: int = 3
class Easy:
  def __init__(self, config):
    self.config = config
  def __len__(self):
    return self.config.size
DATASETS['easy_task'] = (Easy, Config)
""",
  'hard/__init__.py': 'from . import direct, indirect',
  'hard/direct.py': """
import absent_a
import absent_a.deep.inside as inside
from absent_b import Symbol
from ..easy import Config, Easy
from ..factory import DATASETS
def build(x: absent_a.Thing | None, y: list[Symbol]) -> inside.Other:
  return absent_a.build(x)
FONTS = list(filter(lambda x: x not in ('bad',), absent_a.Fonts.all()))
def is_symbol(x):
  return isinstance(x, Symbol)
class Direct(Easy):
  pass
DATASETS['direct_task'] = (Direct, Config)
""",
  'hard/helper.py': """
from absent_c import solve
def help_me():
  return solve()
""",
  'hard/indirect.py': """
from .helper import help_me
from ..easy import Config, Easy
from ..factory import DATASETS
class Indirect(Easy):
  pass
DATASETS['indirect_task'] = (Indirect, Config)
""",
}


def write_fake(folder: Path) -> Path:
  for name, text in _FAKE.items():
    path = folder / 'reasoning_gym' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return folder


def forget():
  for name in list(sys.modules):
    if name.partition('.')[0] == 'reasoning_gym':
      del sys.modules[name]


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """A reasoning_gym installed without its three dependencies."""
  names = ('absent_a', 'absent_b', 'absent_c')
  packages = {name: f'{name}==1.0' for name in names}
  monkeypatch.setattr(reasoning_gym, '_PACKAGES', packages)
  monkeypatch.syspath_prepend(write_fake(tmp_path))
  forget()
  yield tmp_path
  forget()


def test_a_task_that_needs_nothing_loads(fake):
  dataset = reasoning_gym.load('easy_task', 7, 3, {'length': 9})
  assert len(dataset) == 7
  assert (dataset.config.seed, dataset.config.length) == (3, 9)


def test_no_one_else_sees_a_stand_in(fake):
  finders = list(sys.meta_path)
  reasoning_gym.load('easy_task', 1, 0)
  assert sys.meta_path == finders
  assert not [name for name in sys.modules if name.startswith('absent')]
  for name in ('absent_a', 'absent_b'):
    assert importlib.util.find_spec(name) is None


@pytest.mark.parametrize(
  'task, packages',
  [('direct_task', ['absent_a', 'absent_b']), ('indirect_task', ['absent_c'])],
)
def test_a_task_names_the_packages_it_needs(fake, task, packages):
  with pytest.raises(ModuleNotFoundError) as error:
    reasoning_gym.load(task, 1, 0)
  install = ' '.join(f"'{name}==1.0'" for name in packages)
  assert f'{task!r} needs {" and ".join(packages)}, ' in str(error.value)
  assert f'pip install {install}' in str(error.value)


@pytest.mark.parametrize(
  'module, use, package',
  [
    ('direct', lambda m: m.build(1, []), 'absent_a'),
    ('direct', lambda m: m.is_symbol(1), 'absent_b'),
    ('helper', lambda m: m.help_me(), 'absent_c'),
  ],
)
def test_a_stand_in_complains_when_used(fake, module, use, package):
  reasoning_gym.load('easy_task', 1, 0)
  module = importlib.import_module(f'reasoning_gym.hard.{module}')
  with pytest.raises(ModuleNotFoundError) as error:
    use(module)
  assert f'{module.__name__} needs {package}, not inst' in str(error.value)
  assert error.value.name == package


def test_a_stand_in_in_a_constant_complains_when_used(fake):
  reasoning_gym.load('easy_task', 1, 0)
  (font,) = importlib.import_module('reasoning_gym.hard.direct').FONTS
  for use in (len, iter, lambda x: x(), lambda x: x.render, lambda x: x[0]):
    with pytest.raises(ModuleNotFoundError, match='needs absent_a'):
      use(font)


def test_only_the_listed_packages_are_stood_in_for(fake, monkeypatch):
  monkeypatch.delitem(reasoning_gym._PACKAGES, 'absent_c')
  finders = list(sys.meta_path)
  with pytest.raises(ModuleNotFoundError, match="'absent_c'"):
    reasoning_gym.load('easy_task', 1, 0)
  assert sys.meta_path == finders
  assert not [name for name in sys.modules if name.startswith('absent')]


def test_an_installed_package_keeps_its_own_import_errors(monkeypatch):
  # yaml, for one, tries `from yaml._yaml import ...` and does without.
  monkeypatch.setitem(reasoning_gym._PACKAGES, 'numpy', 'numpy')
  with reasoning_gym._stand_ins():
    assert importlib.import_module('numpy').__version__
    with pytest.raises(ModuleNotFoundError):
      importlib.import_module('numpy.no_such_module')


def test_an_unknown_task_names_the_nearest(fake):
  with pytest.raises(ValueError, match="'easi_task'; nearest: easy_task"):
    reasoning_gym.load('easi_task', 1, 0)


def test_an_unknown_option_names_the_nearest(fake):
  with pytest.raises(ValueError, match="option 'lenght'; nearest: length"):
    reasoning_gym.load('easy_task', 1, 0, {'lenght': 3})


def test_size_and_seed_are_no_options(fake):
  with pytest.raises(ValueError, match="no option 'size'"):
    reasoning_gym.load('easy_task', 1, 0, {'size': 3})


def test_a_value_the_task_refuses(fake):
  with pytest.raises(ValueError, match=r'-1.*length must be positive'):
    reasoning_gym.load('easy_task', 1, 0, {'length': -1})


def test_the_wheel_is_fetched_if_it_is_not_installed(tmp_path, monkeypatch):
  if importlib.util.find_spec('reasoning_gym') is not None:
    pytest.skip('reasoning-gym is installed here: nothing to fetch')
  asked = []
  monkeypatch.setattr(
    pypi, 'fetch', lambda name: asked.append(name) or write_fake(tmp_path)
  )
  names = ('absent_a', 'absent_b', 'absent_c')
  monkeypatch.setattr(reasoning_gym, '_PACKAGES', dict.fromkeys(names, ''))
  monkeypatch.setattr(sys, 'path', list(sys.path))
  try:
    assert len(reasoning_gym.load('easy_task', 4, 0)) == 4
    reasoning_gym.load('easy_task', 4, 0)
  finally:
    forget()
  assert asked == ['reasoning-gym==0.1.25']


_TASKS = (
  'chain_sum', 'count_bits', 'family_relationships', 'letter_counting',
  'spell_backward', 'word_sorting',
)  # fmt: skip
_PRINT = f"""
import sys
from qdora_jax.interop import reasoning_gym
for task in {_TASKS}:
  data = reasoning_gym.load(task, 20, 7)
  for i in range(len(data)):
    entry = data[i]
    assert data.score_answer(entry['answer'], entry) == 1.0, (task, entry)
    print(task, repr(entry['question']), repr(entry['answer']))
assert not [m for m in sys.modules.values()
            if isinstance(m, reasoning_gym._StandIn)]
"""


def test_the_real_tasks_are_the_same_in_every_process():
  cached = pypi.default_cache() / reasoning_gym._WHEEL
  if importlib.util.find_spec('reasoning_gym') is None and not cached.is_dir():
    pytest.skip(f'reasoning-gym is neither installed nor in {cached}')
  said = []
  for hash_seed in ('1', '2'):
    python = subprocess.run(
      [sys.executable, '-c', _PRINT],
      env={**os.environ, 'PYTHONHASHSEED': hash_seed},
      cwd=Path(__file__).parents[2],
      capture_output=True,
      text=True,
    )
    assert python.returncode == 0, python.stderr
    said.append(python.stdout)
  assert said[0] == said[1]
  assert len(said[0].splitlines()) == 20 * len(_TASKS)
