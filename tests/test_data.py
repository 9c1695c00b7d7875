"""From rows to batches: what is learned, in which order, beside what."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import chat, data
from qdora_jax.chat import Example
from qdora_jax.data import Batches
from qdora_jax.interop import hf
from qdora_jax.loss import summed_loss
from qdora_jax.rows import Row
from qdora_jax.run import Run


def section(**overrides):
  return tiny.run_config(
    'none', **{f'data.{k}': v for k, v in overrides.items()}
  ).data


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def sums(numbers):
  return [{'prompt': f'{n}+1', 'completion': f'{n + 1}'} for n in numbers]


def questions(rows):
  return [row.question for row in rows]


@pytest.fixture
def calls(monkeypatch):
  return tiny.use_sums(monkeypatch)


def test_no_question_is_trained_on_and_tested_on(calls):
  # Half of what is drawn are repetitions.
  options = {'distinct': 30}
  found = data.load_data(section(options=options, seed=5))
  (train_rows,) = found.train.values()
  assert (len(train_rows), len(found.held_out)) == (24, 6)
  every = questions([*train_rows, *found.held_out])
  assert len(set(every)) == 30
  assert calls == [('sums', 60, 5, options)]
  # The first ones drawn are held out, however many are trained on.
  assert found.held_out[0].question == '5+0='
  fewer = data.load_data(section(train_size=3, seed=5))
  assert questions(fewer.held_out) == every[24:]


def test_a_task_makes_a_thousand_rows_by_itself(calls):
  data.load_data(section(train_size=0, options={'distinct': 2000}))
  assert calls[0][1] == 2 * 1006


def test_held_out_rows_of_a_file_are_random_distinct_and_not_trained_on(
  tmp_path,
):
  # Every question twice.
  path = write(tmp_path / 'a.jsonl', sums([*range(40), *range(40)]))
  options = {'path': path, 'train_size': 0, 'eval_size': 10}
  found = data.load_data(section(**options))
  tested, (rows,) = questions(found.held_out), found.train.values()
  assert len(set(tested)) == len(tested) == 10
  assert tested != questions(rows)[:10]
  assert not set(tested) & set(questions(rows))
  assert len(rows) == 60
  again = data.load_data(section(**options))
  assert questions(again.held_out) == tested
  other = data.load_data(section(**options, seed=1))
  assert questions(other.held_out) != tested
  # Whatever is trained on: the first of the rest, or rows drawn from all of it.
  few = data.load_data(section(**options | {'train_size': 5}))
  assert questions(few.held_out) == tested
  assert list(few.train.values()) == [rows[:5]]
  assert few.overlap < found.overlap
  drawn = {}
  for seed, size in ((0, 5), (0, 9), (1, 5)):
    more = {'train_size': size, 'train_rows': 'random', 'seed': seed}
    some = data.load_data(section(**options | more))
    (drawn[seed, size],) = some.train.values()
    assert not set(questions(drawn[seed, size])) & set(questions(some.held_out))
  # As many as asked for, though some questions are held out; more are those
  # and others.
  assert [*map(len, drawn.values())] == [5, 9, 5]
  assert drawn[0, 5] == drawn[0, 9][:5] != drawn[1, 5]
  assert {row.place for row in drawn[0, 9]} < {row.place for row in rows}
  assert drawn[0, 5] != rows[:5]


def test_a_file_of_its_own_is_held_out_and_left_out_of_training(tmp_path):
  path = write(tmp_path / 'a.jsonl', sums(range(40)))
  held = write(tmp_path / 'b.jsonl', sums(range(30, 50)))
  found = data.load_data(
    section(path=path, eval_path=held, train_size=0, eval_size=15)
  )
  assert questions(found.held_out) == [f'{n}+1' for n in range(30, 45)]
  (rows,) = found.train.values()
  assert questions(rows) == [f'{n}+1' for n in range(30)]


def test_several_sources_give_held_out_rows_by_weight(tmp_path, calls):
  path = write(tmp_path / 'a.jsonl', sums(range(40)))
  found = data.load_data(
    section(mix={path: 3.0, 'reasoning_gym/sums': 1.0}, eval_size=8)
  )
  assert list(found.train) == [path, 'reasoning_gym/sums']
  assert found.weights == {path: 3.0, 'reasoning_gym/sums': 1.0}
  names = collections.Counter(
    row.place.split('[')[0].split(':')[0] for row in found.held_out
  )
  assert names == {path: 6, 'reasoning_gym/sums': 2}


def test_nothing_left_to_train_on_says_so(tmp_path):
  path = write(tmp_path / 'a.jsonl', sums(range(5)))
  with pytest.raises(ValueError, match=r'a.jsonl: nothing is left to train on'):
    data.load_data(section(path=path, eval_size=5))


def examples(count=7):
  """Example n has n + 2 tokens before 1 to 3 learned ones, all its own."""
  made = []
  for n in range(count):
    before, after = n + 2, 1 + n % 3
    tokens = [10 + n] * before + [100 + n] * after
    made.append(of(tokens, [False] * before + [True] * after))
  return made


def of(tokens, learned):
  return Example(np.array(tokens, np.int32), np.array(learned, bool))


def test_labels_are_the_learned_tokens():
  batches = Batches(examples(), 4)
  # The longest is 8 + 1 tokens; lengths are in eights.
  assert (batches.length, batches.learned) == (16, 3)
  batch = batches[3]
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'tokens': ((4, 16), 'int32'),
    'positions': ((4, 16), 'int32'),
    'segments': ((4, 16), 'int32'),
    'loss_at': ((4, 3), 'int32'),
    'labels': ((4, 3), 'int32'),
    'weights': ((4, 3), 'float32'),
  }
  for row in range(4):
    n = batch['tokens'][row, 0] - 10
    ids = examples()[n].tokens.tolist()
    assert batch['tokens'][row].tolist() == ids + [0] * (16 - len(ids))
    count = 1 + n % 3
    assert batch['weights'][row].tolist() == [1] * count + [0] * (3 - count)
    at = batch['loss_at'][row, :count]
    # The token behind the place it is predicted from.
    assert batch['tokens'][row, at + 1].tolist() == [100 + n] * count
    assert batch['labels'][row, :count].tolist() == [100 + n] * count
    assert batch['segments'][row].sum() == len(ids)


def test_counts_are_true():
  counts = Batches(examples(), 4, seq_len=9).counts
  # Lengths are 3, 5, 7, 6, 8, 10 and 9.
  assert (counts.examples, counts.tokens, counts.dropped) == (6, 38, 1)
  assert counts.learned == 1 + 2 + 3 + 1 + 2 + 1
  assert (counts.packed, counts.length) == (6, 16)
  assert counts.filled == 38 / 96
  assert 'TOO LONG: 1 dropped' in str(counts)
  assert 'TOO LONG' not in str(Batches(examples(), 4).counts)


def test_longer_examples_are_cut_and_counted():
  batches = Batches(examples(), 4, seq_len=8, too_long='truncate')
  counts = batches.counts
  # Of lengths 10 and 9, one keeps no learned token: 8 before 1, and 7 + 3 is
  # cut to 7 + 1.
  assert (counts.examples, counts.truncated, counts.dropped) == (6, 1, 1)
  assert max(map(len, batches._layouts)) == 1
  assert '1 dropped and 1 truncated' in str(counts)


def test_nothing_to_learn_is_an_error():
  with pytest.raises(ValueError, match=r'none of 7 .*train.seq_len=2'):
    Batches(examples(), 4, 2)
  with pytest.raises(ValueError, match=r'a\.jsonl: there are no examples'):
    Batches({'a.jsonl': []}, 4)


def seen(batches, steps):
  firsts = [batches[n]['tokens'][:, 0] for n in steps]
  return (np.concatenate(firsts) - 10).tolist()


def test_every_epoch_sees_every_example_once_in_another_order():
  order = seen(Batches(examples(), 4), range(14))
  epochs = [order[7 * n : 7 * n + 7] for n in range(8)]
  assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) > 6


def test_a_step_sees_the_same_whenever_it_is_asked():
  batches = Batches(examples(), 4)
  forward = [seen(batches, [n]) for n in range(9)]
  again = Batches(examples(), 4)
  assert [seen(again, [n]) for n in reversed(range(9))] == forward[::-1]
  other = Batches(examples(), 4, seed=1)
  assert seen(other, range(9)) != seen(batches, range(9))


def test_the_position_of_an_iterator_is_restored_through_json():
  batches = Batches({'a': examples(), 'b': examples(3)}, 4)
  source = iter(batches)
  for _ in range(5):
    next(source)
  state = json.loads(json.dumps(source.get_state()))
  want = [next(source) for _ in range(6)]
  fresh = iter(Batches({'a': examples(), 'b': examples(3)}, 4))
  fresh.set_state(state)
  for n, batch in enumerate(want):
    got = next(fresh)
    for key in batch:
      np.testing.assert_array_equal(got[key], batch[key])
      np.testing.assert_array_equal(batches[5 + n][key], batch[key])


def test_once_sees_every_example_in_order_and_fills_up_with_nothing():
  batches = Batches(examples(), 4)
  parts = list(batches.once())
  assert [part['tokens'][:, 0].tolist() for part in parts] == [
    [10, 11, 12, 13],
    [14, 15, 16, 0],
  ]
  assert parts[1]['weights'][3].sum() == parts[1]['segments'][3].sum() == 0


@pytest.mark.parametrize('packing', [False, True])
def test_weights_are_shares_of_the_examples(packing):
  """However long the examples of a source are, and in whichever rows."""
  short = [of([1, 2], [False, True]) for _ in range(50)]
  long = [of([3] * 7 + [4], [False] * 7 + [True]) for _ in range(20)]
  batches = Batches(
    {'short': short, 'long': long},
    8,
    8,
    packing=packing,
    weights={'short': 3.0, 'long': 1.0},
  )
  labels = collections.Counter()
  for n in range(60):
    batch = batches[n]
    labels.update(batch['labels'][batch['weights'] > 0].tolist())
  assert labels[2] / (labels[2] + labels[4]) == pytest.approx(0.75, abs=0.01)


def test_packing_loses_nothing_and_fills_rows():
  draw = np.random.RandomState(0)
  many = []
  for n in range(300):
    size = draw.randint(2, 60)
    many.append(of([n] * size, [False] * (size - 1) + [True]))
  batches = Batches(many, 4, 64, packing=True)
  counts = collections.Counter()
  for batch in batches.once():
    for row in range(4):
      tokens, segments = batch['tokens'][row], batch['segments'][row]
      for segment in range(1, segments.max() + 1):
        inside = segments == segment
        (n,) = set(tokens[inside].tolist())
        counts[n] += 1
        assert inside.sum() == len(many[n])
        assert batch['positions'][row][inside].tolist() == [
          *range(len(many[n]))
        ]
      # What is learned is predicted from within the same example.
      live = batch['weights'][row] > 0
      at = batch['loss_at'][row][live]
      assert (segments[at] == segments[at + 1]).all()
      assert batch['labels'][row][live].tolist() == tokens[at + 1].tolist()
  assert counts == dict.fromkeys(range(300), 1)
  assert batches.counts.filled > 0.97


# Leaves out what was thought in earlier turns.
FORGETS = (
  '{% for m in messages %}'
  "{% if m['role'] == 'assistant' %}{{ 'a:' }}{% if loop.last %}{{ '~' }}"
  "{% endif %}{{ m['content'] + eos_token }}"
  "{% else %}{{ 'u:' + m['content'] + '\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def test_conversations_that_are_split_are_counted(tmp_path):
  tokenizer = hf.HFCheckpoint(tiny.write(tmp_path)).tokenizer()
  turns = [
    {'role': role, 'content': 'abc'}
    for _ in range(3)
    for role in ('user', 'assistant')
  ]
  rows = [Row({'messages': turns[:n]}) for n in (2, 4, 6)]
  for template, sizes in ((tiny.TEMPLATE, [1, 1, 1]), (FORGETS, [1, 2, 3])):
    tokenizer.chat_template = template
    every = data.encode_all(tokenizer, rows, chat.CHAT)
    assert [len(some) for some in every] == sizes
  examples = [example for some in every for example in some]
  # The last ones are too long, and counted all the same.
  counts = Batches(examples, 2, len(examples[2])).counts
  assert (counts.split, counts.turns) == (2, 5)
  assert counts.examples == 5 and counts.dropped == 1
  words = '2 conversations were split into 5 examples, one an assistant turn'
  assert words in str(counts)
  assert 'split' not in str(Batches(examples[:1], 2).counts)
  cut = Batches(examples, 2, len(examples[2]), too_long='truncate').counts
  assert (cut.split, cut.turns) == (2, 5)


def test_prompts_are_learned_if_asked_for(tmp_path):
  file = tmp_path / 'rows.jsonl'
  rows = [{'prompt': f'ab {n}', 'completion': 'cd'} for n in range(4)]
  file.write_text('\n'.join(map(json.dumps, rows)))
  options = {'data.path': str(file), 'data.eval_size': 1, 'train.seq_len': 0}
  answers, everything = (
    Run.open(
      tiny.run_config(
        tiny.write(tmp_path / 'model'), **options, **{'data.learn_prompts': ask}
      ),
      tmp_path / f'run-{ask}',
    )
    for ask in (False, True)
  )
  counts, few = everything.batches().counts, answers.batches().counts
  assert counts.tokens == few.tokens
  # All but the first token of each, which nothing stands before.
  assert counts.learned == counts.tokens - counts.examples
  assert few.learned < counts.learned
  # What is held out is scored by its answers.
  assert answers.held_out.counts == everything.held_out.counts


def test_packed_examples_cannot_see_each_other():
  """Losses and gradients are those of the examples alone in their rows."""
  model, params, tokenizer = tiny.loaded()
  texts = [('a' * 5, 'bc'), ('d' * 9, 'efg'), ('h', 'i'), ('jk', 'l' * 4)]
  rows = [{'prompt': p, 'completion': c} for p, c in texts]
  some = [chat.encode(tokenizer, row) for row in rows]
  packed = next(Batches(some, 1, 64, packing=True).once())
  assert packed['segments'].max() == 4
  alone = next(Batches(some, 4).once())
  gradient = jax.jit(jax.value_and_grad(lambda p, b: summed_loss(model, p, b)))
  (one, ones), (four, fours) = (
    gradient(params, batch) for batch in (packed, alone)
  )
  np.testing.assert_allclose(one, four, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(ones), jax.tree.leaves(fours), strict=True):
    assert tiny.relative(a, b) <= 1e-4


def test_no_gradient_reaches_another_packed_example():
  """What the loss of one feels of the embeddings of others is exactly 0."""
  model, params, tokenizer = tiny.loaded(tied=False)
  rows = [{'prompt': 'a' * n, 'completion': 'bc'} for n in (3, 9, 5)]
  some = [chat.encode(tokenizer, row) for row in rows]
  batch = next(Batches(some, 1, 64, packing=True).once())
  segments, length = batch['segments'][0], batch['tokens'].shape[1]
  table = params['embed']['embedding']

  def loss_of(one, places):
    """With a row of the embedding for each place."""
    of_one = batch['segments'][0, batch['loss_at'][0]] == one
    part = batch | {
      'tokens': np.arange(length)[None],
      'weights': batch['weights'] * of_one[None],
    }
    embedding = jnp.concatenate([places, table[length:]])
    return summed_loss(
      model, params | {'embed': {'embedding': embedding}}, part
    )

  gradient = jax.jit(jax.grad(loss_of, argnums=1))
  for one in (1, 2, 3):
    felt = gradient(one, table[batch['tokens'][0]])
    felt = np.abs(np.asarray(felt)).sum(-1)
    inside = np.flatnonzero(segments == one)
    # The last token of an example is only a label.
    assert (felt[inside[:-1]] > 0).all()
    assert (felt[segments != one] == 0).all()


@pytest.mark.parametrize('packing', [False, True])
def test_batches_of_one_row(packing):
  """And they are those of larger batches, one by one."""
  examples = [
    Example(np.arange(3, 3 + n, dtype=np.int32), np.arange(n) > 0)
    for n in range(2, 12)
  ]
  one, four = (
    data.Batches(examples, n, 16, seed=3, packing=packing) for n in (1, 4)
  )
  singles = [batch for _, batch in zip(range(8), one, strict=False)]
  wide = [batch for _, batch in zip(range(2), four, strict=False)]
  for key in wide[0]:
    got = np.concatenate([batch[key] for batch in singles])
    want = np.concatenate([batch[key] for batch in wide])
    np.testing.assert_array_equal(got, want)
