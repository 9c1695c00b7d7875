"""A training step on paper: what is trained how, and its trees as shapes.

What a `Job` holds in memory is counted by `footprint.py`, what it moves and
computes by `traffic.py`; `plan.py` puts both together.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType

from qdora_jax import optim, paths
from qdora_jax.adapter import init_adapter
from qdora_jax.attention import Form
from qdora_jax.model import Decoder, ModelConfig, Remat
from qdora_jax.sharding import AXES, shardings
from qdora_jax.specs import TAKEN, AdapterSpec, QuantSpec
from qdora_jax.transforms import norms, quantize

Tree = dict[str, Any]
_QUANT, _ADAPTER = QuantSpec(), AdapterSpec()


@dataclasses.dataclass(frozen=True)
class Job:
  """A training step, without its weights.

  Attributes:
    model: the architecture.
    quant: what of it is quantized; None for nothing.
    adapter: what is trained; None for full fine-tuning.
    batch: examples per optimizer step, on all devices together.
    seq_len: tokens per example.
    microbatches: as in `step.make_step`.
    learned: tokens per example that the loss is taken on; None: all.
    dtype: of products, activations and of what stays unquantized.
    remat, attention: as in `Decoder`.
    optimizer: any optax transformation; AdamW if None.
    paged: whether its state waits in the host's memory.
    data, fsdp, tensor: sizes of the mesh.
    backend: 'gpu' or 'cpu': chunks are longer on the former.
  """

  model: ModelConfig
  quant: QuantSpec | None = _QUANT
  adapter: AdapterSpec | None = _ADAPTER
  batch: int = 1
  seq_len: int = 512
  microbatches: int = 1
  learned: int | None = None
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  remat: Remat = 'block'
  attention: Form = 'auto'
  optimizer: optax.GradientTransformation | None = None
  paged: bool = False
  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  backend: str = 'gpu'

  @property
  def devices(self) -> int:
    return self.data * self.fsdp * self.tensor

  @property
  def rows(self) -> int:
    """Examples that one device has in memory at once."""
    parts = self.data * self.fsdp * self.microbatches
    return -(-self.batch // parts)

  @property
  def tokens(self) -> int:
    """Tokens that one device has in memory at once."""
    return self.rows * self.seq_len

  @property
  def head(self) -> str:
    """The path of what logits are made with."""
    return 'embed/embedding' if self.model.tied else 'lm_head/kernel'

  @property
  def width(self) -> int:
    """Bytes of one number of the compute dtype."""
    return jnp.dtype(self.dtype).itemsize

  def mesh(self) -> AbstractMesh:
    sizes = (self.data, self.fsdp, self.tensor)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Trees:
  """The trees of a job, as shapes.

  Attributes:
    base: frozen parameters; {} for full fine-tuning.
    trained: the adapter, or all parameters.
    state: the optimizer's.
    fixed: squared norms of the base.
  """

  base: Tree
  trained: Tree
  state: Any
  fixed: Tree


def trees(job: Job) -> Trees:
  """The real trees' shapes: initialized, quantized, adapted, under eval_shape.

  Raises:
    ValueError: as `quantize` and `init_adapter`.
  """
  optimizer = job.optimizer or _ADAMW
  return _trees(job.model, job.quant, job.adapter, job.dtype, optimizer)


_ADAMW = optim.make_optimizer(1e-4)


@functools.lru_cache(maxsize=16)
def _trees(
  model: ModelConfig,
  quant: QuantSpec | None,
  adapter: AdapterSpec | None,
  dtype: str,
  optimizer: optax.GradientTransformation,
) -> Trees:
  key = jax.random.key(0)

  def init() -> Tree:
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = Decoder(model).init(key, tokens)['params']
    # As they are loaded; full fine-tuning has float32 masters.
    own = jnp.float32 if adapter is None else dtype
    params = jax.tree.map(lambda a: a.astype(own), params)
    return params if quant is None else quantize(params, quant)

  base = jax.eval_shape(init)
  if adapter is None:
    base, trained = {}, base
  else:
    if adapter.init in TAKEN:  # It differs in values, not in shapes.
      adapter = dataclasses.replace(adapter, init='kaiming')
    trained = jax.eval_shape(
      lambda base: init_adapter(key, base, adapter), base
    )
  state = jax.eval_shape(optimizer.init, trained)
  return Trees(base, trained, state, jax.eval_shape(norms, base, trained))


def share(tree: Any, job: Job) -> dict[str, int]:
  """{path: bytes} of every array of a tree, on one device of the job's mesh."""
  placed = jax.tree_util.tree_leaves_with_path(shardings(tree, job.mesh()))
  leaves = jax.tree.leaves(tree)
  return {
    paths.of(path): math.prod(sharding.shard_shape(leaf.shape))
    * leaf.dtype.itemsize
    for (path, sharding), leaf in zip(placed, leaves, strict=True)
  }
