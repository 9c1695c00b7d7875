"""Attention in chunks against torch's, and long texts against transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

import torch
from golden import families, ours, strangers, weights
from torch.nn.functional import scaled_dot_product_attention

from qdora_jax import load_pretrained
from qdora_jax.attention import attention, best
from qdora_jax.sight import look

LENGTH = 600


@pytest.mark.parametrize('window', [None, 150])
def test_packed_rows_are_torchs(window):
  """Values and gradients in float32, against torch's in float64."""
  draw = np.random.RandomState(0)
  q, k, v, dy = (
    draw.standard_normal((2, LENGTH, heads, 16)).astype(np.float32)
    for heads in (6, 2, 2, 6)
  )
  lengths = (130, 7, 301, 162)
  places = np.tile(np.concatenate([np.arange(n) for n in lengths]), (2, 1))
  segments = np.tile(np.repeat(np.arange(1, 5), lengths), (2, 1))
  assert best(LENGTH, LENGTH, 'cpu') == 'flash'

  @jax.jit
  def run(q, k, v, dy):
    seen = look(*map(jnp.asarray, (places, places, segments, segments)), window)
    y, pull = jax.vjp(functools.partial(attention, sight=seen), q, k, v)
    return y, *pull(dy)

  got = run(q, k, v, dy)
  order = np.arange(LENGTH)
  mask = order[:, None] >= order[None]
  mask &= order[:, None] - order[None] < (window or LENGTH)
  mask = mask[None] & (segments[:, :, None] == segments[:, None])

  def theirs(dtype):
    inputs = [
      torch.tensor(a.swapaxes(1, 2), dtype=dtype, requires_grad=True)
      for a in (q, k, v)
    ]
    y = scaled_dot_product_attention(
      *inputs, attn_mask=torch.tensor(mask)[:, None], enable_gqa=True
    )
    y.backward(torch.tensor(dy.swapaxes(1, 2), dtype=dtype))
    results = [y.detach(), *(a.grad for a in inputs)]
    return [a.numpy().swapaxes(1, 2) for a in results]

  exact = theirs(torch.float64)
  for a, b in zip(got, exact, strict=True):
    assert ours.relative(np.asarray(a), b) <= 1e-6


@pytest.mark.parametrize('family', ['gemma2', 'qwen3'])
def test_logits_of_long_texts(tmp_path, family):
  """Of three chunks; Gemma 2 has soft caps, and windows in half its layers."""
  folder = weights.write_hf(tmp_path, *families.make(family))
  tokens = weights.batches(7, families.VOCAB, 1, 2, 300)[0]
  model, params, _ = load_pretrained(folder, remat='none')
  got = ours.logits(model, params, tokens)
  theirs = strangers.logits(strangers.load(folder), tokens)
  assert ours.relative(got, theirs) <= 1e-5
