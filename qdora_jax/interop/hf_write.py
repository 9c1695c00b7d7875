"""Hugging Face directories out: one tensor in memory at a time.

A safetensors file is the length of its header (u64), the header - JSON of every
tensor's dtype, shape and place - and the numbers. Shapes are known before any
number is, so the header is written first and tensors follow as they come.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# safetensors' names of dtypes.
_DTYPES = {
  np.dtype(np.float32): 'F32',
  np.dtype(np.float16): 'F16',
  np.dtype(ml_dtypes.bfloat16): 'BF16',
  np.dtype(np.uint8): 'U8',
}


class Tensor(NamedTuple):
  """A tensor to be written, and what makes it when its turn comes."""

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
  """A directory that appears when all in it is written, or not at all.

  Raises:
    FileExistsError: if it exists and holds something.
  """
  directory = Path(directory)
  if directory.exists() and (
    not directory.is_dir() or any(directory.iterdir())
  ):
    raise FileExistsError(
      f'{directory} exists and is not empty; name a new directory'
    )
  directory.parent.mkdir(parents=True, exist_ok=True)
  part = Path(
    tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=directory.parent)
  )
  try:
    yield part
    # mkdtemp's are for one's own eyes only.
    part.chmod(0o777 & ~_umask())
    if directory.exists():
      directory.rmdir()
    os.replace(part, directory)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def write_tensors(
  directory: Path, tensors: Mapping[str, Tensor], max_file_bytes: float
) -> None:
  """model.safetensors; if it is too much for one file, several with an index.

  Args:
    directory: that exists.
    tensors: by Hugging Face name.
    max_file_bytes: a file holds at most so much, or one tensor.
  """
  files: list[list[str]] = [[]]
  size = 0
  for name, tensor in tensors.items():
    if files[-1] and size + tensor.nbytes > max_file_bytes:
      files.append([])
      size = 0
    files[-1].append(name)
    size += tensor.nbytes
  if len(files) == 1:
    _write_file(directory / 'model.safetensors', files[0], tensors)
    return
  where = {}
  for n, names in enumerate(files):
    file = f'model-{n + 1:05}-of-{len(files):05}.safetensors'
    _write_file(directory / file, names, tensors)
    where |= dict.fromkeys(names, file)
  total = sum(tensor.nbytes for tensor in tensors.values())
  index = {'metadata': {'total_size': total}, 'weight_map': where}
  write_json(directory / 'model.safetensors.index.json', index)


def _write_file(
  file: Path, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
  # Wide dtypes first: every tensor then begins at a multiple of its width.
  names = sorted(names, key=lambda name: -tensors[name].dtype.itemsize)
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  at = 0
  for name in names:
    tensor = tensors[name]
    header[name] = {
      'dtype': _DTYPES[tensor.dtype],
      'shape': list(tensor.shape),
      'data_offsets': [at, at + tensor.nbytes],
    }
    at += tensor.nbytes
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with file.open('wb') as out:
    out.write(len(text).to_bytes(8, 'little') + text)
    for name in names:
      array = np.ascontiguousarray(tensors[name].make())
      assert array.shape == tensors[name].shape, name
      assert array.dtype == tensors[name].dtype, name
      out.write(array.reshape(-1).view(np.uint8))


def write_json(file: Path, values: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(values, indent=2) + '\n')
