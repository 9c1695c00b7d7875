"""Public architectures by name, for plans of models that are not at hand.

Each is the part of its published config.json that fixes shapes; what is left
out has the family's usual value.
"""

import difflib
from pathlib import Path
from typing import Any

from qdora_jax.interop import families
from qdora_jax.interop.hf import read_json
from qdora_jax.model import ModelConfig
from qdora_jax.pretrained import open_checkpoint


def _config(
  family: str,
  width: int,
  ff: int,
  layers: int,
  heads: int,
  kv_heads: int,
  vocab: int,
  **more: Any,
) -> dict[str, Any]:
  """A config.json's fields."""
  return {
    'model_type': family,
    'hidden_size': width,
    'intermediate_size': ff,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'vocab_size': vocab,
    'tie_word_embeddings': False,
    'max_position_embeddings': 32768,
    **more,
  }


CONFIGS: dict[str, dict[str, Any]] = {
  # LLaMA, arXiv 2302.13971, table 2; feed-forward widths of its checkpoints.
  'llama-7b': _config('llama', 4096, 11008, 32, 32, 32, 32000),
  'llama-13b': _config('llama', 5120, 13824, 40, 40, 40, 32000),
  'llama-33b': _config('llama', 6656, 17920, 60, 52, 52, 32000),
  'llama-65b': _config('llama', 8192, 22016, 80, 64, 64, 32000),
  # huggingface.co/meta-llama: Llama-2-7b-hf, -13b-hf, -70b-hf.
  'llama-2-7b': _config('llama', 4096, 11008, 32, 32, 32, 32000),
  'llama-2-13b': _config('llama', 5120, 13824, 40, 40, 40, 32000),
  'llama-2-70b': _config('llama', 8192, 28672, 80, 64, 8, 32000),
  # meta-llama: Meta-Llama-3-8B, -70B (3.1 has the same shapes).
  'llama-3-8b': _config('llama', 4096, 14336, 32, 32, 8, 128256),
  'llama-3-70b': _config('llama', 8192, 28672, 80, 64, 8, 128256),
  # meta-llama: Llama-3.2-1B, -3B.
  'llama-3.2-1b': _config(
    'llama', 2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True
  ),
  'llama-3.2-3b': _config(
    'llama', 3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True
  ),
  # HuggingFaceTB: SmolLM2-135M, -360M, -1.7B.
  'smollm2-135m': _config(
    'llama', 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True
  ),
  'smollm2-360m': _config(
    'llama', 960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True
  ),
  'smollm2-1.7b': _config(
    'llama', 2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True
  ),
  # mistralai: Mistral-7B-v0.1.
  'mistral-7b': _config('mistral', 4096, 14336, 32, 32, 8, 32000),
  # Qwen: Qwen2.5-0.5B, -7B, -32B, -72B.
  'qwen2.5-0.5b': _config(
    'qwen2', 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True
  ),
  'qwen2.5-7b': _config('qwen2', 3584, 18944, 28, 28, 4, 152064),
  'qwen2.5-32b': _config('qwen2', 5120, 27648, 64, 40, 8, 152064),
  'qwen2.5-72b': _config('qwen2', 8192, 29568, 80, 64, 8, 152064),
  # Qwen: Qwen3-8B.
  'qwen3-8b': _config('qwen3', 4096, 12288, 36, 32, 8, 151936, head_dim=128),
}


def model_config(name: str) -> ModelConfig:
  """The architecture a name stands for, without reading any weight.

  Args:
    name: one of CONFIGS; a local Hugging Face directory, of which config.json
      alone is read; or anything `open_checkpoint` takes.

  Raises:
    ValueError: for a name that is nothing of these, naming the nearest.
  """
  if name in CONFIGS:
    return families.model_config(CONFIGS[name], name)
  file = Path(name).expanduser() / 'config.json'
  if file.is_file():
    return families.model_config(read_json(file), name)
  looks_like_a_name = '/' not in name and ':' not in name
  if looks_like_a_name and not name.endswith('.gguf'):
    near = difflib.get_close_matches(name.lower(), CONFIGS, n=3, cutoff=0.4)
    raise ValueError(
      f'no model {name!r} is known, and there is no such directory; near: '
      f'{", ".join(near or CONFIGS)}. A Hugging Face directory (its '
      'config.json is enough), a hub id or a .gguf file will do, too'
    )
  if name.count('/') == 1 and ':' not in name and not Path(name).exists():
    return families.model_config(_hub_config(name), name)
  return families.model_config(open_checkpoint(name).config, name)


def _hub_config(name: str) -> dict[str, Any]:
  """config.json of a hub id, and no other file of it."""
  from huggingface_hub import hf_hub_download

  try:
    return read_json(Path(hf_hub_download(name, 'config.json')))
  except OSError as error:
    short = name.split('/')[1].lower()
    near = difflib.get_close_matches(short, CONFIGS, n=3, cutoff=0.4)
    raise ValueError(
      f'{name}: no such directory, and the hub gave no config.json of that '
      f'name ({type(error).__name__}); known without a hub, near: '
      f'{", ".join(near or CONFIGS)}'
    ) from error
