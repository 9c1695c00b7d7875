"""What a config comes to where it is opened: on these devices, in this folder.

The compute dtype, the mesh and the adapter that training goes on from; each is
refused, in the config's own words, where it cannot be.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from qdora_jax import devices, folder, paths
from qdora_jax.adapter import Adapter
from qdora_jax.config import RunConfig
from qdora_jax.interop.peft_read import load_adapter
from qdora_jax.sharding import make_mesh
from qdora_jax.specs import AdapterSpec

Tree = dict[str, Any]


def settled(config: RunConfig, workdir: Path) -> RunConfig:
  """The config, and for model.dtype='auto' what the run began in there.

  A run that is new asks the device.

  Args:
    config: of the run.
    workdir: its folder, which need not exist.
  """
  if config.model.dtype != 'auto':
    return config
  if (workdir / 'config.json').exists():
    dtype = folder.config_of(workdir).model.dtype
  else:
    dtype, _ = devices.best_dtype(jax.devices()[0])
  model = dataclasses.replace(config.model, dtype=dtype)
  return dataclasses.replace(config, model=model)


def mesh_of(config: RunConfig) -> jax.sharding.Mesh | None:
  """The mesh of config.mesh; None for one device.

  Raises:
    ValueError: if the devices here, or the batch, cannot be shared so.
  """
  m = config.mesh
  here = jax.devices()
  need = m.data * abs(m.fsdp) * m.tensor
  if need > len(here) or (m.fsdp == -1 and len(here) % need):
    raise ValueError(
      f'config.mesh asks for data={m.data} x fsdp={m.fsdp} x tensor={m.tensor} '
      f'devices; there are {len(here)}. Expected a product of at most that; '
      'with fsdp=-1, the others must divide it'
    )
  if m.fsdp != -1:
    here = here[:need]
  if len(here) < len(jax.devices()) and jax.process_count() > 1:
    raise ValueError(
      f'config.mesh uses {need} of {len(jax.devices())} devices, and every one '
      f'of {jax.process_count()} processes takes part with all that it has; '
      f'expected a product of {len(jax.devices())} (fsdp=-1 takes all that are '
      'left), or fewer processes'
    )
  mesh = make_mesh(m.data, m.fsdp, m.tensor, here)
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  part = config.train.batch_size // config.train.microbatches
  if part % ways:
    raise ValueError(
      f'config.train.batch_size={config.train.batch_size} in '
      f'{config.train.microbatches} microbatches cannot be split over {ways} '
      f'devices; expected a multiple of {ways * config.train.microbatches}, or '
      'lower config.mesh.data and config.mesh.fsdp'
    )
  return mesh if mesh.size > 1 else None


def shrunk(config: RunConfig) -> RunConfig:
  """The config, on as many of the devices here as can share its batches."""
  try:
    mesh_of(config)
    return config
  except ValueError:
    m, count = config.mesh, len(jax.devices())
  part = config.train.batch_size // config.train.microbatches
  fsdp = math.gcd(part, count)
  print(
    f'config.mesh is data={m.data}, fsdp={m.fsdp}, tensor={m.tensor}; of the '
    f'{count} devices here fsdp={fsdp} is taken'
  )
  mesh = dataclasses.replace(m, data=1, fsdp=fsdp, tensor=1)
  return dataclasses.replace(config, mesh=mesh)


def loaded_adapter(
  path: str, base: Tree, fresh: Tree, spec: AdapterSpec
) -> Tree:
  """A PEFT adapter in a fresh one's place; it must be what the config says.

  Args:
    path: config.adapter.path.
    base: the tree it adapts.
    fresh: an adapter made by `spec`.
    spec: of config.adapter.

  Raises:
    ValueError: naming the first thing in which they differ.
  """
  found = paths.flatten(load_adapter(path, base))
  theirs = next(n for n in found.values() if isinstance(n, Adapter)).spec
  for key in ('method', 'rank', 'alpha', 'rslora'):
    have, want = getattr(theirs, key), getattr(spec, key)
    if have != want:
      raise ValueError(
        f'config.adapter.path={path!r} holds an adapter of {key} {have!r}, and '
        f'config.adapter.{key}={want!r}; set it to {have!r}'
      )
  have, want = _adapted(found), _adapted(paths.flatten(fresh))
  for name in {**have, **want}:
    if name not in have or name not in want or have[name] != want[name]:
      has = 'rank {}, alpha {}'.format(*have[name]) if name in have else 'none'
      asks = 'rank {}, alpha {}'.format(*want[name]) if name in want else 'none'
      raise ValueError(
        f'config.adapter.path={path!r} holds an adapter of other kernels: for '
        f'{name} it has {has}, config.adapter asks for {asks}; set '
        'config.adapter.targets, rank_pattern and alpha_pattern to what it was '
        'trained with'
      )
  beside = {p for p, n in found.items() if not isinstance(n, Adapter)}
  flat = paths.flatten(fresh)
  asked = {p for p, n in flat.items() if not isinstance(n, Adapter)}
  if beside != asked:
    raise ValueError(
      f'config.adapter.path={path!r} holds {sorted(beside) or "nothing"} '
      f'trained in full, config.adapter.trainable={spec.trainable!r} asks for '
      f'{sorted(asked) or "nothing"}; set it to what it was trained with'
    )
  mine = {
    p: n if p in beside else n.replace(spec=spec) for p, n in found.items()
  }
  return paths.unflatten({**paths.flatten(fresh), **mine})


def _adapted(flat: Tree) -> dict[str, tuple[int, float]]:
  """{name: (rank, alpha)} of every kernel that is adapted."""
  return {
    name: (rank, node.spec.alpha_of(name))
    for node in flat.values()
    if isinstance(node, Adapter)
    for name, rank in zip(node.names, node.ranks, strict=True)
    if rank
  }
