"""Commands about one run: train, evaluate, generate, export."""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm

from qdora_jax import processes
from qdora_jax.config_file import check_overrides, read_config


def train(argv: list[str]) -> int | None:
  """Trains a run, in as many processes as asked for."""
  parser = _parser('train')
  parser.add_argument('--config', required=True)
  parser.add_argument('--processes', type=int, help='on this machine')
  parser.add_argument('--coordinator', help='HOST:PORT of process 0')
  parser.add_argument('--num-processes', type=int, help='on all machines')
  parser.add_argument('--process-id', type=int, help='from 0')
  known, overrides = parser.parse_known_args(argv)
  config = read_config(known.config, check_overrides(overrides))
  places = [] if processes.here() else _places(known)
  if places:
    program = [sys.executable, '-m', 'qdora_jax.cli', 'train', *argv]
    return processes.watch(program, places)
  from qdora_jax.finetune import fine_tune

  fine_tune(config, known.workdir)


def _places(known: argparse.Namespace) -> list[processes.Place]:
  """Processes to be started here; none for this one alone."""
  place = known.coordinator, known.num_processes, known.process_id
  if place == (None, None, None):
    count = 1 if known.processes is None else known.processes
    if count < 1:
      raise ValueError(f'--processes={count}: expected at least 1')
    return processes.local(count) if count > 1 else []
  if None in place or known.processes is not None:
    raise ValueError(
      '--coordinator, --num-processes and --process-id are given together, on '
      'every machine; on one machine, --processes alone'
    )
  host, _, port = known.coordinator.rpartition(':')
  if not host or not port.isdigit():
    raise ValueError(
      f'--coordinator={known.coordinator}: expected HOST:PORT at which the '
      'machine of process 0 can be reached, such as 10.0.0.1:8476'
    )
  if not 0 <= known.process_id < known.num_processes:
    raise ValueError(
      f'--process-id={known.process_id}: expected at least 0 and less than '
      f'--num-processes={known.num_processes}'
    )
  return [processes.Place(*place)]


def evaluate(argv: list[str]) -> None:
  """Measures a run's model."""
  parser = _parser('evaluate')
  _add_checkpoint(parser)
  parser.add_argument('--shots', type=int, help='solved examples in the prompt')
  parser.add_argument(
    '--on',
    action='append',
    default=[],
    metavar='SOURCE',
    help="a benchmark: 'boolq:FILE', 'gsm8k:hub:openai/gsm8k', a file of rows, "
    'a .txt file; once or more. Without, the rows that the run holds out',
  )
  parser.add_argument('--by', choices=['answers', 'likelihood', 'perplexity'])
  parser.add_argument('--limit', type=int, default=0, help='rows, at random')
  parser.add_argument('--seed', type=int, default=0, help='which rows')
  parser.add_argument('--batch-size', type=int, default=32)
  parser.add_argument('--max-new-tokens', type=int, default=0)
  parser.add_argument(
    '--beams',
    type=int,
    help="of a beam search; 1: greedy; by default the run's",
  )
  parser.add_argument(
    '--harness', default='', help='tasks of lm-evaluation-harness, by commas'
  )
  parser.add_argument('--include-path', help='folder of task files for it')
  parser.add_argument(
    '--base', action='store_true', help='the base, without the adapter'
  )
  known = parser.parse_args(argv)
  _check_measured(known, parser)
  from qdora_jax import benchmark
  from qdora_jax.run import load_run

  # What is not there is told before a model is loaded.
  for source in known.on:
    benchmark.load(source, known.limit)
  if known.harness:
    # Before anything is loaded: it may not be installed.
    importlib.import_module('qdora_jax.harness')
  run = load_run(known.workdir, known.checkpoint)
  if known.harness:
    _harness(run, known)
  for source in known.on:
    _benchmark(run, source, known)
  if known.harness or known.on:
    return
  params = run.base if known.base else None
  score = run.evaluate(params, shots=known.shots or 0, label='evaluate')
  print(score)
  _show(score.samples)


def _check_measured(
  known: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
  """Refuses options that are out of range, or that nothing would use."""
  zero = dict.fromkeys(('limit', 'shots', 'max_new_tokens'), 0)
  for name, least in (zero | {'batch_size': 1, 'beams': 1}).items():
    value = getattr(known, name)
    if value is not None and value < least:
      raise ValueError(f'--{name.replace("_", "-")}={value}: at least {least}')
  from qdora_jax.benchmark import way

  some, harness = bool(known.on), bool(known.harness)
  answered = any(way(on, known.by) == 'answers' for on in known.on)
  for name, (used, use) in {
    'by': (some, '--on'),
    'limit': (some or harness, '--on and --harness'),
    'batch_size': (some or harness, '--on and --harness'),
    'seed': (some and known.limit, '--on with --limit'),
    'beams': (answered, 'answers, --on what asks for them'),
    'max_new_tokens': (answered, 'answers, --on what asks for them'),
    'shots': (answered or harness or not some, 'answers and --harness'),
    'include_path': (harness, '--harness'),
  }.items():
    if not used and getattr(known, name) != parser.get_default(name):
      rest = (
        ''
        if some or harness
        else '; rows that the run holds out are asked as its config.eval says'
      )
      raise ValueError(f'--{name.replace("_", "-")} is for {use}{rest}')


def _benchmark(run: Any, source: str, known: argparse.Namespace) -> None:
  from qdora_jax import benchmark

  result = benchmark.of_run(
    run,
    source,
    known.by,
    base=known.base,
    limit=known.limit,
    seed=known.seed,
    shots=run.shots(known.shots or 0),
    batch_size=known.batch_size,
    max_new_tokens=known.max_new_tokens,
    beams=known.beams,
    progress=lambda parts: tqdm.tqdm(parts, source, leave=False, disable=None),
  )
  # First what took long: the folder may be one that cannot be written.
  print(result)
  _show(result.samples)
  _keep(result, known)


def _keep(result: Any, known: argparse.Namespace) -> None:
  from qdora_jax import folder

  model = 'base' if known.base else str(known.checkpoint)
  values = {'model': model, **dataclasses.asdict(result)}
  try:
    folder.add_benchmark(known.workdir, values)
  except OSError as error:
    print(f'not kept in {known.workdir}: {error}', file=sys.stderr)


def _harness(run: Any, known: argparse.Namespace) -> None:
  from qdora_jax import harness

  params = run.base if known.base else run.params()
  lm = harness.Harness(
    run.model, params, run.tokenizer, batch_size=known.batch_size
  )
  found = harness.harness(
    lm,
    known.harness.split(','),
    limit=known.limit or None,
    shots=known.shots,
    include_path=known.include_path,
  )
  print(harness.table(found))
  for result in harness.results(found):
    _keep(result, known)


def _show(samples: Sequence[Sequence[str]]) -> None:
  for question, given, expected in samples:
    print(f'\n{question}\n  answered: {given}\n  expected: {expected}')


def generate(argv: list[str]) -> None:
  """Answers a prompt, or a file of questions."""
  parser = _parser('generate')
  _add_checkpoint(parser)
  asked = parser.add_mutually_exclusive_group(required=True)
  asked.add_argument('--prompt')
  asked.add_argument(
    '--questions', help="a file in FastChat's form, answered into --out"
  )
  parser.add_argument('--out', type=Path)
  parser.add_argument(
    '--model-id', help='in the answers; the folder by default'
  )
  parser.add_argument('--max-new-tokens', type=int)
  parser.add_argument('--temperature', type=float, default=0.0)
  parser.add_argument('--top-k', type=int, default=0)
  parser.add_argument('--top-p', type=float, default=1.0)
  parser.add_argument('--stop', action='append', default=[], metavar='TEXT')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--raw', action='store_true', help='no chat template around the prompt'
  )
  known = parser.parse_args(argv)
  if known.questions:
    if known.out is None:
      raise ValueError('--questions needs --out, a file for the answers')
    for name in ('temperature', 'top_k', 'top_p', 'stop', 'raw'):
      if getattr(known, name) != parser.get_default(name):
        raise ValueError(
          f'--{name.replace("_", "-")} is for --prompt: --questions are '
          "answered as FastChat's judges expect, at its temperatures"
        )
  from qdora_jax.run import load_run

  run = load_run(known.workdir, known.checkpoint)
  if known.questions:
    _answer(run, known)
    return
  answer = run.generate(
    known.prompt,
    100 if known.max_new_tokens is None else known.max_new_tokens,
    temperature=known.temperature,
    top_k=known.top_k,
    top_p=known.top_p,
    stop_strings=known.stop,
    seed=known.seed,
    raw=known.raw,
  )
  print(answer)


def _answer(run: Any, known: argparse.Namespace) -> None:
  from qdora_jax import benchmark, fastchat

  form = run.config.data.format()
  count = fastchat.answer(
    benchmark.Subject(run.model, run.params(), run.tokenizer, form),
    known.questions,
    known.out,
    known.model_id or known.workdir.name,
    max_new_tokens=known.max_new_tokens or 1024,
    seed=known.seed,
    progress=lambda parts: tqdm.tqdm(parts, 'answers', disable=None),
  )
  print(f'{count} questions answered into {known.out}')


def export(argv: list[str]) -> None:
  """Writes a run for others to load."""
  parser = _parser('export')
  _add_checkpoint(parser)
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument(
    '--format',
    choices=['peft', 'merged', 'folded', 'base'],
    required=True,
    help='the adapter; one model in full precision; 4-bit base and plain LoRA '
    'for servers without DoRA; the 4-bit base alone',
  )
  parser.add_argument(
    '--dtype',
    help='of what is not in 4 bits: float32, bfloat16 or float16; by default '
    'as it was trained',
  )
  known = parser.parse_args(argv)
  from qdora_jax.run import load_run

  run = load_run(known.workdir, known.checkpoint)
  run.export(known.out, known.format, known.dtype)
  print(f'wrote {known.out}: {", ".join(_listing(known.out))}')


def _listing(folder: Path) -> list[str]:
  """Files of a folder, by their names within it."""
  files = (file for file in folder.rglob('*') if file.is_file())
  return sorted(str(file.relative_to(folder)) for file in files)


def _parser(command: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(f'qdora {command}', allow_abbrev=False)
  parser.add_argument('--workdir', type=Path, required=True)
  return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--checkpoint',
    type=_checkpoint,
    default='last',
    metavar='last|best|STEP',
    help='which to take: the newest, that of the lowest held-out loss, or one '
    'of a step',
  )


def _checkpoint(word: str) -> str | int:
  if word in ('last', 'best'):
    return word
  if not word.isdigit():
    raise argparse.ArgumentTypeError(
      f"{word!r}: expected 'last', 'best' or a step"
    )
  return int(word)
