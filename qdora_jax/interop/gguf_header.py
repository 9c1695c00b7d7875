"""The header of a GGUF file: metadata and tensor table, no tensor data.

Layout (ggml's docs/gguf.md, version 3; version 2 is the same on disk):

  magic 'GGUF', version u32, tensor count u64, metadata count u64
  metadata: key string, type u32, value; a string is a u64 length and UTF-8
  tensors:  name string, rank u32, dims u64 each, type u32, offset u64
  padding to the alignment, then the data the offsets count from

The `gguf` package's GGUFReader makes a memmap view of every one of 200,000
vocabulary entries, which takes 3 s for SmolLM2; this takes 0.1 s and reports
a cut-off download as such.
"""

import mmap
import os
import struct
from typing import Any, NamedTuple

import numpy as np

# ggml docs/gguf.md, enum gguf_metadata_value_type.
_SCALARS = {
  0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?",
  10: "u8", 11: "i8", 12: "f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# ggml docs/gguf.md: general.alignment, "32 if not specified".
_ALIGNMENT = 32


class TensorInfo(NamedTuple):
  """One row of the tensor table."""

  shape: tuple[int, ...]  # outermost axis first: (out, in) for a linear
  kind: int  # gguf.GGMLQuantizationType
  offset: int  # bytes from the start of the file


class Header(NamedTuple):
  """What stands before the tensor data."""

  fields: dict[str, Any]  # Python ints, floats, bools, strings, lists
  tensors: dict[str, TensorInfo]
  size: int  # bytes of the header, padding excluded


class _Cursor:
  """Reads little-endian values one after the other."""

  def __init__(self, data: mmap.mmap):
    self.data, self.at = data, 0

  def take(self, count: int) -> bytes:
    if self.at + count > len(self.data):
      raise EOFError
    self.at += count
    return self.data[self.at - count : self.at]

  def unpack(self, form: str) -> tuple:
    return struct.unpack('<' + form, self.take(struct.calcsize('<' + form)))

  def string(self) -> str:
    return self.take(*self.unpack('Q')).decode('utf-8')

  def array(self, kind: int, count: int) -> list:
    dtype = np.dtype(_SCALARS[kind]).newbyteorder('<')
    return np.frombuffer(self.take(dtype.itemsize * count), dtype).tolist()

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return self.array(kind, 1)[0]
    kind, count = self.unpack('IQ')
    if kind in (_STRING, _ARRAY):
      return [self.value(kind) for _ in range(count)]
    return self.array(kind, count)


def read_header(path: str | os.PathLike) -> Header:
  """Reads metadata and tensor table of the GGUF file at `path`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not a GGUF file, an unknown version, or one that ends early.
  """
  with open(path, 'rb') as f:
    magic = f.read(8)
    if len(magic) < 8 or magic[:4] != b'GGUF':
      raise ValueError(
        f'{path} is not a GGUF file: it starts with {magic[:4]!r}, expected'
        " b'GGUF'. An HTML page saved under that name, or a Git LFS pointer,"
        ' looks like this: download the file itself'
      )
    (version,) = struct.unpack('<I', magic[4:])
    if version not in (2, 3):
      raise ValueError(
        f'{path} has GGUF version {version}, expected 2 or 3, little-endian:'
        ' convert the model again with a current llama.cpp'
      )
    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
      try:
        return _parse(_Cursor(data))
      except (
        EOFError,
        KeyError,
        OverflowError,
        RecursionError,
        UnicodeDecodeError,
      ) as error:
        raise ValueError(
          f'{path} ends early or is damaged: its header does not fit its'
          f' {len(data)} bytes ({error!r}). Download it again'
        ) from error


def _parse(cursor: _Cursor) -> Header:
  cursor.take(8)
  tensor_count, field_count = cursor.unpack('QQ')
  fields = {}
  for _ in range(field_count):
    key = cursor.string()
    fields[key] = cursor.value(*cursor.unpack('I'))
  rows = []
  for _ in range(tensor_count):
    name = cursor.string()
    (rank,) = cursor.unpack('I')
    dims = cursor.unpack(f'{rank}Q')
    rows.append((name, dims[::-1], *cursor.unpack('IQ')))
  align = _ALIGNMENT
  if 'general.alignment' in fields:
    align = fields['general.alignment']
    if type(align) is not int or align < 1:
      raise KeyError(f'general.alignment={str(align)[:40]}')
  start = -(-cursor.at // align) * align
  tensors = {n: TensorInfo(s, k, start + o) for n, s, k, o in rows}
  return Header(fields, tensors, cursor.at)
