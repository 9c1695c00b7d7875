"""Checkpoints in llama.cpp's GGUF format, read as Hugging Face ones.

What differs from the Hugging Face directory of the same model is undone here:
tensor names, quantized storage (dequantized one tensor at a time with the
`gguf` package), the order of the rows of q and k, which llama.cpp permutes in
some architectures so that rotary pairs are neighbours, and the 1 it adds to
Gemma's norms.
"""

import hashlib
import math
import os
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdora_jax.interop import gguf_config, gguf_header, hf, hf_write

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# llama.cpp gguf-py/gguf/constants.py, TENSOR_NAMES -> Hugging Face's modules.
_NAMES = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_qkv': 'self_attn.qkv_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'attn_output': 'self_attn.o_proj',
  'post_attention_norm': 'post_attention_layernorm',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
  'post_ffw_norm': 'post_feedforward_layernorm',
}
# Where an architecture means another module by a name.
_OTHER_NAMES = {
  'gemma2': {'ffn_norm': 'pre_feedforward_layernorm'},
  'gemma3': {'ffn_norm': 'pre_feedforward_layernorm'},
  'phi3': {'ffn_up': 'mlp.gate_up_proj'},
}
# Converted by llama.cpp's LlamaModel, which permutes q and k.
_PERMUTED = ('llama', 'smollm3', 'granite')
# Their norms multiply by 1 + weight; the file holds the sum.
_UNIT_SCALE = ('gemma2', 'gemma3')
# Rotary divisors: read with the config, no parameters.
_DIVISORS = ('rope_freqs', 'rope_factors_long', 'rope_factors_short')
# Bytes of every tensor that enter the fingerprint.
_SAMPLE = 64


class GGUFCheckpoint:
  """A model in one `.gguf` file.

  The header is read at once; tensor data is mapped and touched by `read`
  only, so the object costs little more than its vocabulary.

  Attributes:
    config: what `config.json` of the same model would hold.
    shapes: Hugging Face tensor name -> shape, (out, in) for a linear.
    stored: empty; none of llama.cpp's storage types is NF4.

  Raises:
    FileNotFoundError, ValueError: no such file, not a (whole) GGUF file, an
      architecture, a tensor or a setting that is not supported, metadata that
      is missing.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = Path(path)
    self._header = gguf_header.read_header(self.path)
    self.config = gguf_config.build(
      self._header, self._dequantize, str(self.path)
    )
    self._arch = self._header.fields['general.architecture']
    self.stored: dict[str, Any] = {}
    self._names = {
      self._hf_name(n): n
      for n in self._header.tensors
      if n.removesuffix('.weight') not in _DIVISORS
    }
    self.shapes = {
      hf: self._header.tensors[name].shape for hf, name in self._names.items()
    }

  def read(
    self, name: str, part: tuple[slice, ...] | None = None
  ) -> np.ndarray:
    """One tensor as a new float32 array of shape `shapes[name]`.

    Args:
      name: of the tensor.
      part: a slice of each axis; all of the tensor is read for it.

    Raises:
      KeyError: no tensor of that Hugging Face name.
      ValueError: its storage type is unknown to the `gguf` package, or the
        file ends before its data does.
    """
    if name not in self._names:
      raise KeyError(
        f'{self.path} has no tensor {name!r}; it has {sorted(self._names)}'
      )
    w = self._read(name)
    return w if part is None else w[part]

  def _read(self, name: str) -> np.ndarray:
    """As the model has it: norms' scales and queries' order are undone."""
    w = self._dequantize(self._names[name])
    if self._arch in _UNIT_SCALE and name.endswith('norm.weight'):
      w -= 1
    if self._arch not in _PERMUTED:
      return w
    if name.endswith(('q_proj.weight', 'q_proj.bias')):
      w = _unpermute(w, self.config['num_attention_heads'])
    if name.endswith(('k_proj.weight', 'k_proj.bias')):
      w = _unpermute(w, self.config['num_key_value_heads'])
    return w

  def tokenizer(self) -> 'PreTrainedTokenizerFast':
    """The tokenizer of the file's vocabulary; see `gguf_tokenizer.build`."""
    from qdora_jax.interop import gguf_tokenizer

    with hf.reading_tokenizer(f'{self.path}: its vocabulary'):
      return gguf_tokenizer.build(self._header.fields, str(self.path))

  def write_rest(self, directory: Path) -> None:
    """Writes the tokenizer, and which tokens begin and end a text."""
    self.tokenizer().save_pretrained(directory)
    ends = [k for k in self.config if k.endswith('_token_id')]
    values = {k: self.config[k] for k in ends if self.config[k] is not None}
    hf_write.write_json(directory / 'generation_config.json', values)

  def fingerprint(self) -> str:
    """sha256 of the header, the file's size and 64 bytes of every tensor.

    Cheap, and the same on every machine. Two fine-tunes of one model differ;
    files that differ in a few numbers of a tensor's interior may not.
    """
    digest = hashlib.sha256(self._data[: self._header.size].tobytes())
    digest.update(len(self._data).to_bytes(8, 'little'))
    for info in self._header.tensors.values():
      digest.update(self._data[info.offset : info.offset + _SAMPLE].tobytes())
    return digest.hexdigest()

  @cached_property
  def _data(self) -> np.ndarray:
    """The file's bytes, mapped."""
    return np.memmap(self.path, np.uint8, mode='r')

  def _hf_name(self, name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    parts = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)', name)
    if parts is None or parts[2] not in _NAMES:
      raise ValueError(
        f'{self.path}: tensor {name!r} is not part of a {self._arch} model as '
        'it is known here (experts and the like are not supported). Load the '
        "model's Hugging Face directory instead"
      )
    layer, module, kind = parts.groups()
    place = '' if layer is None else f'model.layers.{layer}.'
    modules = {**_NAMES, **_OTHER_NAMES.get(self._arch, {})}
    return f'{place}{modules[module]}.{kind}'

  def _dequantize(self, name: str) -> np.ndarray:
    """A tensor by llama.cpp's name, in its row order."""
    info = self._header.tensors[name]
    gguf = _import_gguf()
    kinds = {int(k): k for k in gguf.GGMLQuantizationType}
    if info.kind not in kinds:
      raise ValueError(
        f'{self.path}: {name!r} has storage type {info.kind}, expected one of'
        f' {sorted(kinds)}. Install a newer gguf: pip install -U gguf'
      )
    kind = kinds[info.kind]
    try:
      shape = gguf.quant_shape_to_byte_shape(info.shape, kind)
    except (ValueError, IndexError) as error:
      raise ValueError(
        f'{self.path}: {name!r} of shape {info.shape} cannot be stored as '
        f'{kind.name} ({error}). Download it again'
      ) from error
    end = info.offset + math.prod(shape)
    if end > len(self._data):
      raise ValueError(
        f'{self.path} ends early: the data of {name!r} ends at byte {end},'
        f' the file at {len(self._data)}. Download it again'
      )
    packed = np.asarray(self._data[info.offset : end]).reshape(shape)
    try:
      w = gguf.dequantize(packed, kind)
    except NotImplementedError as error:
      raise ValueError(
        f'{self.path}: {name!r} is stored as {kind.name}, which gguf cannot'
        ' dequantize. Use a file of the model in Q8_0 or F16'
      ) from error
    # F32 comes back as a read-only view of the file.
    return w if w.flags.writeable else w.copy()


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
  """Undoes llama.cpp's row order: pairs side by side -> halves apart."""
  # llama.cpp convert_hf_to_gguf.py, LlamaModel.permute, inverted.
  pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, -1)
  return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(w.shape)


def _import_gguf() -> Any:
  try:
    import gguf
  except ImportError as error:
    raise ImportError(
      "reading a .gguf file needs the package 'gguf', which is not installed:"
      " pip install 'qdora_jax[demo]'"
    ) from error
  return gguf
