"""How fast a checkpoint is loaded, beside safetensors' own reading of it.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python experiments/benchmarks/load.py [--directory DIRECTORY]

Reads the directory (or a random Llama of 2 GB in bfloat16, made for it; 'tiny'
makes a small one) in turns: every tensor through safetensors; loaded as it is;
quantized to NF4; and that sharded over all devices there are. GB of the files
per second. The files are in the page cache: what is measured is not the disk.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import report
import result
import safetensors
import safetensors.numpy

from qdora_jax import QuantSpec, load_pretrained
from qdora_jax.sharding import make_mesh

# Width, feed-forward, vocabulary and layers of a Llama: 1.98 GB in bfloat16.
SHAPE = (2048, 5632, 65536, 14)
TINY = (512, 1024, 512, 2)
HEADS = 32


def write_llama(
  folder: Path, shape: tuple[int, int, int, int] = SHAPE, seed: int = 0
) -> int:
  """A checkpoint of many files; gives the bytes of its largest tensor."""
  width, ff, vocab, layers = shape
  rng, files = np.random.default_rng(seed), {}

  def normal(*shape: int) -> np.ndarray:
    # A row is repeated: drawing all of them would take longest.
    row = rng.standard_normal(shape[1], np.float32) * 0.02
    return np.tile(row.astype(ml_dtypes.bfloat16), (shape[0], 1))

  def save(tensors: dict[str, np.ndarray]) -> None:
    name = f'model-{len(set(files.values())):05}.safetensors'
    safetensors.numpy.save_file(tensors, folder / name)
    files.update(dict.fromkeys(tensors, name))

  one = np.ones(width, ml_dtypes.bfloat16)
  save({'model.embed_tokens.weight': normal(vocab, width)})
  save({'lm_head.weight': normal(vocab, width), 'model.norm.weight': one})
  for n in range(layers):
    shapes = {
      **{f'self_attn.{x}_proj': (width, width) for x in 'qkvo'},
      'mlp.gate_proj': (ff, width),
      'mlp.up_proj': (ff, width),
      'mlp.down_proj': (width, ff),
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
    'hidden_size': width,
    'intermediate_size': ff,
    'max_position_embeddings': 2048,
    'num_attention_heads': HEADS,
    'num_hidden_layers': layers,
    'num_key_value_heads': HEADS,
    'rms_norm_eps': 1e-5,
    'rope_theta': 10000.0,
    'tie_word_embeddings': False,
    'vocab_size': vocab,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  return 2 * vocab * width


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


def main() -> None:
  parser = result.parser(__doc__, rounds=3)
  parser.add_argument('--directory', help="a checkpoint, or 'tiny'")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as made:
    folder = Path(args.directory or made)
    if args.directory in (None, 'tiny'):
      folder = Path(made)
      shape = SHAPE if args.directory is None else TINY
      write_llama(folder, shape, args.seed)
    size = sum(f.stat().st_size for f in folder.glob('*.safetensors'))
    mesh = make_mesh()
    ways = {
      'safetensors': functools.partial(read, folder),
      'as it is': functools.partial(load, folder, None, None),
      'NF4': functools.partial(load, folder, QuantSpec(), None),
    }
    if mesh.size > 1:
      ways[f'NF4, {mesh.size} devices'] = functools.partial(
        load, folder, QuantSpec(), mesh
      )
    seconds = result.interleave(ways, args.rounds)
  rows = [
    {
      'loaded': name,
      'GB/s': result.spread([size / t for t in times], 1e-9),
      'of safetensors': result.ratio(seconds['safetensors'], times),
    }
    for name, times in seconds.items()
  ]
  what = f'Loading {size / 1e9:.2f} GB of safetensors, in the page cache.'
  print(report.markdown(result.write('load', what, rows, args, 'GB/s')))


if __name__ == '__main__':
  main()
