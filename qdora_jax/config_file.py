"""Config files: programs, with --config.section.key=value on top."""

import ast
import runpy
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from qdora_jax import paths
from qdora_jax.config import RunConfig


def read_config(file: str, overrides: list[str]) -> RunConfig:
  """A config file with --config.section.key=value on top, checked.

  'FILE.py:tiny' calls its get_config('tiny').

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for an error in the file, with its line; for an override of no
      key (naming the nearest) or of a wrong type.
  """
  return RunConfig.make(read_values(file, overrides))


def read_values(file: str, overrides: list[str]) -> dict[str, Any]:
  """The values of `read_config`, not yet checked."""
  file, form = _form(file)
  if not Path(file).is_file():
    raise FileNotFoundError(
      f'--config={file}: no such file{paths.beside(file)}'
    )
  config = returned(file, 'get_config', ConfigDict, *form, flag='--config=')
  for word in overrides:
    values = flags.FlagValues()
    try:
      config_flags.DEFINE_config_dict(
        'config', config, flag_values=values, sys_argv=['qdora', word]
      )
      values(['qdora', word])
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
      # ml_collections' own words name the nearest key, or the type.
      text = ' '.join(str(error.args[0] if error.args else error).split())
      text = text.removeprefix(f'flag {word}: ')
      raise ValueError(f'{word}: {text}') from error
  return config.to_dict()


def check_overrides(words: list[str]) -> list[str]:
  """The words of a command line that no option took; refuses what is none."""
  for word in words:
    if not word.startswith('--config.') or '=' not in word:
      raise ValueError(
        f'{word!r} is no option; overrides look like --config.section.key=value'
      )
  return words


def _form(file: str) -> tuple[str, list[str]]:
  """('e2e.py', ['tiny']) of 'e2e.py:tiny'."""
  name, colon, form = file.rpartition(':')
  return (name, [form]) if colon and name.endswith('.py') else (file, [])


class _DictParser(flags.ArgumentParser):
  """--config.optim.lr_scale='{".*/lora_b": 16}'."""

  def parse(self, argument: str | dict) -> dict:
    if isinstance(argument, dict):
      return argument  # What the file has.
    try:
      value = ast.literal_eval(argument)
    except (SyntaxError, ValueError):
      value = None
    if not isinstance(value, dict):
      raise ValueError("expected a dict, such as {'a': 1}")
    return value


config_flags.register_flag_parser_for_type(dict, _DictParser())


def returned(
  file: str, name: str, kind: type, *words: str, flag: str = ''
) -> Any:
  """What a function of a file returns for some words.

  Raises:
    ValueError: for an error in the file, with its line, or if it has no such
      function or another kind comes back.
  """
  try:
    program = runpy.run_path(file)
    found = program[name](*words) if name in program else None
  except Exception as error:
    # Whatever it is: the file is a program.
    calls = traceback.extract_tb(error.__traceback__)
    lines = [call.lineno for call in calls if call.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
      lines.append(error.lineno)
    text = f'{type(error).__name__}: {" ".join(str(error).split())}'
    raise ValueError(
      f'{flag}{file}:{lines[-1] if lines else 1}: {text}'
    ) from error
  if not isinstance(found, kind):
    whose = kind.__module__.partition('.')[0]
    raise ValueError(
      f'{flag}{file}: expected a function {name}() that returns an '
      f'{whose}.{kind.__name__}, got {str(found)[:80]}'
    )
  return found
