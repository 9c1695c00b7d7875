"""From a task to batches: what is asked, what is learned, in which order."""

import collections

import numpy as np
import pytest
import tiny

from qdora_jax import data
from qdora_jax.data import Batches, Example, Problem


def section(**overrides):
  return tiny.run_config(
    'none', **{f'data.{k}': v for k, v in overrides.items()}
  ).data


@pytest.fixture
def calls(monkeypatch):
  return tiny.use_sums(monkeypatch)


def test_no_question_is_trained_on_and_tested_on(calls):
  # Half of what is drawn are repetitions.
  options = {'distinct': 30}
  task = data.load_task(section(options=options, seed=5))
  assert (len(task.train), len(task.held_out)) == (24, 6)
  questions = [p.question for p in (*task.train, *task.held_out)]
  assert len(set(questions)) == 30
  assert calls == [('sums', 60, 5, options)]
  # The first ones drawn are held out, however many are trained on.
  assert task.held_out[0].question == '5+0='
  fewer = data.load_task(section(train_size=3, seed=5))
  assert [p.question for p in fewer.held_out] == questions[24:]


def test_the_judge_is_the_tasks_own(calls):
  task = data.load_task(section())
  problem = task.held_out[3]
  assert (problem.question, problem.answer) == ('3+0=', '3')
  assert task.score('3', problem) == 1
  assert task.score('4', problem) == 0.01


def test_too_few_questions_says_how_many(calls):
  words = 'has 20 distinct questions among 60.* ask for 30'
  with pytest.raises(ValueError, match=words):
    data.load_task(section(options={'distinct': 20}))


@pytest.mark.parametrize('name', ['gsm8k', 'reasoning_gym', 'other/chain_sum'])
def test_an_unknown_data_set_is_named(name):
  with pytest.raises(ValueError, match=f"config.data.name='{name}'"):
    data.load_task(section(name=name))


def test_a_task_without_answers_is_refused(monkeypatch):
  """reasoning-gym gives None where many answers are right: nothing to learn."""
  sums = tiny.Sums(60, 0)
  monkeypatch.setattr(
    tiny.Sums, '__getitem__', lambda _, i: {'question': f'{i}', 'answer': None}
  )
  monkeypatch.setattr('qdora_jax.data.reasoning_gym.load', lambda *_: sums)
  with pytest.raises(ValueError, match='answer'):
    data.load_task(section())


ONE = Problem('1+2=', '3', {})
SHOT = Problem('4+4=', '8', {})


def test_a_question_stands_in_a_chat():
  bare = section()
  assert data.messages(bare, ONE) == [{'role': 'user', 'content': '1+2='}]
  full = section(system='Add.', instruction='A number.')
  assert data.messages(full, ONE, [SHOT]) == [
    {'role': 'system', 'content': 'Add.'},
    {'role': 'user', 'content': '4+4=\nA number.'},
    {'role': 'assistant', 'content': '8'},
    {'role': 'user', 'content': '1+2=\nA number.'},
  ]


def test_prompts_are_the_chat_templates():
  tokenizer = tiny.loaded()[2]
  chat = data.messages(section(system='Add.'), ONE, [SHOT])
  ids = data.prompt_ids(tokenizer, chat)
  text = 's:Add.\nu:4+4=\na:8</s>u:1+2=\na:'
  assert tokenizer.decode(ids) == text
  assert len(ids) == len(text) - len('</s>') + 1


def test_a_completion_is_the_answer_and_its_end():
  tokenizer = tiny.loaded()[2]
  example = data.encode(tokenizer, section(), Problem('9+9=', '18', {}))
  assert tokenizer.decode(example.prompt) == 'u:9+9=\na:'
  assert tokenizer.decode(example.completion) == '18</s>'
  assert example.completion[-1] == tiny.EOS


def examples(count=7):
  """Example n has n + 2 prompt tokens and 1 to 3 of completion, all alike."""
  return [
    Example((10 + n,) * (n + 2), (100 + n,) * (1 + n % 3)) for n in range(count)
  ]


def test_labels_are_the_completions_tokens():
  batches = Batches.make(examples(), 4, 0, seed=0)
  # The longest is 8 + 1 tokens; lengths are in eights.
  assert (batches.length, batches.completion, batches.dropped) == (16, 3, 0)
  batch = batches(3)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'tokens': ((4, 16), 'int32'),
    'loss_at': ((4, 3), 'int32'),
    'labels': ((4, 3), 'int32'),
    'weights': ((4, 3), 'float32'),
  }
  for row in range(4):
    n = batch['tokens'][row, 0] - 10
    example = examples()[n]
    ids = [*example.prompt, *example.completion]
    assert batch['tokens'][row].tolist() == ids + [0] * (16 - len(ids))
    count = len(example.completion)
    assert batch['weights'][row].tolist() == [1] * count + [0] * (3 - count)
    at = batch['loss_at'][row, :count]
    # The token behind the place it is predicted from.
    assert batch['tokens'][row, at + 1].tolist() == list(example.completion)
    assert batch['labels'][row, :count].tolist() == list(example.completion)


def seen(batches, steps):
  firsts = [batches(n)['tokens'][:, 0] for n in steps]
  return (np.concatenate(firsts) - 10).tolist()


def test_every_epoch_sees_every_example_once_in_another_order():
  order = seen(Batches.make(examples(), 4, 0, seed=0), range(14))
  epochs = [order[7 * n : 7 * n + 7] for n in range(8)]
  assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) > 6


def test_a_step_sees_the_same_whenever_it_is_asked():
  batches = Batches.make(examples(), 4, 0, seed=0)
  forward = [seen(batches, [n]) for n in range(9)]
  again = Batches.make(examples(), 4, 0, seed=0)
  assert [seen(again, [n]) for n in reversed(range(9))] == forward[::-1]
  other = Batches.make(examples(), 4, 0, seed=1)
  assert seen(other, range(9)) != seen(batches, range(9))


def test_a_batch_larger_than_the_data_is_filled_from_the_next_epochs():
  order = seen(Batches.make(examples(3), 8, 0, seed=0), [0])
  assert collections.Counter(order[:6]) == {0: 2, 1: 2, 2: 2}


def test_longer_examples_are_dropped_and_counted():
  batches = Batches.make(examples(), 4, 5, seed=0)
  # Lengths are 3, 5, 7, 6, 8, 10 and 9.
  assert (len(batches.examples), batches.dropped) == (2, 5)
  assert batches.length == 8
  assert Batches.make(examples(), 4, 10, seed=0).dropped == 0


def test_nothing_to_learn_is_an_error():
  with pytest.raises(ValueError, match=r'none of 7 .*train.seq_len=2'):
    Batches.make(examples(), 4, 2, seed=0)
  with pytest.raises(ValueError, match='example 1 has no completion'):
    Batches.make([*examples(1), Example((1,), ())], 4, 0, seed=0)
