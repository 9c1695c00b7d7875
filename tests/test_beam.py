"""Beam search beside what it is when it can be done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_generate import PROMPTS, prompts
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  freeze,
  init_adapter,
  quantize,
  sharding,
)
from qdora_jax.beam import beam_search
from qdora_jax.generate import generate
from qdora_jax.serving import attach_several

COUNT = 6


@pytest.mark.parametrize(
  'name',
  [
    pytest.param('different lengths', marks=pytest.mark.slow),
    'a shared beginning',
  ],
)
def test_one_beam_is_greedy(name):
  batch = PROMPTS[name]
  model, params, _ = tiny.loaded(tied=False)
  stop = [generate(model, params, batch, COUNT)[0][3]]
  got = beam_search(model, params, batch, COUNT, beams=1, stop=stop)
  assert got == generate(model, params, batch, COUNT, stop=stop)


@pytest.mark.slow
@pytest.mark.parametrize('stops', [0, 1, 2])
@pytest.mark.parametrize('length_penalty', [0.0, 1.0, 2.0])
def test_as_many_beams_as_words_find_the_likeliest_pair(stops, length_penalty):
  """Of all first tokens, and all second ones after each."""
  model, params, _ = tiny.loaded(tied=False)
  words = model.config.vocab
  (prompt,) = prompts(7, 5)
  rows = [[*prompt, word] for word in range(words)]
  logits = model.apply({'params': params}, jnp.asarray(rows, jnp.int32))
  log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
  first, second = log_p[0, -2], log_p[:, -1]
  # So likely that each ends some continuation.
  stop = np.argsort(-first)[:stops].tolist()
  found = {}
  for one in range(words):
    if one in stop:
      found[one,] = first[one]
      continue
    for two in range(words):
      found[one, two] = (first[one] + second[one, two]) / 2**length_penalty
  best = [word for word in max(found, key=found.get) if word not in stop]
  got = beam_search(
    model,
    params,
    [prompt],
    2,
    beams=words,
    stop=stop,
    length_penalty=length_penalty,
  )
  assert got == [best]


@pytest.mark.slow
def test_a_row_says_in_a_batch_what_it_says_alone():
  """Padded on the left, on four bits with an adapter."""
  model, params, _ = tiny.loaded(tied=False)
  base = quantize(params, QuantSpec())
  adapter = init_adapter(jax.random.key(0), base, AdapterSpec('dora', rank=4))
  params = freeze(base, tiny.perturbed(adapter))
  batch = PROMPTS['different lengths']
  options = {'beams': 3, 'stop': [generate(model, params, batch, 4)[2][1]]}
  got = beam_search(model, params, batch, COUNT, **options)
  for prompt, said in zip(batch, got, strict=True):
    assert beam_search(model, params, [prompt], COUNT, **options) == [said]
  assert len(set(map(len, got))) > 1
  assert got != generate(model, params, batch, COUNT, stop=options['stop'])


@pytest.mark.slow
def test_one_new_token_and_sixteen_bits():
  """Of one token the likeliest is greedy's; bfloat16 is no other search."""
  model, params, _ = tiny.loaded(tied=False)
  batch = PROMPTS['different lengths']
  got = beam_search(model, params, batch, 1, beams=3)
  assert got == generate(model, params, batch, 1)
  half = model.clone(dtype=jnp.bfloat16)
  got = beam_search(half, params, batch, COUNT, beams=1)
  assert got == generate(half, params, batch, COUNT)


@pytest.mark.slow
def test_weights_on_a_mesh():
  model, params, _ = tiny.loaded(tied=False)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  placed = sharding.shard(params, mesh)
  batch = PROMPTS['a shared beginning']
  options = {'beams': 3, 'stop': [generate(model, params, batch, 4)[0][2]]}
  own = model.clone(mesh=mesh)
  got = beam_search(own, placed, batch, COUNT, **options)
  assert got == beam_search(model, params, batch, COUNT, **options)


def test_bad_input():
  model, params, _ = tiny.loaded(tied=False)
  for beams in (0, 257):
    with pytest.raises(ValueError, match=rf'beams={beams}: expected 1 to 256'):
      beam_search(model, params, [[5]], 2, beams=beams)
  with pytest.raises(ValueError, match='max_new_tokens=0: expected at least 1'):
    beam_search(model, params, [[5]], 0, beams=2)
  adapter = init_adapter(jax.random.key(0), params, AdapterSpec(rank=2))
  several = attach_several(params, [adapter, adapter], [0, 1])
  with pytest.raises(ValueError, match='one adapter for all rows'):
    beam_search(model, several, [[5], [6]], 2, beams=2)
