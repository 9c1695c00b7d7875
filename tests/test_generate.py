"""Generation is the naive loop over full forward passes, only faster."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  freeze,
  init_adapter,
  quantize,
  specs,
)
from qdora_jax.generate import generate
from qdora_jax.model import init_cache

COUNT = 6


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids):
  return model.apply({'params': params}, ids)


def naive(model, params, prompt, count=COUNT):
  """The likeliest next token, over and over, nothing remembered."""
  ids = list(prompt)
  for _ in range(count):
    # Room behind, so that one shape is compiled; nothing looks ahead.
    row = jnp.asarray([ids + [0] * (32 - len(ids))], jnp.int32)
    ids.append(int(jnp.argmax(_logits(model, params, row)[0, len(ids) - 1])))
  return ids[len(prompt) :]


def prompts(seed, *lengths):
  draw = np.random.RandomState(seed)
  return [draw.randint(3, 256, n).tolist() for n in lengths]


PROMPTS = {
  'one': prompts(0, 9),
  'of one token': prompts(1, 1),
  'different lengths': prompts(2, 3, 12, 8),
  'a shared beginning': [prompts(3, 5)[0] + p for p in prompts(4, 4, 1, 9)],
  'the same twice': prompts(5, 6) * 2,
  'one begins the other': [prompts(6, 8)[0], prompts(6, 8)[0][:5]],
}


@pytest.mark.parametrize('batch', PROMPTS.values(), ids=PROMPTS)
def test_greedy_is_the_naive_loop(batch):
  model, params, _ = tiny.loaded(tied=False)
  got = generate(model, params, batch, COUNT)
  assert got == [naive(model, params, p) for p in batch]


@pytest.mark.slow
def test_greedy_on_four_bits_is_the_naive_loop():
  """A frozen QDoRA; left-padded prompts say what each says alone."""
  model, params, _ = tiny.loaded(tied=False)
  base = quantize(params, QuantSpec())
  adapter = init_adapter(jax.random.key(0), base, AdapterSpec('dora', rank=4))
  frozen = freeze(base, tiny.perturbed(adapter))
  batch = PROMPTS['different lengths']
  got = generate(model, frozen, batch, COUNT)
  assert got == [naive(model, frozen, p) for p in batch]
  assert got != generate(model, params, batch, COUNT)


def test_the_model_does_not_say_one_thing_only():
  """Else the tests here would compare nothing."""
  model, params, _ = tiny.loaded(tied=False)
  said = [naive(model, params, p) for p in PROMPTS['different lengths']]
  assert len(set(map(tuple, said))) == 3
  assert max(len(set(ids)) for ids in said) > 3


def test_a_stop_token_ends_its_row_alone():
  model, params, _ = tiny.loaded(tied=False)
  batch = PROMPTS['different lengths']
  said = [naive(model, params, p) for p in batch]
  stop = said[1][2]

  def cut(ids, stops):
    ends = [n for n, t in enumerate(ids) if t in stops]
    return ids[: ends[0]] if ends else ids

  got = generate(model, params, batch, COUNT, stop=[stop])
  assert got == [cut(ids, [stop]) for ids in said]
  assert len(got[1]) < COUNT
  assert max(map(len, got)) == COUNT
  # All rows stop before the last token; one of them at once.
  stops = [said[0][0], said[1][2], said[2][1]]
  got = generate(model, params, batch, COUNT, stop=stops)
  assert got == [cut(ids, stops) for ids in said]
  assert got[0] == []


def test_heat_is_reproducible_and_needs_a_key():
  model, params, _ = tiny.loaded(tied=False)
  batch = PROMPTS['different lengths']

  def draw(seed, temperature):
    key = jax.random.key(seed)
    return generate(
      model, params, batch, COUNT, temperature=temperature, key=key
    )

  assert draw(0, 1.0) == draw(0, 1.0)
  assert draw(0, 1.0) != draw(1, 1.0)
  assert draw(0, 1e-4) == [naive(model, params, p) for p in batch]
  assert draw(0, 0.0) == draw(1, 0.0)
  with pytest.raises(ValueError, match=r'temperature=0\.5 needs a PRNG key'):
    generate(model, params, batch, COUNT, temperature=0.5)


def test_tokens_are_drawn_as_likely_as_the_model_says():
  """The first of 512 rows of one prompt, against its softmax."""
  model, params, _ = tiny.loaded(tied=False)
  (prompt,) = PROMPTS['one']
  key = jax.random.key(2)
  drawn = generate(model, params, [prompt] * 512, 1, temperature=2.0, key=key)
  counts = np.bincount(np.ravel(drawn), minlength=256)
  row = jnp.asarray([prompt + [0] * (32 - len(prompt))], jnp.int32)
  logits = np.asarray(_logits(model, params, row)[0, len(prompt) - 1])
  share = np.exp(logits / 2.0 - np.max(logits / 2.0))
  share /= share.sum()
  # Each count is within six standard deviations, and they are not all alike.
  spread = np.sqrt(512 * share * (1 - share))
  assert (np.abs(counts - 512 * share) <= 6 * spread + 1).all()
  assert counts[share > 1 / 256].sum() > 1.2 * counts[share <= 1 / 256].sum()


@pytest.mark.parametrize('batch', [[], [[]], [[1], []]])
def test_nothing_to_continue_is_an_error(batch):
  with pytest.raises(ValueError, match='at least one token each'):
    generate(*tiny.loaded(tied=False)[:2], batch, COUNT)


def test_no_new_tokens_is_an_error_that_says_so():
  with pytest.raises(ValueError, match='max_new_tokens=0'):
    generate(*tiny.loaded(tied=False)[:2], [[3, 4]], 0)


def test_frozen_dora_decodes_at_loras_price():
  """By the work of one token's program; as attached, norms cost several."""
  model, base, _ = tiny.loaded(tied=False)
  base = quantize(base, specs.QuantSpec(block_size=32))
  cache = init_cache(model.config, 1, 16)

  @jax.jit
  def step(params, token, cache):
    return model.apply({'params': params}, token, cache=cache)

  def work(method, together):
    spec = AdapterSpec(method, rank=4)
    params = together(base, init_adapter(jax.random.key(0), base, spec))
    lowered = step.lower(params, jnp.zeros((1, 1), jnp.int32), cache)
    return lowered.cost_analysis()['flops']

  lora = work('lora', attach)
  assert lora < work('dora', freeze) <= 1.03 * lora
  assert work('dora', attach) > 3 * lora
