"""One step of training, jitted: gradients of a batch, and what they move."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qdora_jax import optim, scaling
from qdora_jax import paged as paging
from qdora_jax.adapter import Adapter
from qdora_jax.loss import summed_loss
from qdora_jax.model import Decoder
from qdora_jax.sharding import BATCH
from qdora_jax.transforms import adapted_norms, attach

Tree = dict[str, Any]


def make_step(
  model: Decoder,
  optimizer: optax.GradientTransformation,
  microbatches: int = 1,
  like: tuple[Tree, Any] | None = None,
  rate: optim.Scaled | None = None,
) -> Callable[..., tuple[Tree, Any, dict[str, jax.Array]]]:
  """The jitted step: (trained, opt_state, base, norms, batch, key) -> moved on.

  The loss is the mean over the learned tokens of the whole batch, however many
  microbatches and devices it is split over. If it or its gradient is not
  finite, nothing moves. `trained` and `opt_state` are donated. Two arguments
  may follow: a `scaling.LossScale`, and what it becomes is then among what is
  returned; and the peak of `rate`.

  Args:
    model: the decoder.
    optimizer: any optax transformation.
    microbatches: gradients are accumulated over so many slices of the batch;
      DoRA's detached norms are then computed once for all of them.
    like: (trained, opt_state) on a mesh, or with state in the host's memory: so
      they leave the step, too. (Left to itself XLA lays gradients out
      differently from what they are of.) State in the host's memory is streamed
      through the update, see paged.py.
    rate: the optimizer's learning rate, if its peak is to be an argument.
  """
  rate = rate or optim.Scaled(optax.constant_schedule(1.0), 1.0)
  optimizer = optax.with_extra_args_support(optimizer)
  placed = jax.tree.map(lambda a: a.sharding, like)
  shards = None if like is None else jax.tree.leaves(placed)
  mesh = None if like is None else _mesh_of(jax.tree.leaves(placed)[0])
  if mesh is not None:
    model = model.clone(mesh=mesh)

  def step(trained, opt_state, base, norms, batch, key, scale=None, peak=None):
    total = jnp.maximum(jnp.sum(batch['weights']), 1)
    if scale is not None:
      total /= scale.value
    if microbatches > 1 and _detached(trained):
      norms = adapted_norms(base, trained, norms)

    def gradient(part, key):
      def objective(trained):
        params = attach(base, trained, norms=norms, dropout_key=key)
        return summed_loss(model, params, part) / total

      return jax.value_and_grad(objective)(trained)

    def accumulate(sums, part_and_key):
      return jax.tree.map(jnp.add, sums, gradient(*part_and_key)), None

    if microbatches == 1:
      value, grads = gradient(batch, key)
    else:
      parts = jax.tree.map(lambda a: _slices(a, microbatches, mesh), batch)
      zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
      keys = jax.random.split(key, microbatches)
      (value, grads), _ = jax.lax.scan(accumulate, zero, (parts, keys))
    if scale is not None:
      value, grads = jax.tree.map(lambda a: a / scale.value, (value, grads))
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    with rate.given(peak):
      trained, opt_state = paging.move(
        optimizer, trained, grads, opt_state, finite, value, shards
      )
    seen = {'loss': value, 'grad_norm': grad_norm, 'finite': finite}
    if scale is not None:
      seen |= {'loss_scale': scale.value, 'scale': scaling.after(scale, finite)}
    return trained, opt_state, seen

  if like is None:
    return jax.jit(step, donate_argnums=(0, 1))
  return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*placed, None))


def _mesh_of(sharding: jax.sharding.Sharding) -> jax.sharding.Mesh | None:
  named = isinstance(sharding, jax.sharding.NamedSharding)
  return sharding.mesh if named else None


def _slices(
  array: jax.Array, count: int, mesh: jax.sharding.Mesh | None
) -> jax.Array:
  """[B, ...] as [count, B/count, ...]: every device slices what it has."""
  slices = array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)
  if mesh is None:
    return slices
  spec = jax.sharding.PartitionSpec(None, *BATCH)
  return jax.lax.with_sharding_constraint(
    slices, jax.sharding.NamedSharding(mesh, spec)
  )


def _detached(trained: Tree) -> bool:
  """Whether every norm in the tree is a constant of differentiation."""
  nodes = jax.tree.leaves(trained, is_leaf=lambda x: isinstance(x, Adapter))
  return all(n.spec.detach for n in nodes if isinstance(n, Adapter))
