"""What a training step moves between devices and computes, from shapes alone.

Bytes are those one device receives, per optimizer step. Under FSDP a layer's
packed codes are gathered where they are used, once in the forward loop over
layers and once in the backward loop, whatever is rematerialized there
(`tests/test_traffic.py` reads that off the compiled program), in every
microbatch, and every microbatch's gradients are summed over the devices: a tied
embedding's twice, as it is looked up and as the head. The head is gathered
once, for logits and their gradient together; of the embedding only rows travel.
Gathering over n devices brings (n - 1) / n of the whole.
"""

import math

import jax
import jax.numpy as jnp

from qdora_jax import paths
from qdora_jax.devices import Device
from qdora_jax.footprint import activations, in_chunks
from qdora_jax.job import Job, share, trees
from qdora_jax.sharding import shardings

USES = 2


def moved(job: Job) -> dict[str, int]:
  """Bytes that one device receives in a step, by collective."""
  made = trees(job)
  uses = USES * job.microbatches
  gathered = dict.fromkeys(('codes', 'absmax', 'full', 'trained'), 0)
  scattered = everywhere = summed = 0
  for name, tree in (('base', made.base), ('trained', made.trained)):
    specs = jax.tree_util.tree_leaves_with_path(shardings(tree, job.mesh()))
    sizes = share(tree, job)
    for path, sharding in specs:
      axes = [a for axis in sharding.spec for a in _names(axis)]
      path = paths.of(path)
      # Together one device holds fsdp shares, all but one of them received.
      others = sizes[path] * (job.fsdp - 1)
      # A tied embedding's sums are two: as the head, and of what was looked up.
      sums = (1 + (job.model.tied and path == job.head)) * (name == 'trained')
      summed += sums * sizes[path]
      if 'fsdp' not in axes:
        everywhere += sums * sizes[path]
        continue
      # What is sharded over fsdp is reduced to its owner.
      scattered += sums * others * job.microbatches
      part = path.rpartition('/')[2]
      kind = part if part in ('codes', 'absmax') else 'full'
      kind = 'trained' if name == 'trained' else kind
      if path == job.head:
        gathered[kind] += others * job.microbatches
      elif not path.startswith('embed/'):
        gathered[kind] += others * uses
  reduced = 2 * summed * (job.data - 1) // job.data
  reduced += 2 * everywhere * (job.fsdp - 1) // job.fsdp
  reduced *= job.microbatches
  # A ring's all-reduce over tensor: the outputs of o and down, and the
  # gradients of what q, k, v and gate, up read, in every layer.
  passes = 2 + (job.remat != 'none')
  across = 2 * job.tokens * job.model.width * job.width * job.microbatches
  across = across * job.model.layers * 2 * passes // 2
  ring = 2 * (job.tensor - 1) / job.tensor
  _, host = activations(job)
  return {
    'all-gather of packed codes': gathered['codes'],
    'all-gather of absmax': gathered['absmax'],
    'all-gather of full-precision leaves': gathered['full'],
    'all-gather of trained leaves': gathered['trained'],
    'reduce-scatter of gradients': scattered,
    'all-reduce of gradients': reduced,
    'all-reduce of activations': int(across * ring),
    "all-to-all of the embedding's rows": _rows(job),
    'to the host and back': 2 * host * job.microbatches
    + (2 * sum(share(made.state, job).values()) if job.paged else 0),
  }


def _rows(job: Job) -> int:
  """Looked up by features, and wanted by rows: bytes that change places."""
  size = 4 if job.adapter is None else jnp.dtype(job.dtype).itemsize
  trained = 2 if job.adapter is None else 1
  rows = job.tokens * job.model.width * size * trained * job.microbatches
  return rows * (job.fsdp - 1) // job.fsdp


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
  if axis is None:
    return ()
  return (axis,) if isinstance(axis, str) else tuple(axis)


def flops(job: Job) -> float:
  """FLOPs of one device in a step; a multiply-add counts as two.

  A product is made once forward and once for its input's gradient, once for its
  weight's where that is trained, and once more where remat makes it again: all
  but a block's last, which is kept where anything asks for it.
  Attention is counted as it is computed here: in the plain form every query
  with every key; in chunks, of one text a row, half of that, and scores once
  more on the way back.
  """
  c, made = job.model, trees(job)
  again = job.remat in ('block', 'offload')
  full = job.adapter is None
  flat = paths.flatten(made.trained if full else made.base)
  sizes = {
    path: math.prod(leaf.shape)
    for path, leaf in flat.items()
    if path.endswith('/kernel') and len(leaf.shape) == 3
  }
  kernels, last = sum(sizes.values()), sizes['layers/mlp/down/kernel']
  per_token = 2 * kernels * (2 + full) + 2 * (kernels - last) * again
  thin = sum(
    math.prod(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(made.trained)
    if paths.of(path).endswith(('lora_a', 'lora_b'))
  )
  per_token += 2 * thin * (3 + again)
  scores = 4 * job.seq_len * c.heads * c.head_dim * c.layers
  if in_chunks(job):
    per_token += (3.5 + again) / 2 * scores
  else:
    per_token += (3 + (job.remat != 'none')) * scores
  tokens = job.batch * job.seq_len
  learned = job.batch * (job.learned or job.seq_len)
  head = 2 * c.width * c.vocab * (2 + full) * learned
  return (per_token * tokens + head) / job.devices


def bound(job: Job, device: Device) -> tuple[float, str]:
  """(tokens per second at most on all devices together, by what).

  The best that arithmetic, memory, links between devices or the host's link
  allow, each at its published peak and all overlapped: no program is faster.
  """
  made, wire = trees(job), moved(job)
  host = wire.pop('to the host and back')
  base = sum(share(made.base, job).values()) * job.fsdp
  read = base * USES * job.microbatches
  read += 3 * sum(share(made.state, job).values())
  limits = {
    'arithmetic': flops(job) / device.flops,
    'memory': read / device.bandwidth,
    'links': sum(wire.values()) / device.link,
    "the host's link": host / device.host_link,
  }
  what = max(limits, key=limits.get)
  return job.batch * job.seq_len / limits[what], what
