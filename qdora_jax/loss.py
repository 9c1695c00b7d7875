"""The loss: cross-entropy of learned tokens, logits a chunk at a time.

Logits are the largest array of a step: 1,024 tokens of a vocabulary of 128,256
are 525 MB in float32, and so is their gradient. Here they exist for a chunk of
tokens at once, and not for the backward pass at all: while a chunk's logits are
there, the gradient of its hidden states,

  d loss / d hidden = ((softmax(logits) - onehot(label)) * weight) through head

is made, too, and kept in their place: D numbers a token for V. (Recomputing
the logits in the backward pass instead, as rematerialization would, costs the
head's product once more.) What of the head is trained gets its gradient summed
over the chunks; what is frozen gets none. Where the model knows its mesh, each
device sums up what its own rows give, and the devices' sums meet once, after
the last chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import SymbolicZero

from qdora_jax.data import Batch
from qdora_jax.model import Decoder
from qdora_jax.sharding import by_batch, by_rows, row_parts

Tree = dict[str, Any]


def summed_loss(
  model: Decoder, params: Tree, batch: Batch, chunk: int | None = None
) -> jax.Array:
  """Cross-entropy of a batch's learned tokens, summed, in nats.

  Logits are made where a learned token is predicted and nowhere else.

  Args:
    model: the decoder.
    params: its tree, as `attach` gives it.
    batch: see `data`.
    chunk: tokens whose logits exist at once, over all devices; one of every row
      at least. None: what the devices here are best at, each of the model's
      mesh for itself.
  """
  parts = row_parts(len(batch['labels']), model.mesh)
  chunk = chunk or parts * best_chunk(jax.default_backend())
  head = {k: params[k] for k in ('embed', 'lm_head') if k in params}
  if not model.config.tied:
    del head['embed']
  return _in_chunks(model, head, *in_chunks(model, params, batch, chunk))


def in_chunks(
  model: Decoder, params: Tree, batch: Batch, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What logits are made of: `chunk` tokens in each of N parts.

  Returns:
    (hidden [N, B, C / N, D], labels [N, B, C / N], weights [N, B, C / N]): the
    learned tokens.
  """
  hidden, _ = model.apply(
    {'params': params},
    batch['tokens'],
    batch['positions'],
    batch['segments'],
    method='hidden',
  )
  hidden = jnp.take_along_axis(hidden, batch['loss_at'][..., None], axis=1)
  rows, learned = batch['labels'].shape
  count = chunk_count(rows, learned, chunk)
  parts = (hidden, batch['labels'], batch['weights'])
  return jax.tree.map(lambda a: _chunks(a, count), parts)


def chunk_count(rows: int, learned: int, chunk: int) -> int:
  """Parts of `learned` tokens of each row, of at most `chunk` tokens together.

  But for a token of each row, which is the least.
  """
  return -(-learned // max(1, chunk // rows))


def best_chunk(backend: str) -> int:
  """Tokens whose logits should exist at once on a 'cpu' or another device.

  A GPU's product with the head is efficient from a thousand. A CPU's is from
  far fewer, and logits that are few stay in its cache: of 128 to 1,024 the best
  were 192 to 512, see experiments/LOG.md.
  """
  return 192 if backend == 'cpu' else 1024


def _chunks(array_BxC: jax.Array, count: int) -> jax.Array:
  """[B, C, ...] as [count, B, ceil(C / count), ...], filled up with zeros."""
  rows, learned, *rest = array_BxC.shape
  each = -(-learned // max(1, count))
  fill = [(0, 0)] * array_BxC.ndim
  fill[1] = (0, count * each - learned)
  parts = jnp.pad(array_BxC, fill).reshape(rows, count, each, *rest)
  return parts.swapaxes(0, 1)


def _numbered(drops: bool, *chunks: jax.Array) -> tuple[Any, ...]:
  """Chunks with their numbers, if dropout in the head asks for them."""
  return jnp.arange(len(chunks[0])) if drops else None, *chunks


def _is_key(leaf: jax.Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _chunk_loss(model, head, number, hidden_BxCxD, labels_BxC, weights_BxC):
  # Each chunk is dropped out by a mask of its own.
  head = jax.tree.map(
    lambda leaf: jax.random.fold_in(leaf, number) if _is_key(leaf) else leaf,
    head,
  )
  # Split by rows, and so is its gradient: else XLA gathers that of the logits.
  hidden_BxCxD = by_batch(hidden_BxCxD, model.mesh)
  logits = model.apply({'params': head}, hidden_BxCxD, method='unembed')
  each = optax.softmax_cross_entropy_with_integer_labels(logits, labels_BxC)
  return jnp.sum(each * weights_BxC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(model, head, hidden_NxBxCxD, labels_NxBxC, weights_NxBxC):
  """The sum over N chunks of their losses."""

  def add(sum_, chunk):
    return sum_ + _chunk_loss(model, head, *chunk), None

  drops = any(map(_is_key, jax.tree.leaves(head)))
  chunks = _numbered(drops, hidden_NxBxCxD, labels_NxBxC, weights_NxBxC)
  return jax.lax.scan(add, jnp.float32(0), chunks)[0]


def _in_chunks_forward(model, head, hidden, labels, weights):
  leaves, tree = jax.tree.flatten(head)
  values = [leaf.value for leaf in leaves]
  # Packed codes and a frozen head have no gradient to be made.
  moving = {n: v.value for n, v in enumerate(leaves) if v.perturbed}
  fixed = {n: v for n, v in enumerate(values) if n not in moving}
  # Of a key every device would draw the same mask for its rows.
  drops = any(map(_is_key, values))
  apart = row_parts(hidden.value.shape[1], model.mesh) > 1 and not drops
  reader = model.clone(mesh=None) if apart else model

  def loss(moving, fixed, *chunk):
    mixed = moving | fixed
    head = tree.unflatten([mixed[n] for n in range(len(leaves))])
    return _chunk_loss(reader, head, *chunk)

  gradient = jax.value_and_grad(loss, (0, 3))

  def summed(given, chunks):
    zero, moving, fixed = given

    def add(sums, chunk):
      value, (d_head, d_hidden) = gradient(moving, fixed, *chunk)
      return jax.tree.map(jnp.add, sums, (value, d_head)), d_hidden

    return jax.lax.scan(add, zero, chunks)

  if apart:
    summed = by_rows(summed, model.mesh)
  # Sums of many chunks, and of devices, are float32.
  zeros = {n: jnp.zeros(v.shape, jnp.float32) for n, v in moving.items()}
  zero = jnp.float32(0), zeros
  chunks = _numbered(drops, hidden.value, labels.value, weights.value)
  (value, sums), d_hidden = summed((zero, moving, fixed), chunks)
  d_head = {n: sums[n].astype(v.dtype) for n, v in moving.items()}
  d_head = [d_head[n] if n in moving else None for n in range(len(leaves))]
  return value, (tree.unflatten(d_head), d_hidden)


def _in_chunks_backward(model, residuals, cotangent):
  if isinstance(cotangent, SymbolicZero):
    return None, None, None, None
  scaled = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), residuals)
  return (*scaled, None, None)


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward, symbolic_zeros=True)
