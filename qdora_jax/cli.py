"""The command line: qdora train | evaluate | generate | export | plan | ...

  qdora train    --config FILE --workdir DIR [--config.section.key=value ...]
                 [--processes N], or on each machine
                 [--coordinator HOST:PORT --num-processes N --process-id I]
  qdora evaluate --workdir DIR [--shots N]
                 [--on SOURCE [--by answers|likelihood|perplexity] [--limit N]]
                 [--harness TASK,TASK [--include-path DIR]] [--base]
  qdora generate --workdir DIR --prompt TEXT [--max-new-tokens N] [--raw]
                 [--temperature T] [--top-k N] [--top-p P] [--stop TEXT]
  qdora generate --workdir DIR --questions FILE --out FILE
  qdora export   --workdir DIR --format peft|merged|folded|base --out DIR
  qdora plan     --config FILE [--config.section.key=value ...] [--model NAME]
                 [--mesh fsdp=4,data=2] [--device h100] [--picture FILE]
  qdora sweep    FILE --out DIR [--config.section.key=value ...] [--isolate]
  qdora runs     DIR ... [--compare] [--history]
  qdora analyze  DIR ... --out DIR
  qdora analyze  --model NAME [--text FILE [--limit CHARACTERS]] --out DIR

evaluate, generate and export take --checkpoint last|best|STEP: the newest one
otherwise.
The same train command again continues an interrupted run.

Compiled programs are kept in $QDORA_CACHE or ~/.cache/qdora_jax, for a quicker
next start; not with JAX_ENABLE_COMPILATION_CACHE=false.
"""

import argparse
import dataclasses
import functools
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import tqdm

from qdora_jax import compiled, paths, processes
from qdora_jax.config_file import read_config, read_values, returned
from qdora_jax.specs import ALL_LINEAR


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code. A user's error is one message."""
  argv = sys.argv[1:] if argv is None else argv
  commands = {
    'train': _train,
    'evaluate': _evaluate,
    'generate': _generate,
    'export': _export,
    'plan': _plan,
    'sweep': _sweep,
    'runs': _runs,
    'analyze': _analyze,
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
  # orbax logs a traceback of what it raises; it is told once, here.
  absl.logging.set_verbosity(absl.logging.FATAL)
  compiled.keep()
  place = processes.here()
  if place is None:
    return _run(commands[argv[0]], argv)
  try:
    processes.join(place)
    code = _run(commands[argv[0]], argv)
    if code == 0:
      processes.part()
  except jax.errors.JaxRuntimeError as error:
    lost = 'RESOURCE_EXHAUSTED' not in str(error)
    code = processes.LOST if lost else 1
    print(
      f'qdora {argv[0]}: process {place.index} of {place.count} '
      + ('has lost another ' if lost else 'failed ')
      + f'({" ".join(str(error).split())[:200]}); the same command continues',
      file=sys.stderr,
    )
  except BaseException:
    code = 1
    traceback.print_exc()
  processes.leave(code)


def _run(command: Callable[[list[str]], int | None], argv: list[str]) -> int:
  """The exit code of a command; a user's error is one message."""
  try:
    return command(argv[1:]) or 0
  except (ValueError, OSError, ImportError, ArithmeticError) as error:
    print(f'qdora {argv[0]}: {error}', file=sys.stderr)
    return 1
  except RuntimeError as error:
    # What cannot be fetched; not JAX's own errors, which are subclasses.
    if type(error) is not RuntimeError:
      raise
    print(f'qdora {argv[0]}: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt as error:
    # Ctrl-C, or SIGTERM while training, which has a message.
    why = str(error) or 'interrupted'
    print(f'{why}; the same command continues', file=sys.stderr)
    # As shells count signals.
    return 128 + (error.signal if hasattr(error, 'signal') else signal.SIGINT)


def _train(argv: list[str]) -> int | None:
  parser = _parser('train')
  parser.add_argument('--config', required=True)
  parser.add_argument('--processes', type=int, help='on this machine')
  parser.add_argument('--coordinator', help='HOST:PORT of process 0')
  parser.add_argument('--num-processes', type=int, help='on all machines')
  parser.add_argument('--process-id', type=int, help='from 0')
  known, overrides = parser.parse_known_args(argv)
  config = read_config(known.config, _overrides(overrides))
  places = [] if processes.here() else _places(known)
  if places:
    program = [sys.executable, '-m', 'qdora_jax.cli', 'train', *argv]
    return processes.watch(program, places)
  from qdora_jax.finetune import fine_tune

  fine_tune(config, known.workdir)


def _overrides(words: list[str]) -> list[str]:
  for word in words:
    if not word.startswith('--config.') or '=' not in word:
      raise ValueError(
        f'{word!r} is no option; overrides look like --config.section.key=value'
      )
  return words


def _plan(argv: list[str]) -> None:
  parser = argparse.ArgumentParser('qdora plan', allow_abbrev=False)
  parser.add_argument('--config', required=True)
  parser.add_argument(
    '--model', help='instead of the config: llama-3-8b, a directory, a hub id'
  )
  parser.add_argument('--mesh', default='', help='sizes: fsdp=4,data=2')
  parser.add_argument('--device', help='a GPU: t4, rtx-3090, a100-80, h100 ...')
  parser.add_argument(
    '--picture', type=Path, help='a PNG: memory by part, of five methods'
  )
  known, words = parser.parse_known_args(argv)
  words = _overrides(words)
  if known.model:
    words.append(f'--config.model.name={known.model}')
  for size in filter(None, known.mesh.split(',')):
    axis, equals, count = size.partition('=')
    if axis not in ('data', 'fsdp', 'tensor') or not equals:
      raise ValueError(
        f'--mesh={known.mesh}: {size!r}: expected sizes of data, fsdp and '
        'tensor, such as fsdp=4,data=2'
      )
    words.append(f'--config.mesh.{axis}={count}')
  config = read_config(known.config, words)
  from qdora_jax import devices, plan

  device = devices.find(known.device) if known.device else None
  job = plan.of_run(config)
  made = plan.plan(job)
  print(f'{config.model.name}, {made}')
  if known.picture:
    from qdora_jax import pictures

    parts = {name: one.parts for name, one in plan.methods(job).items()}
    title = f'{config.model.name}, {job.batch} x {job.seq_len} tokens'
    pictures.memory(parts, title, known.picture)
    print(f'memory by part: {known.picture}')
  if device is not None:
    print(plan.verdict(made, device))
    return
  for device in devices.DEVICES.values():
    if plan.fits(made, device.usable):
      print(plan.verdict(made, device))
    else:
      print(
        f'{device.name}: does not fit ({device.usable / 1e9:.1f} GB); what '
        f'would help: --device {device.name}'
      )


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


def _evaluate(argv: list[str]) -> None:
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
    '--harness', default='', help='tasks of lm-evaluation-harness, by commas'
  )
  parser.add_argument('--include-path', help='folder of task files for it')
  parser.add_argument(
    '--base', action='store_true', help='the base, without the adapter'
  )
  known = parser.parse_args(argv)
  for name in ('limit', 'shots', 'max_new_tokens'):
    value = getattr(known, name)
    if value is not None and value < 0:
      raise ValueError(f'--{name.replace("_", "-")}={value}: at least 0')
  from qdora_jax import benchmark
  from qdora_jax.run import load_run

  # What is not there is told before a model is loaded.
  for source in known.on:
    benchmark.load(source, known.limit)
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


def _benchmark(run: Any, source: str, known: argparse.Namespace) -> None:
  from qdora_jax import benchmark, folder

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
    progress=lambda parts: tqdm.tqdm(parts, source, leave=False, disable=None),
  )
  model = 'base' if known.base else str(known.checkpoint)
  folder.add_benchmark(
    known.workdir, {'model': model, **dataclasses.asdict(result)}
  )
  print(result)
  _show(result.samples)


def _harness(run: Any, known: argparse.Namespace) -> None:
  from lm_eval.utils import make_table

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
  print(make_table(found))


def _show(samples: Sequence[Sequence[str]]) -> None:
  for question, given, expected in samples:
    print(f'\n{question}\n  answered: {given}\n  expected: {expected}')


def _generate(argv: list[str]) -> None:
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
  if known.questions and known.out is None:
    raise ValueError('--questions needs --out, a file for the answers')
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


def _export(argv: list[str]) -> None:
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


def _sweep(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('qdora sweep', allow_abbrev=False)
  parser.add_argument('file')
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--only', help='the point of this name alone')
  parser.add_argument(
    '--isolate',
    action='store_true',
    help='each point in a process of its own: its peak memory is its own',
  )
  parser.add_argument(
    '--table', action='store_true', help='nothing is run: table and plot'
  )
  known, words = parser.parse_known_args(argv)
  words = _overrides(words)
  if not Path(known.file).is_file():
    raise FileNotFoundError(
      f'{known.file}: no such file{paths.beside(known.file)}'
    )
  from qdora_jax import findings, sweep

  found = returned(known.file, 'get_sweep', sweep.Sweep)
  beside = Path(known.file).parent / found.config
  points = sweep.build(found, read_values(str(beside), words))
  report = functools.partial(findings.report, found, known.out)
  if known.table:
    print(report())
    return 0
  isolated = None
  if known.isolate:
    isolated = [sys.executable, '-m', 'qdora_jax.cli', 'sweep', known.file]
    isolated += ['--out', str(known.out), *words]
  return sweep.run(found, points, known.out, known.only, isolated, report)


def _runs(argv: list[str]) -> None:
  parser = argparse.ArgumentParser('qdora runs', allow_abbrev=False)
  parser.add_argument('folders', nargs='+', type=Path)
  parser.add_argument(
    '--compare',
    action='store_true',
    help='what differs in their configs, and their curves in one plot',
  )
  parser.add_argument(
    '--history',
    action='store_true',
    help='evaluations during training, and the last answers looked at',
  )
  parser.add_argument('--out', type=Path, default=Path('compared.png'))
  known = parser.parse_args(argv)
  from qdora_jax import runs

  found = runs.find(known.folders)
  print(runs.table(found, known.compare))
  if known.compare:
    runs.plot(found, known.out)
    print(f'curves: {known.out}')
  if known.history:
    print(*map(runs.history, found), sep='\n')


def _analyze(argv: list[str]) -> None:
  parser = argparse.ArgumentParser('qdora analyze', allow_abbrev=False)
  parser.add_argument(
    'folders',
    nargs='*',
    type=Path,
    help='run folders, or folders of such: what training did to their weights',
  )
  parser.add_argument(
    '--model', help='instead: what four bits do to the weights of a model'
  )
  parser.add_argument('--text', default='', help='whose perplexity is measured')
  parser.add_argument(
    '--limit', type=int, default=0, help='characters of it; 0 for all'
  )
  parser.add_argument('--targets', default=ALL_LINEAR)
  parser.add_argument('--out', type=Path, required=True)
  known = parser.parse_args(argv)
  if bool(known.folders) == bool(known.model):
    parser.error('expected run folders, or --model NAME')
  from qdora_jax import study

  if known.folders:
    text = study.of_runs(known.folders, known.out)
  else:
    text = study.of_weights(
      known.model,
      known.out,
      known.text,
      targets=known.targets,
      limit=known.limit,
      progress=functools.partial(tqdm.tqdm, leave=False),
    )
  print(f'{text}\ntables and pictures: {known.out}')


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


if __name__ == '__main__':
  sys.exit(main())
