"""Intervals as published, and exact match as the task's judge has it."""

import jax
import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import chat, data, evaluate
from qdora_jax.beam import beam_search
from qdora_jax.evaluate import Score
from qdora_jax.intervals import wilson
from qdora_jax.rows import Row


# Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3; the tens:
# Brown, Cai and DasGupta 2001's formula worked out by hand.
@pytest.mark.parametrize(
  'right, total, low, high',
  [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (0, 10, 0.0, 0.2775),
    (5, 10, 0.2366, 0.7634),
    (10, 10, 0.7225, 1.0),
  ],
)
def test_wilson(right, total, low, high):
  assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_other_levels():
  # z = 1: (p + 1/2n +- sqrt(p q / n + 1/4n^2)) / (1 + 1/n), p = 1/2, n = 3.
  assert wilson(3, 6, z=1.0) == pytest.approx(
    (0.5 - 0.5 * 7**-0.5, 0.5 + 0.5 * 7**-0.5)
  )


def test_a_score_in_words():
  score = Score(81, 200, 263)
  assert score.mean == 81 / 263
  assert score.interval == wilson(81, 263)
  words = '30.8% right (95% interval 25.5% to 36.6%, n=263); 76% parseable'
  assert str(score) == words
  score = Score(81, 200, 263, loss=0.5)
  assert str(score) == words + '; held-out loss 0.5000 nats a token'
  assert str(Score(0, 0, 0, loss=2.25)) == 'held-out loss 2.2500 nats a token'


def test_a_row_without_an_answer_is_named(monkeypatch):
  rows = [Row({'text': 'once'}, 'stories.jsonl:3')]
  with pytest.raises(ValueError, match=r'stories.jsonl:3 has no answer'):
    evaluate.exact_match(None, None, None, rows)


@pytest.mark.slow
def test_the_held_out_loss_is_the_mean_over_all_learned_tokens():
  """Of batches of unequal weight, against the logits themselves."""
  model, params, tokenizer = tiny.loaded()
  rows = [{'prompt': 'x' * n, 'completion': 'y' * (3 * n)} for n in (1, 2, 4)]
  examples = [chat.encode(tokenizer, row) for row in rows]
  batches = data.Batches(examples, batch_size=2)
  got = evaluate.held_out_loss(model, params, batches.once())
  each = []
  for example in examples:
    logits = model.apply({'params': params}, example.tokens[None])[0]
    logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
    for at in np.flatnonzero(example.learned):
      each.append(-logp[at - 1, example.tokens[at]])
  assert len(each) == 3 * 7 + 3
  np.testing.assert_allclose(got, np.mean(each), rtol=1e-5)
  with pytest.raises(ValueError, match='nothing'):
    evaluate.held_out_loss(model, params, [])


def run(monkeypatch, say, **options):
  """exact_match with a model that says say(question) to each question."""
  tokenizer = tiny.loaded()[2]
  section = tiny.run_config('none').data
  tiny.use_sums(monkeypatch)
  found = data.load_data(section)
  calls = []

  def answer(model, params, prompts, count, *, stop):
    texts = [tokenizer.decode(p) for p in prompts]
    calls.append((model, params, texts, count, stop))
    words = [say(t.split('u:')[-1].partition('\n')[0]) for t in texts]
    return [tokenizer.encode(w, add_special_tokens=False) for w in words]

  monkeypatch.setattr(evaluate, 'generate', answer)
  score = evaluate.exact_match(
    'model',
    'params',
    tokenizer,
    found.held_out,
    section.format(),
    answer_pattern=section.answer_pattern,
    **options,
  )
  (train,) = found.train.values()
  return score, calls, train


ANSWERS = {'0+0=': '0', '1+0=': '2', '2+0=': 'two', '3+0=': ' 3 ', '4+0=': ''}


def test_exact_match_counts_right_and_wellformed_answers(monkeypatch):
  score, calls, _ = run(
    monkeypatch,
    lambda q: ANSWERS.get(q, '5'),
    batch_size=4,
    max_new_tokens=7,
  )
  # Right: 0, ' 3 ' and 5. Not well-formed: 'two' and ''.
  assert (score.right, score.parseable, score.total) == (3, 4, 6)
  assert score.samples == (
    ('0+0=', '0', '0'),
    ('1+0=', '2', '1'),
    ('2+0=', 'two', '2'),
  )
  assert [len(texts) for _, _, texts, *_ in calls] == [4, 2]
  assert calls[0][2][0] == 'u:0+0=\na:'
  for model, params, _, count, stop in calls:
    assert (model, params, count, stop) == ('model', 'params', 7, [tiny.EOS])


@pytest.mark.slow
def test_answers_of_a_beam_search():
  model, params, tokenizer = tiny.loaded(tied=False)
  rows = [Row({'prompt': f'{n}+1=', 'completion': '2'}) for n in range(4)]
  greedy, searched = (
    evaluate.answers(model, params, tokenizer, rows, beams=beams)
    for beams in (1, 3)
  )
  ids = [chat.question_ids(tokenizer, row, chat.CHAT) for row in rows]
  want = beam_search(model, params, ids, 16, beams=3, stop=[tiny.EOS])
  texts = tokenizer.batch_decode(want, skip_special_tokens=True)
  assert searched == [text.strip() for text in texts] != greedy


def test_solved_problems_stand_before_each_question(monkeypatch):
  score, calls, train = run(monkeypatch, lambda q: q[0])
  assert score.right == score.total == 6
  shots = train[:2]
  assert [s.question for s in shots] == ['6+0=', '7+0=']
  _, calls, _ = run(monkeypatch, lambda q: q[0], shots=shots)
  ((_, _, texts, _, _),) = calls
  assert texts[1] == 'u:6+0=\na:6</s>u:7+0=\na:7</s>u:1+0=\na:'


def test_progress_sees_every_batch(monkeypatch):
  starts = []

  def progress(parts):
    for part in parts:
      starts.append(part)
      yield part

  run(monkeypatch, lambda q: q, batch_size=2, progress=progress)
  assert starts == [0, 2, 4]
