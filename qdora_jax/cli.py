"""The command line: qdora train | evaluate | generate | export | plan | ...

  qdora train    --config FILE --workdir DIR [--config.section.key=value ...]
                 [--processes N], or on each machine
                 [--coordinator HOST:PORT --num-processes N --process-id I]
  qdora evaluate --workdir DIR [--shots N]
                 [--on SOURCE [--by answers|likelihood|perplexity] [--limit N]
                  [--beams N] [--max-new-tokens N]]
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
  qdora analyze  --model NAME [--text FILE [--limit CHARACTERS] | --own TEXTS]
                 --out DIR

evaluate, generate and export take --checkpoint last|best|STEP: the newest one
otherwise.
The same train command again continues an interrupted run.

Compiled programs are kept in $QDORA_CACHE or ~/.cache/qdora_jax, for a quicker
next start; not with JAX_ENABLE_COMPILATION_CACHE=false.
"""

import signal
import sys
import traceback
from collections.abc import Callable

import absl.logging
import jax

from qdora_jax import cli_many, cli_run, compiled, processes


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code. A user's error is one message."""
  argv = sys.argv[1:] if argv is None else argv
  commands = {
    'train': cli_run.train,
    'evaluate': cli_run.evaluate,
    'generate': cli_run.generate,
    'export': cli_run.export,
    'plan': cli_many.plan,
    'sweep': cli_many.sweep,
    'runs': cli_many.runs,
    'analyze': cli_many.analyze,
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
  compiled.tidy()
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


if __name__ == '__main__':
  sys.exit(main())
