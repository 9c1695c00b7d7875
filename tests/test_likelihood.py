"""Likelihoods are those of the logits, and every token is predicted once."""

import math

import jax
import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import likelihood
from qdora_jax.rows import Row

_logits = jax.jit(
  lambda model, params, ids: model.apply({'params': params}, ids),
  static_argnums=0,
)


def by_logits(model, params, context, continuation):
  """(nats, greedy) from all logits of one text, in float64."""
  ids = np.array([*context, *continuation])
  # One program for all lengths: no token sees those behind it.
  padded = np.zeros((1, 64), np.int32)
  padded[0, : len(ids)] = ids
  logits = _logits(model, params, padded)[0, : len(ids)]
  logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
  at = np.arange(len(context), len(ids))
  best = logp[at - 1].argmax(-1) == ids[at]
  return logp[at - 1, ids[at]].sum(), bool(best.all())


def test_likelihoods_are_those_of_the_logits():
  """Of pairs of many lengths, in batches of padded rows."""
  model, params, _ = tiny.loaded()
  draw = np.random.default_rng(0)
  pairs = [
    (draw.integers(3, 90, c).tolist(), draw.integers(3, 90, n).tolist())
    for c, n in [(1, 1), (5, 3), (2, 30), (17, 1), (9, 9)]
  ]
  # One that is greedy.
  ids = pairs[1][0]
  padded = np.zeros((1, 64), np.int32)
  padded[0, : len(ids)] = ids
  logits = _logits(model, params, padded)[0, len(ids) - 1]
  pairs.append((ids, [int(logits.argmax())]))
  got = likelihood.log_likelihoods(model, params, pairs, batch_size=4)
  assert len(got) == 6
  for one, pair in zip(got, pairs, strict=True):
    nats, greedy = by_logits(model, params, *pair)
    assert one.nats == pytest.approx(nats, rel=1e-5)
    assert (one.greedy, one.tokens) == (greedy, len(pair[1]))
  assert got[-1].greedy and not all(one.greedy for one in got)


def test_a_long_context_loses_its_beginning():
  model, params, _ = tiny.loaded()
  context, continuation = list(range(3, 40)), [41, 42]
  (got,) = likelihood.log_likelihoods(
    model, params, [(context, continuation)], longest=16
  )
  nats, _ = by_logits(model, params, context[-15:], continuation)
  assert got.nats == pytest.approx(nats, rel=1e-5)
  with pytest.raises(ValueError, match='a continuation has 17 tokens'):
    likelihood.log_likelihoods(model, params, [([3], [4] * 17)], longest=16)
  with pytest.raises(ValueError, match='got 0 and 1'):
    likelihood.log_likelihoods(model, params, [([], [4])])


@pytest.mark.parametrize('count', [1, 7, 8, 9, 31])
@pytest.mark.parametrize('length, context', [(8, 1), (8, 3), (8, 8), (4, 2)])
def test_windows_predict_every_token_once(count, length, context):
  ids = list(range(100, 100 + count))
  found = list(likelihood.windows(ids, 1, length, context))
  assert [i for _, part in found for i in part] == ids
  for before, part in found:
    # All that is read, and no more than may be.
    assert 1 <= len(before) + len(part) - 1 <= length
    start = part[0] - 100
    want = [1] if not start else ids[:start]
    assert before == want[-len(before) :]
    if start:
      assert len(before) >= context


def test_perplexity_is_of_every_token_once():
  model, params, tokenizer = tiny.loaded()
  text = 'the quick brown fox jumps over the lazy dog. ' * 2
  got = likelihood.perplexity(
    model, params, tokenizer, text, length=16, batch_size=3
  )
  ids = tokenizer.encode(text, add_special_tokens=False)
  first = tokenizer.bos_token_id
  nats = 0.0
  for start in range(0, len(ids), 16):
    part = ids[start : start + 16]
    # The last window is short, and reads more of what was before it.
    begin = start + len(part) - 17
    before = [first] if not start else ids[begin:start]
    nats -= by_logits(model, params, before, part)[0]
  assert sum(got.tokens) == len(ids) == 90
  assert got.loss == pytest.approx(nats / 90, rel=1e-5)
  assert got.by_token == pytest.approx(math.exp(nats / 90), rel=1e-4)
  assert got.by_word == pytest.approx(math.exp(nats / 18), rel=1e-4)
  # A character is a byte here.
  assert got.bits_by_byte == pytest.approx(nats / 90 / math.log(2), rel=1e-4)
  with pytest.raises(ValueError, match='empty'):
    likelihood.perplexity(model, params, tokenizer, '')
  with pytest.raises(ValueError, match='context=17: expected 1 to length=16'):
    likelihood.perplexity(model, params, tokenizer, text, length=16, context=17)


def test_choices_by_sum_by_token_and_by_byte():
  model, params, tokenizer = tiny.loaded()
  row = Row(
    {'context': 'ab ', 'choices': [' c', ' longer one', ' dd'], 'label': 1}
  )
  (got,) = likelihood.choose(model, params, tokenizer, [row])
  context = tokenizer.encode('ab')
  nats = [
    by_logits(
      model,
      params,
      context,
      # The context's blank goes with the choice.
      tokenizer.encode(f' {choice}', add_special_tokens=False),
    )[0]
    for choice in row.values['choices']
  ]
  lengths = np.array([len(choice) for choice in row.values['choices']])
  assert got.by_sum == np.argmax(nats)
  assert got.by_token == np.argmax(nats / (lengths + 1))
  assert got.by_byte == np.argmax(nats / (lengths - 1))
  with pytest.raises(ValueError, match='row has no choices'):
    likelihood.choose(model, params, tokenizer, [Row({'text': 'a'})])


def test_a_context_for_each_choice():
  model, params, tokenizer = tiny.loaded()
  values = {'context': ['x a', 'x b'], 'choices': [' end', ' end'], 'label': 0}
  (got,) = likelihood.choose(model, params, tokenizer, [Row(values)])
  nats = [
    by_logits(
      model,
      params,
      tokenizer.encode(context),
      tokenizer.encode(' end', add_special_tokens=False),
    )[0]
    for context in values['context']
  ]
  assert got.by_sum == got.by_byte == np.argmax(nats)
