"""A model out of here: merged, folded, or its base in bitsandbytes' 4 bits.

merged   every weight with its adapter in it, in full precision: for servers
         that know neither adapters nor 4 bits.
folded   QDoRA for servers that know NF4 and LoRA, but not DoRA. With g the gain
         m / ||V|| of every output,
           g (Wq + s A B) = (Wq, its absmax times g) + s A (B g)
         so a 4-bit base with other scales and a plain LoRA are the same model,
         exactly: no code changes.
base     what was trained upon, for the adapter that `save_adapter` writes.

All are Hugging Face directories, written one tensor at a time.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import dora, paths
from qdora_jax.adapter import Adapter
from qdora_jax.interop import bnb, hf
from qdora_jax.interop.hf_write import (
  Tensor,
  new_directory,
  write_json,
  write_tensors,
)
from qdora_jax.interop.peft import save_adapter
from qdora_jax.linear import kind, materialize, scaled
from qdora_jax.pretrained import open_checkpoint
from qdora_jax.specs import AdapterSpec
from qdora_jax.transforms import adapted_norms, attach

Tree = dict[str, Any]
# As transformers cuts files.
MAX_FILE_BYTES = 5e9
DTYPES = ('float32', 'bfloat16', 'float16')


def export_merged(
  directory: str | Path,
  base: Tree,
  adapter: Tree,
  source: str | Path,
  dtype: str = 'bfloat16',
  *,
  max_file_bytes: float = MAX_FILE_BYTES,
) -> None:
  """Writes the model with its adapter merged, in full precision.

  Args:
    directory: to be made; weights, config.json, tokenizer and what else lies
      beside the source's weights.
    base: frozen tree, quantized or not; {} after full fine-tuning.
    adapter: what was trained.
    source: the checkpoint that base was loaded from, as `load_pretrained` takes
      it.
    dtype: 'float32', 'bfloat16' or 'float16'.
    max_file_bytes: cut into files of at most that.

  Raises:
    ValueError: for another dtype; FileExistsError if directory holds something.
  """
  if dtype == 'nf4':
    raise ValueError(
      "dtype='nf4': merging into 4-bit codes loses what was trained (an update "
      "of 2% of a weight's size changes no code at all). Use format 'folded' "
      '(export_folded), which keeps codes and update, or merge into one of '
      f'{", ".join(DTYPES)}'
    )
  tree = attach(base, adapter)
  with new_directory(directory) as part:
    _write(part, tree, source, dtype, max_file_bytes, four_bit=False)


def export_base(
  directory: str | Path,
  base: Tree,
  source: str | Path,
  dtype: str = 'bfloat16',
  *,
  max_file_bytes: float = MAX_FILE_BYTES,
) -> None:
  """Writes a quantized base as transformers and bitsandbytes store it.

  Args:
    directory: to be made.
    base: tree with at least one NF4 kernel.
    source: the checkpoint that base was loaded from.
    dtype: of what is not quantized, and what bitsandbytes dequantizes to.
    max_file_bytes: cut into files of at most that.

  Raises:
    ValueError: if nothing is quantized, or for another dtype; FileExistsError
      if directory holds something.
  """
  if not any(_packed(leaf) for leaf in paths.flatten(base).values()):
    raise ValueError(
      'nothing in the tree is quantized: there is no 4-bit base to export; '
      'export_merged writes full precision'
    )
  with new_directory(directory) as part:
    _write(part, base, source, dtype, max_file_bytes, four_bit=True)


def export_folded(
  directory: str | Path,
  base: Tree,
  adapter: Tree,
  source: str | Path,
  dtype: str = 'float32',
  *,
  max_file_bytes: float = MAX_FILE_BYTES,
) -> None:
  """Writes DoRA over NF4 as rescaled NF4 and a plain LoRA.

  Args:
    directory: to be made; directory/model is the base as bitsandbytes stores
      it, directory/adapter the LoRA as PEFT does.
    base: frozen tree with at least one NF4 kernel.
    adapter: LoRA or DoRA; what is trained in full beside it goes into the base.
    source: the checkpoint that base was loaded from.
    dtype: of what is not quantized, and what bitsandbytes dequantizes to.
    max_file_bytes: cut into files of at most that.

  Raises:
    ValueError: if a trained magnitude is negative, naming where; as
      `export_base`.
  """
  folded, plain = fold(base, adapter)
  with new_directory(directory) as part:
    export_base(
      part / 'model', folded, source, dtype, max_file_bytes=max_file_bytes
    )
    save_adapter(part / 'adapter', plain, str(Path(directory) / 'model'))


def fold(base: Tree, adapter: Tree) -> tuple[Tree, Tree]:
  """The base with every gain folded in, and the LoRA that goes with it.

  Returns:
    (base, adapter) whose `attach` is the same model: no magnitudes are left.

  Raises:
    ValueError: if a magnitude is negative: absmax cannot be.
  """
  flat = paths.flatten(attach(base, adapter, norms=_norms(base, adapter)))
  plain, negative = {}, []
  for path, node in paths.flatten(adapter).items():
    if not isinstance(node, Adapter):
      continue
    w = flat[path]
    if w.lora_a is None:
      raise ValueError(
        f'method={node.spec.method!r} trains no LoRA to go beside a folded '
        "base: export it with format 'merged'"
      )
    node = Adapter(w.lora_a, w.lora_b, None, node.names, _plain(node.spec))
    if paths.flatten(adapter)[path].magnitude is None:
      flat[path], plain[path] = w.base, node
      continue
    gain = dora.gain(w.magnitude, w.norm, w.scale)
    below = int(jnp.sum(gain < 0))
    if below:
      negative.append(f'{below} of {path}')
    flat[path] = scaled(w.base, gain)
    plain[path] = node.replace(lora_b=node.lora_b * gain[..., None, :])
  if negative:
    raise ValueError(
      f'magnitudes below zero cannot be folded: {", ".join(negative)}. Export '
      "with format 'merged', or 'peft' for servers that know DoRA"
    )
  return paths.unflatten(flat), paths.unflatten(plain)


def _plain(spec: AdapterSpec) -> AdapterSpec:
  """The LoRA that is left; its base is written beside it, whatever init did."""
  spec = dataclasses.replace(spec, init='kaiming')
  if spec.shared:
    # Its vectors are all the scale there is: alpha / rank is 1.
    options = {'alpha': float(spec.rank), 'alpha_pattern': {}, 'rslora': False}
    spec = dataclasses.replace(spec, **options)
  return dataclasses.replace(spec, method='lora')


_norms = jax.jit(adapted_norms)


def _packed(leaf: Any) -> bool:
  return kind(leaf).startswith('nf4')


def _write(
  directory: Path,
  tree: Tree,
  source: str | Path,
  dtype: str,
  max_file_bytes: float,
  four_bit: bool,
) -> None:
  """A tree of any leaves as a Hugging Face directory."""
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r}: expected one of {", ".join(DTYPES)}')
  checkpoint = open_checkpoint(source)
  tensors: dict[str, Tensor] = {}
  double, dense = False, []
  for path, leaf in paths.flatten(tree).items():
    names = paths.names(path, leaf)
    for n, name in enumerate(names):
      layer = None if names == [path] else n
      if four_bit and _packed(leaf):
        double |= leaf.nested is not None
        tensors |= _four_bit(hf.tensor_name(name), leaf, layer, dtype)
        continue
      tensors[hf.tensor_name(name)] = _dense(leaf, layer, path, dtype)
      if path.startswith(paths.STACK) and path.endswith('kernel'):
        dense.append(hf.module_name(name.rsplit('/', 1)[0]))
  config = {**checkpoint.config, 'dtype': dtype}
  if 'torch_dtype' in config:
    # As versions before transformers 5 called it.
    config['torch_dtype'] = dtype
  config.pop('quantization_config', None)
  if four_bit:
    config['quantization_config'] = bnb.config(double, dtype, dense)
  write_json(directory / 'config.json', config)
  checkpoint.write_rest(directory)
  write_tensors(directory, tensors, max_file_bytes)


def _slice(leaf: Any, layer: int | None) -> Any:
  return leaf if layer is None else jax.tree.map(lambda a: a[layer], leaf)


def _dense(leaf: Any, layer: int | None, path: str, dtype: str) -> Tensor:
  """One layer's weight as a tensor of PyTorch's layout."""
  shape = tuple(leaf.shape if layer is None else leaf.shape[1:])
  turned = path.endswith('kernel')

  def make() -> np.ndarray:
    w = np.asarray(_materialize(_slice(leaf, layer), dtype))
    return w.T if turned else w

  shape = shape[::-1] if turned else shape
  return Tensor(shape, np.dtype(jnp.dtype(dtype)), make)


_materialize = jax.jit(
  lambda leaf, dtype: materialize(leaf, jnp.float32).astype(dtype),
  static_argnums=1,
)


def _four_bit(
  name: str, leaf: Any, layer: int | None, dtype: str
) -> dict[str, Tensor]:
  """The tensors of one layer's packed kernel."""

  def part(key: str) -> Any:
    return lambda: bnb.write(name, _slice(leaf, layer), dtype)[key]

  # Only shapes and dtypes of these are used: arrays of zeros stand in.
  shapes = jax.eval_shape(lambda: _slice(leaf, layer))
  blank = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
  written = bnb.write(name, blank, dtype)
  return {
    key: Tensor(array.shape, array.dtype, part(key))
    for key, array in written.items()
  }
