"""Our side of what the strangers are asked about whole models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from golden import weights
from qdora_jax import AdapterSpec, attach, init_adapter, norms


def logits(model: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
  """Logits float32 [B, L, V]."""
  return np.asarray(jax.jit(model.apply)({'params': params}, tokens))


def kernel(tree: Any, linear: str) -> Any:
  """The leaf of the stacked linear 'attn/q'."""
  room, name = linear.split('/')
  return tree['layers'][room][name]['kernel']


def with_kernel(tree: Any, linear: str, leaf: Any) -> Any:
  """A copy of the tree with that linear's leaf replaced."""
  room, name = linear.split('/')
  layers = tree['layers']
  node = {**layers[room][name], 'kernel': leaf}
  return {**tree, 'layers': {**layers, room: {**layers[room], name: node}}}


def adapter(base: Any, method: str, rank: int, alpha: float, seed: int = 0):
  """A fresh adapter of all seven linears with the agreed A."""
  spec = AdapterSpec(method=method, rank=rank, alpha=alpha)
  tree = init_adapter(jax.random.key(0), base, spec)
  for linear in weights.LINEARS:
    node = kernel(tree, linear)
    count, i, r = node.lora_a.shape
    a_NxIxR = np.stack(
      [
        weights.initial_a(weights.hf_module(n, linear), (i, r), seed)
        for n in range(count)
      ]
    )
    node = node.replace(lora_a=jnp.asarray(a_NxIxR))
    tree = with_kernel(tree, linear, node)
  return tree


def curve(
  model: Any,
  base: Any,
  method: str,
  tokens: np.ndarray,
  *,
  rank: int,
  alpha: float,
  lr: float,
) -> np.ndarray:
  """The losses of AdamW training, as `strangers.curve` reports them."""
  trained = adapter(base, method.removeprefix('q'), rank, alpha)
  return losses_of(model, base, trained, tokens, lr)


def losses_of(
  model: Any, base: Any, trained: Any, tokens: np.ndarray, lr: float
) -> np.ndarray:
  """The losses of AdamW training that begins from an adapter."""
  optimizer = optax.adamw(lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
  squared = norms(base, trained)

  def loss(trained, base, squared, batch):
    params = attach(base, trained, norms=squared)
    out = model.apply({'params': params}, batch)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(
      out, batch[:, 1:]
    ).mean()

  @jax.jit
  def step(trained, state, base, squared, batch):
    value, grads = jax.value_and_grad(loss)(trained, base, squared, batch)
    updates, state = optimizer.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, value

  state = optimizer.init(trained)
  losses = []
  for batch in tokens:
    trained, state, value = step(trained, state, base, squared, batch)
    losses.append(float(value))
  return np.float64(losses)


def relative(got: np.ndarray, golden: np.ndarray) -> float:
  """max |difference| / max |golden|."""
  return float(np.abs(got - golden).max() / np.abs(golden).max())


def apart(got: np.ndarray, golden: np.ndarray) -> float:
  """The largest relative difference of two curves, step by step."""
  return float(np.abs(got / golden - 1).max())
