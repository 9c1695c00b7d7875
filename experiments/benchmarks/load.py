"""How fast a checkpoint is loaded, beside safetensors' own reading of it.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python experiments/benchmarks/load.py [DIRECTORY] [ROUNDS]

Reads the directory (or a random Llama of 2 GB in bfloat16, made for it) in
turns: every tensor through safetensors; loaded as it is; quantized to NF4; and
that sharded over all devices there are. GB of the files per second, medians,
and the median of each round's ratio to safetensors. The files are in the page
cache: what is measured is not the disk.
"""

import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from qdora_jax import QuantSpec, load_pretrained
from qdora_jax.sharding import make_mesh

# Of a Llama: 14 layers and two tables, 1.98 GB in bfloat16.
WIDTH, FF, VOCAB, LAYERS = 2048, 5632, 65536, 14


def write_llama(folder: Path) -> int:
  """A checkpoint of many files; gives the bytes of its largest tensor."""
  rng, files = np.random.default_rng(0), {}

  def normal(*shape: int) -> np.ndarray:
    # A row is repeated: drawing all of them would take longest.
    row = rng.standard_normal(shape[1], np.float32) * 0.02
    return np.tile(row.astype(ml_dtypes.bfloat16), (shape[0], 1))

  def save(tensors: dict[str, np.ndarray]) -> None:
    name = f'model-{len(set(files.values())):05}.safetensors'
    safetensors.numpy.save_file(tensors, folder / name)
    files.update(dict.fromkeys(tensors, name))

  one = np.ones(WIDTH, ml_dtypes.bfloat16)
  save({'model.embed_tokens.weight': normal(VOCAB, WIDTH)})
  save({'lm_head.weight': normal(VOCAB, WIDTH), 'model.norm.weight': one})
  for n in range(LAYERS):
    shapes = {
      **{f'self_attn.{x}_proj': (WIDTH, WIDTH) for x in 'qkvo'},
      'mlp.gate_proj': (FF, WIDTH),
      'mlp.up_proj': (FF, WIDTH),
      'mlp.down_proj': (WIDTH, FF),
    }
    norms = ('input_layernorm', 'post_attention_layernorm')
    tensors = {f'{k}.weight': normal(*s) for k, s in shapes.items()}
    tensors |= {f'{k}.weight': one for k in norms}
    save({f'model.layers.{n}.{k}': w for k, w in tensors.items()})
  index = {'metadata': {}, 'weight_map': files}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  config = {
    'model_type': 'llama',
    'hidden_act': 'silu',
    'hidden_size': WIDTH,
    'intermediate_size': FF,
    'max_position_embeddings': 2048,
    'num_attention_heads': 32,
    'num_hidden_layers': LAYERS,
    'num_key_value_heads': 32,
    'rms_norm_eps': 1e-5,
    'rope_theta': 10000.0,
    'tie_word_embeddings': False,
    'vocab_size': VOCAB,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  return 2 * VOCAB * WIDTH


def read(folder: Path) -> None:
  """Every tensor, by safetensors alone."""
  for file in sorted(folder.glob('*.safetensors')):
    with safetensors.safe_open(file, framework='numpy') as reader:
      for name in reader.keys():
        reader.get_tensor(name)


def load(folder: Path, quant: QuantSpec | None, mesh: Any) -> None:
  jax.block_until_ready(
    load_pretrained(folder, quant, dtype=jnp.bfloat16, mesh=mesh)[1]
  )


def main(directory: str | None = None, rounds: str = '3') -> None:
  with tempfile.TemporaryDirectory() as made:
    folder = Path(directory or made)
    if directory is None:
      write_llama(folder)
    size = sum(f.stat().st_size for f in folder.glob('*.safetensors'))
    mesh = make_mesh()
    ways = {
      'safetensors': functools.partial(read, folder),
      'as it is': functools.partial(load, folder, None, None),
      'NF4': functools.partial(load, folder, QuantSpec(), None),
      f'NF4, {mesh.size} devices': functools.partial(
        load, folder, QuantSpec(), mesh
      ),
    }
    for way in ways.values():
      way()  # Compiles.
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(int(rounds)):
      for name, way in ways.items():
        began = time.perf_counter()
        way()
        seconds[name].append(time.perf_counter() - began)
  print(f'{size / 1e9:.2f} GB        GB/s  of safetensors')
  for name, times in seconds.items():
    pairs = zip(seconds['safetensors'], times, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    print(
      f'{name:<14} {size / 1e9 / statistics.median(times):6.2f} {ratio:8.3f}'
    )


if __name__ == '__main__':
  main(*sys.argv[1:])
