"""The command line: qdora train | evaluate | generate | export.

  qdora train    --config FILE --workdir DIR [--config.section.key=value ...]
  qdora evaluate --workdir DIR [--shots N]
  qdora generate --workdir DIR --prompt TEXT [--max-new-tokens N] [--raw]
  qdora export   --workdir DIR --format peft --out DIR

The same train command again continues an interrupted run.
"""

import argparse
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from qdora_jax.config import RunConfig


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code. A user's error is one message."""
  argv = sys.argv[1:] if argv is None else argv
  commands = {
    'train': _train,
    'evaluate': _evaluate,
    'generate': _generate,
    'export': _export,
  }
  if not argv or argv[0] in ('-h', '--help'):
    print(__doc__)
    return 0
  if argv[0] not in commands:
    print(
      f'qdora: no command {argv[0]!r}; commands: {", ".join(commands)}',
      file=sys.stderr,
    )
    return 2
  try:
    commands[argv[0]](argv[1:])
  except (ValueError, OSError, ImportError) as error:
    print(f'qdora {argv[0]}: {error}', file=sys.stderr)
    return 1
  except RuntimeError as error:
    # What cannot be fetched; not JAX's own errors, which are subclasses.
    if type(error) is not RuntimeError:
      raise
    print(f'qdora {argv[0]}: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('\ninterrupted; the same command continues', file=sys.stderr)
    return 130
  return 0


def read_config(file: str, overrides: list[str]) -> RunConfig:
  """A config file with --config.section.key=value on top, checked.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for an override of no key (naming the nearest) or of a wrong
      type.
  """
  if not Path(file).is_file():
    raise FileNotFoundError(f'--config={file}: no such file')
  values = flags.FlagValues()
  argv = ['qdora', f'--config={file}', *overrides]
  holder = config_flags.DEFINE_config_file(
    'config', flag_values=values, sys_argv=argv
  )
  try:
    values(argv)
  except (flags.Error, AttributeError, KeyError, TypeError) as error:
    # ml_collections' own words name the key and the nearest one.
    text = error.args[0] if error.args else error
    raise ValueError(str(text).replace('\n', '. ')) from error
  return RunConfig.make(holder.value.to_dict())


def _train(argv: list[str]) -> None:
  parser = _parser('train')
  parser.add_argument('--config', required=True)
  known, overrides = parser.parse_known_args(argv)
  for word in overrides:
    if not word.startswith('--config.') or '=' not in word:
      raise ValueError(
        f'{word!r} is no option; overrides look like --config.section.key=value'
      )
  config = read_config(known.config, overrides)
  from qdora_jax.train import train

  train(config, known.workdir)


def _evaluate(argv: list[str]) -> None:
  parser = _parser('evaluate')
  parser.add_argument(
    '--shots', type=int, default=0, help='solved examples in the prompt'
  )
  known = parser.parse_args(argv)
  from qdora_jax.train import load_run

  run = load_run(known.workdir)
  score = run.evaluate(run.params(), known.shots, 'evaluate')
  print(score)
  for question, given, expected in score.samples:
    print(f'\n{question}\n  answered: {given}\n  expected: {expected}')


def _generate(argv: list[str]) -> None:
  parser = _parser('generate')
  parser.add_argument('--prompt', required=True)
  parser.add_argument('--max-new-tokens', type=int, default=100)
  parser.add_argument('--temperature', type=float, default=0.0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--raw', action='store_true', help='no chat template around the prompt'
  )
  known = parser.parse_args(argv)
  import jax

  from qdora_jax.data import prompt_ids
  from qdora_jax.generate import generate
  from qdora_jax.train import load_run

  run = load_run(known.workdir)
  if known.raw:
    ids = run.tokenizer.encode(known.prompt)
  else:
    data = run.config.data
    chat = [{'role': 'system', 'content': data.system}] if data.system else []
    chat.append({'role': 'user', 'content': known.prompt})
    ids = prompt_ids(run.tokenizer, chat)
  (answer,) = generate(
    run.model,
    run.params(),
    [ids],
    known.max_new_tokens,
    stop=[run.tokenizer.eos_token_id],
    temperature=known.temperature,
    key=jax.random.key(known.seed),
  )
  print(run.tokenizer.decode(answer, skip_special_tokens=True).strip())


def _export(argv: list[str]) -> None:
  parser = _parser('export')
  parser.add_argument('--format', choices=['peft'], required=True)
  parser.add_argument('--out', type=Path, required=True)
  known = parser.parse_args(argv)
  from qdora_jax.interop.peft import save_adapter
  from qdora_jax.train import load_run

  run = load_run(known.workdir)
  if not run.base:
    raise ValueError(
      f'{known.workdir} is a full fine-tuning: there is no adapter to export'
    )
  save_adapter(known.out, run.trained, run.config.model.name)
  print(f'wrote {known.out}/adapter_model.safetensors and adapter_config.json')


def _parser(command: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(f'qdora {command}', allow_abbrev=False)
  parser.add_argument('--workdir', type=Path, required=True)
  return parser


if __name__ == '__main__':
  sys.exit(main())
