"""What a training step holds in memory, from shapes alone.

Nothing is measured and nothing is asked of the compiler. What outlives a step's
phases - base, adapter, optimizer state, gradients - is `eval_shape` of the real
trees, laid out by the real sharding rules, and so exact. What the forward pass
leaves for the backward pass is exact, too: JAX's own trace of the model's
derivative says which arrays these are, for every remat policy. Two kinds are
formulas, written down from XLA's buffer assignments (CPU, JAX 0.10):

  workspace   what one layer's backward pass has at its worst moment
  logits      a chunk of tokens' logits and their gradient

Both take turns, and the larger of the two counts.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from qdora_jax import joined, loss, paths, sight
from qdora_jax.adapter import Adapter
from qdora_jax.attention import best
from qdora_jax.job import Job, Tree, share, trees
from qdora_jax.model import Decoder, init_cache
from qdora_jax.transforms import adapted_norms, attach

FLOAT = 4  # Bytes of a float32.


def static(job: Job) -> dict[str, int]:
  """Bytes on one device, by kind, of what a step is given and gives back.

  Gradients are of the trained tree. Their sum over microbatches lies where the
  update's copies (see `workspace`) will, and counts where there are none.
  """
  made = trees(job)
  base, trained = share(made.base, job), share(made.trained, job)
  kinds = dict.fromkeys(('base codes', 'absmax', 'full precision'), 0)
  for path, size in base.items():
    part = path.rpartition('/')[2]
    scales = part in ('absmax', 'nested', 'offset')
    name = 'absmax' if scales else 'full precision'
    kinds['base codes' if part == 'codes' else name] += size
  whole = sum(trained.values())
  rows = job.rows * job.microbatches
  # Tokens, positions, segments; loss_at, labels, weights: four bytes each.
  batch = rows * (3 * job.seq_len + 3 * (job.learned or job.seq_len)) * 4
  return kinds | {
    'adapter' if made.base else 'parameters': whole,
    'norms and batch': sum(share(made.fixed, job).values()) + batch,
    'gradients': whole * (2 if job.microbatches > 1 and job.paged else 1),
    'optimizer': sum(share(made.state, job).values()),
  }


def activations(job: Job) -> tuple[int, int]:
  """Bytes that the forward pass leaves on a device, and in the host's memory.

  They are the residuals of the model's derivative that are none of its inputs.
  Over `tensor`, a device's part of a model is a model of fewer heads and
  features (Megatron, arXiv 1909.08053).
  """
  model, parts = job.model, min(job.microbatches, 2)
  if job.tensor > 1:
    ways = job.tensor
    heads = -(-model.heads // ways)
    kv = model.kv_heads // (1 if model.kv_heads % ways else ways)
    model = dataclasses.replace(
      model, heads=heads, kv_heads=math.gcd(kv, heads), ff=-(-model.ff // ways)
    )
  # One device's job, as little of it as the answer depends on.
  own = {'data': 1, 'fsdp': 1, 'tensor': 1, 'optimizer': None, 'paged': False}
  own |= {'model': model, 'microbatches': parts, 'batch': parts * job.rows}
  return _kept(dataclasses.replace(job, learned=None, **own))


@functools.lru_cache(maxsize=64)
def _kept(job: Job) -> tuple[int, int]:
  """`activations` of a job on one device."""
  made = trees(job)
  form = 'flash' if in_chunks(job) else 'plain'
  model = Decoder(job.model, jnp.dtype(job.dtype), job.remat, attention=form)
  dropout = job.adapter is not None and job.adapter.dropout > 0

  def forward(trained, base, fixed, tokens):
    known = fixed
    if job.microbatches > 1 and job.adapter is not None and job.adapter.detach:
      known = adapted_norms(base, trained, fixed)
    key = jax.random.key(0) if dropout else None

    def hidden(trained: Tree) -> jax.Array:
      params = attach(base, trained, norms=known, dropout_key=key)
      three = (tokens, tokens, tokens)
      return model.apply({'params': params}, *three, method='hidden')[0]

    return jax.vjp(hidden, trained)[1]

  tokens = jax.ShapeDtypeStruct((job.rows, job.seq_len), jnp.int32)
  args = (made.trained, made.base, made.fixed, tokens)
  with joined.on(job.backend):
    traced = jax.make_jaxpr(forward)(*args)
  inputs = {*traced.jaxpr.invars, *traced.jaxpr.constvars}
  kept = {
    v: v.aval
    for v in traced.jaxpr.outvars
    if not hasattr(v, 'val') and v not in inputs  # Literals are no arrays.
  }
  device = host = 0
  for aval in kept.values():
    size = aval.size * aval.dtype.itemsize
    on_host = aval.memory_space == jax.memory.Space.Host
    device, host = device + size * (not on_host), host + size * on_host
  return device, host


# Arrays [tokens, F] alive while a feed-forward's backward pass runs, beside
# what the forward pass kept (read off XLA's buffers), by remat: (in float32, in
# the compute dtype). Adapted kernels' products come in float32.
_WIDE = {
  'full': {'block': (0, 4), 'dots': (0, 3), 'none': (0, 3)},
  'lora': {'block': (2, 6), 'dots': (0, 3), 'none': (0, 3)},
  'dora': {'block': (2, 5), 'dots': (0, 5), 'none': (0, 6)},
  'dora with dropout': {'block': (4, 8), 'dots': (0, 5), 'none': (0, 6)},
}
# The same where a base and its adapter are one product (joined.py):
# arrays in the compute dtype, so that plans are within 10% of an H100's peaks.
_NARROW_WIDE = {
  'lora': {'block': 3, 'dots': 1, 'none': 2},
  'dora': {'block': 4, 'dots': 3, 'none': 4},
}
# Arrays [H, L, L] of float32: what the backward pass of attention makes of the
# scores, and how many of them wait for it while the feed-forward's runs.
_SCORES, _WAITING = 4, 3
# Arrays [tokens, H Dh] of float32 that attention in chunks has instead: queries
# in chunks, and the sums that become their gradients.
_CHUNKED = 2
# Bytes for each number that a layer's dropout leaves out or not: random bits,
# masks, what is left, its gradient; DoRA has a second product with it. With
# 'none' they are activations.
_DROPPED = {
  'lora': {'block': 12, 'dots': 15, 'none': 0},
  'dora': {'block': 14, 'dots': 18, 'none': 0},
}
# Arrays [tokens, D]: norms' outputs, queries, residual sums, their gradients.
_NARROW = 9


def workspace(job: Job) -> int:
  """Bytes of one layer's backward pass, of the weights it dequantizes, and of
  what the update copies.

  remat 'dots' kept two of the feed-forward's products, 'none' these, silu's
  parts and attention's probabilities: they are activations then. The copies are
  as large as the trained tree: XLA copies the moments before it writes them in
  place, because the parameters' update reads them, too, and half of the copies
  lie where other things were. A paged state is streamed instead, an array of
  the tree at a time: two moments at most. On a mesh gradients are there twice
  where devices' sums meet: the kernels' of one layer, the head's at the end.
  """
  c, ways = job.model, job.tensor
  adapted = job.adapter is not None
  dora = adapted and job.adapter.has_magnitude
  method = 'dora' if dora else 'lora' if adapted else 'full'
  remat = 'block' if job.remat == 'offload' else job.remat
  dropped = adapted and job.adapter.dropout
  kind = 'dora with dropout' if dora and dropped else method
  f32, narrow = _WIDE[kind][remat]
  together = adapted and job.width == 2 and job.backend != 'cpu'
  if together and not (dora and dropped):
    f32, narrow = 0, _NARROW_WIDE[method][remat]
  stored = job.remat == 'none'
  # With 'dots' and no adapter nothing of attention is asked for before its own
  # turn: its product with o is there.
  waiting = _WAITING - stored if adapted or job.remat != 'dots' else 0
  wide = job.tokens * -(-c.ff // ways) * (f32 * FLOAT + narrow * job.width)
  scores = attention_scores(job)
  rest = job.tokens * c.width * _NARROW * job.width
  if in_chunks(job):
    heads = -(-c.heads // ways)
    rest += job.tokens * heads * c.head_dim * _CHUNKED * FLOAT
  # Gate and up, multiplied with at about the same time; and their gradients,
  # before each device has its own part.
  kernel = c.width * -(-c.ff // ways)
  dense = 2 * kernel * job.width
  if not adapted and job.fsdp > 1:
    dense += 2 * kernel * FLOAT
  unfactored = 0
  if dora and not job.adapter.factored and job.microbatches == 1:
    # W and V = W + s A B in float32, and V's square.
    unfactored = 3 * kernel * FLOAT
  feed_forward = wide + waiting * scores + dense + unfactored
  if dropped:
    rest += job.tokens * _inputs(job) * _DROPPED[method][remat]
  trained = share(trees(job).trained, job).values()
  copies = 2 * max(trained) if job.paged else sum(trained)
  turns = rest + max(feed_forward, (_SCORES - stored) * scores)
  return copies + max(turns, _met(job))


def _met(job: Job) -> int:
  """Bytes of a trained head's gradients as they come from other devices.

  Two of a tied embedding: as the head, and of the rows that were looked up. Of
  another head the sum of many chunks is beside it.
  """
  if job.data * job.fsdp == 1:
    return 0
  own = share(trees(job).trained, job).get(job.head, 0)
  return own * (2 if job.model.tied or _chunks(job) > 1 else 1)


def _chunks(job: Job) -> int:
  """Parts of the loss's tokens."""
  most = loss.best_chunk(job.backend)
  return loss.chunk_count(job.rows, job.learned or job.seq_len, most)


def _inputs(job: Job) -> int:
  """In-features of a layer's adapted kernels, together."""
  trained = paths.flatten(trees(job).trained).values()
  adapters = [a for a in trained if isinstance(a, Adapter)]
  return sum(a.lora_a.shape[-2] for a in adapters if a.lora_a is not None)


def attention_scores(job: Job) -> int:
  """Bytes of what of one layer's float32 scores is there at once, on a device.

  [B, H, L, L] in the plain form, [B, H, chunk, chunk] in chunks. (What cuDNN
  does without is not taken off.)
  """
  heads = -(-job.model.heads // job.tensor)
  side = (
    min(sight.best_chunk(job.backend), job.seq_len)
    if in_chunks(job)
    else job.seq_len
  )
  return job.rows * heads * side**2 * FLOAT


def in_chunks(job: Job) -> bool:
  """Whether attention makes its scores a chunk at a time."""
  if job.attention == 'auto':
    return best(job.seq_len, job.seq_len, job.backend) == 'flash'
  return job.attention == 'flash'


def logits(job: Job) -> int:
  """Bytes of a chunk's logits and of their gradient, float32.

  Or of one of them and a chunk's part of a trained head's gradient, beside the
  sum of such parts. On a mesh the head is brought together over `fsdp`, as it
  is stored, and that sum is of the whole head until devices' sums meet.
  """
  c = job.model
  count, vocab = _chunks(job), -(-c.vocab // job.tensor)
  one = job.rows * -(-(job.learned or job.seq_len) // count) * vocab * FLOAT
  numbers = vocab * c.width
  own = share(trees(job).trained, job).get(job.head, 0)
  head = numbers * (FLOAT if own else job.width) if job.fsdp > 1 else 0
  if not own or job.data * job.fsdp == 1:
    return one + max(one, own if count > 1 else 0) + head
  chunk = one + max(one, numbers * FLOAT) + head
  # A sum beside the part, and a device's own part, copied to be gathered.
  chunk += numbers * FLOAT if count > 1 else 0
  return chunk + (own if job.fsdp > 1 else 0)


def serving(job: Job) -> dict[str, int]:
  """Bytes of answering instead of training, on one device, by kind.

  The base, the adapter in the compute dtype and a KV cache of job.batch rows of
  job.seq_len tokens.
  """
  cache = jax.eval_shape(
    lambda: init_cache(job.model, job.batch, job.seq_len, job.dtype)
  )
  kept = static(job)
  names = ('base codes', 'absmax', 'full precision')
  trained = kept['adapter' if 'adapter' in kept else 'parameters']
  return {name: kept[name] for name in names} | {
    'adapter': trained * job.width // FLOAT,
    'kv cache': sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)),
  }
