"""A run is measured on others' tests, and says what it found and how sure."""

import collections
import json
import shutil

import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  benchmark,
  chat,
  cli,
  fastchat,
  finetune,
  folder,
  nlg,
  rows,
)
from qdora_jax.benchmark import Subject
from qdora_jax.intervals import Measure, bootstrap, wilson
from qdora_jax.prompts import Format

PLAIN = Format('plain')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A finished run on twenty sums."""
  folder = tmp_path_factory.mktemp('run')
  model = tiny.write(folder / 'model')
  lines = [
    json.dumps({'question': f'{n}+1?', 'answer': f'#### {n + 1}'})
    for n in range(24)
  ]
  (folder / 'train.jsonl').write_text('\n'.join(lines))
  # Four of six that were trained on.
  (folder / 'test.jsonl').write_text(
    '\n'.join([*lines[20:], *(line.replace('+', '-') for line in lines[:2])])
  )
  config = tiny.run_config(
    model,
    **{
      'data.path': f'gsm8k:{folder / "train.jsonl"}',
      'data.template': 'plain',
      'data.train_size': 0,
      'data.eval_size': 0,
      'train.steps': 2,
      'eval.benchmarks': {f'gsm8k:{folder / "test.jsonl"}': 5},
      'eval.batch_size': 4,
    },
  )
  finetune.fine_tune(config, folder / 'run')
  return folder / 'run'


@pytest.mark.slow
def test_a_benchmark_of_the_config_is_taken_after_training(workdir):
  (found,) = folder.benchmarks(workdir)
  assert (found['by'], found['total'], found['available']) == ('answers', 5, 6)
  assert found['model'] == 'last'
  measure = found['measures']['exact match']
  right = round(5 * measure['value'])
  assert (measure['low'], measure['high']) == wilson(right, 5)
  # The first four of the file were trained on.
  taken = np.random.default_rng(0).permutation(6)[:5]
  (note,) = found['notes']
  assert note == f'{sum(taken < 4)} of its questions were trained on'
  assert len(found['samples']) == 3


@pytest.mark.slow
def test_evaluating_on_a_source(workdir, tmp_path, capsys, monkeypatch):
  workdir = shutil.copytree(workdir, tmp_path / 'run')
  source = f'gsm8k:{workdir.parent / "t.jsonl"}'
  (workdir.parent / 't.jsonl').write_text('{"question": "7+1?", "answer": "8"}')
  words = ['evaluate', '--workdir', str(workdir), '--max-new-tokens', '3']
  assert cli.main([*words, '--on', source]) == 0
  out = capsys.readouterr().out
  assert f'{source}, by answers, 3 new tokens, n=1:' in out
  assert '1 of its questions were trained on' in out
  assert cli.main([*words, '--on', source, '--base']) == 0
  assert cli.main([*words, '--on', source]) == 0
  capsys.readouterr()
  # The same again stands in its own place.
  models = [entry['model'] for entry in folder.benchmarks(workdir)]
  assert models == ['last', 'base', 'last']

  # A beam search, if it is asked for.
  assert cli.main([*words, '--on', source, '--beams', '3']) == 0
  assert f'{source}, by answers, 3 new tokens, 3 beams, n=1:' in (
    capsys.readouterr().out
  )
  # Which is not the same as without.
  kept = [entry['how'] for entry in folder.benchmarks(workdir)]
  assert kept == ['', *['3 new tokens'] * 2, '3 new tokens, 3 beams']
  assert 'gsm8k exact match (3 new tokens, 3 beams)' in folder.figures(workdir)

  # What was measured is shown, wherever it cannot be kept.
  def full(path, values):
    raise OSError('no space')

  monkeypatch.setattr(folder, 'write', full)
  assert cli.main([*words, '--on', source]) == 0
  shown = capsys.readouterr()
  assert (
    'by answers, 3 new tokens, n=1:' in shown.out and 'no space' in shown.err
  )
  assert len(folder.benchmarks(workdir)) == 4
  assert cli.main([*words, '--on', source, '--batch-size', '0']) == 1
  assert '--batch-size=0: at least 1' in capsys.readouterr().err
  for option in ('--beams', '--limit', '--max-new-tokens', '--batch-size'):
    assert cli.main([*words[:3], option, '2']) == 1
    shown = capsys.readouterr().err
    assert f'{option} is for ' in shown and 'rows that the run holds' in shown
  for more, wrong in (
    (['--seed', '2'], '--seed is for --on with --limit'),
    (['--by', 'perplexity', '--shots', '1'], '--shots is for answers'),
    (['--by', 'likelihood', '--beams', '2'], '--beams is for answers'),
    (['--include-path', 'a'], '--include-path is for --harness'),
  ):
    assert cli.main([*words[:3], '--on', source, *more]) == 1
    shown = capsys.readouterr().err
    assert wrong in shown and 'rows that the run holds' not in shown
  assert cli.main([*words, '--on', 'gsm9k:nothing']) == 1
  assert "no task 'gsm9k'; near: gsm8k" in capsys.readouterr().err
  assert cli.main([*words, '--on', 'gsm8k:gone.jsonl']) == 1
  assert 'gone.jsonl: no such file' in capsys.readouterr().err


def test_a_benchmark_that_is_not_there_stops_a_run_at_once(tmp_path):
  config = tiny.run_config(
    tmp_path / 'no-model', **{'eval.benchmarks': {'gsm8k:gone.jsonl': 0}}
  )
  with pytest.MonkeyPatch.context() as patch:
    tiny.use_sums(patch)
    with pytest.raises(FileNotFoundError, match=r'gone\.jsonl'):
      finetune.fine_tune(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_what_cannot_be_compared_is_known_before_training(
  tmp_path, monkeypatch
):
  path = tmp_path / 'e2e.txt'
  path.write_text('name : A||A .\n')
  find = nlg.importlib.util.find_spec
  monkeypatch.setattr(
    nlg.importlib.util,
    'find_spec',
    lambda name: None if name == 'nltk' else find(name),
  )
  with pytest.raises(ImportError, match=r'with nltk: .*\[eval\]'):
    benchmark.load(f'e2e:{path}')


def subject() -> Subject:
  return Subject(*tiny.loaded(), form=PLAIN)


@pytest.mark.slow
def test_answers_are_those_of_single_prompts(tmp_path):
  """In batches of padded prompts, the last of one alone."""
  path = tmp_path / 'rows.jsonl'
  rows = [{'prompt': 'ab' * n, 'completion': 'c'} for n in (1, 4, 2, 9, 3)]
  path.write_text('\n'.join(map(json.dumps, rows)))
  results = [
    benchmark.measure(subject(), str(path), batch_size=n, max_new_tokens=5)
    for n in (2, 5)
  ]
  assert results[0].samples == results[1].samples
  # In the last bits they depend on the batch.
  for name, measure in results[0].measures.items():
    other = results[1].measures[name]
    assert other.value == pytest.approx(measure.value, rel=1e-5)
    assert other.low == pytest.approx(measure.low, rel=1e-5)
  assert results[0].total == 5


def test_choices_and_perplexity(tmp_path):
  path = tmp_path / 'piqa.jsonl'
  records = [
    {'goal': f'goal {n}', 'choices': ['this', 'that one'], 'label': n % 2}
    for n in range(10)
  ]
  path.write_text('\n'.join(map(json.dumps, records)))
  found = benchmark.measure(subject(), f'piqa:{path}', 'likelihood', limit=8)
  assert list(found.measures) == [
    'accuracy by sum',
    'accuracy by token',
    'accuracy by byte',
  ]
  for measure in found.measures.values():
    assert measure.low < measure.value < measure.high or measure.value in (0, 1)
  assert (found.total, found.available) == (8, 10)
  text = tmp_path / 'text.txt'
  text.write_text('once upon a time there was a fox. ' * 12)
  found = benchmark.measure(subject(), str(text), length=32)
  assert found.by == 'perplexity' and found.total == 13
  token, word, bits = found.measures.values()
  assert token.low <= token.value <= token.high
  # Of one text: a token is a byte here, and a word some five.
  np.testing.assert_allclose(bits.value, np.log2(token.value), rtol=1e-6)
  words, tokens = 12 * 8, 12 * 34
  np.testing.assert_allclose(
    np.log(word.value) * words, np.log(token.value) * tokens, rtol=1e-6
  )
  assert '408 tokens in windows of 32' in str(found)
  with pytest.raises(ValueError, match='has no answer to compare with'):
    benchmark.measure(subject(), str(text), 'answers')


def test_a_bootstrap_is_the_normal_interval_of_a_mean():
  values = np.random.default_rng(0).normal(3, 2, 400)
  got = bootstrap(lambda at: values[at].mean(), 400)
  half = 1.96 * values.std() / 20
  assert got.value == pytest.approx(values.mean())
  assert got.high - got.low == pytest.approx(2 * half, rel=0.15)
  assert str(Measure(0.12345, 0.1, 0.2)) == '0.1235 (0.1000 to 0.2000)'
  alone = bootstrap(lambda at: values[at].mean(), 1)
  assert str(alone) == f'{values[0]:.4g} (no interval)'


@tiny.needs_data
def test_fastchats_own_questions():
  folder = tiny.DATA / 'mt_vicuna'
  for name, heats in (
    ('vicuna80', {0.0: 10, 0.7: 70}),
    ('mt_bench', {0.0: 40, 0.1: 20, 0.7: 20}),
  ):
    found = rows.read(str(folder / f'{name}_question.jsonl'))
    questions = [fastchat._checked(row) for row in found]
    assert len(questions) == 80
    turns = {len(question['turns']) for question in questions}
    assert turns == {2 if name == 'mt_bench' else 1}
    asked = collections.Counter(map(fastchat.temperature, questions))
    assert asked == heats


@pytest.mark.slow
def test_answers_in_fastchats_form(tmp_path):
  path, out = tmp_path / 'questions.jsonl', tmp_path / 'deep' / 'answers.jsonl'
  questions = [
    {'question_id': 81, 'category': 'writing', 'turns': ['one', 'two']},
    {'question_id': 82, 'category': 'math', 'turns': ['three', 'four']},
    {'question_id': 1, 'category': 'generic', 'turns': ['five']},
  ]
  path.write_text('\n'.join(map(json.dumps, questions)))
  one = Subject(*tiny.loaded(), form=chat.CHAT)
  count = fastchat.answer(one, str(path), out, 'tiny', max_new_tokens=4)
  assert count == 3
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  found = {line['question_id']: line for line in lines}
  assert set(found) == {81, 82, 1}
  for question in questions:
    line = found[question['question_id']]
    assert set(line) == {
      'question_id',
      'answer_id',
      'model_id',
      'choices',
      'tstamp',
    }
    (choice,) = line['choices']
    assert choice['index'] == 0
    assert len(choice['turns']) == len(question['turns'])
  # Nothing is asked twice; what is new is.
  assert fastchat.answer(one, str(path), out, 'tiny', max_new_tokens=4) == 0
  more = {'question_id': 5, 'category': 'x', 'turns': ['six']}
  path.write_text(path.read_text() + '\n' + json.dumps(more))
  assert fastchat.answer(one, str(path), out, 'tiny', max_new_tokens=4) == 1
  heats = [fastchat.temperature(question) for question in questions]
  assert heats == [0.7, 0.0, 0.7]
  for line in (
    '{"question_id": 1, "turns": "what"}',
    '{"question_id": "a", "turns": ["what"]}',
    '{"question_id": 1, "turns": [2]}',
  ):
    path.write_text(line)
    with pytest.raises(ValueError, match=r'questions\.jsonl:1 is no question'):
      fastchat.answer(one, str(path), out, 'tiny')
  with pytest.raises(ValueError, match=r'answers\.txt: expected .*\.jsonl'):
    fastchat.answer(one, str(path), out.with_suffix('.txt'), 'tiny')


def test_a_second_turn_sees_the_first_answer(tmp_path, monkeypatch):
  seen = []

  def say(model, params, tokenizer, prompts, count, **options):
    seen.append([tokenizer.decode(ids) for ids in prompts])
    return [f'said {len(seen)} '] * len(prompts)

  monkeypatch.setattr(fastchat, 'generate_text', say)
  path, out = tmp_path / 'q.jsonl', tmp_path / 'a.jsonl'
  path.write_text('{"question_id": 3, "turns": ["hi", "more"]}')
  one = Subject(None, None, tiny.loaded()[2], chat.CHAT)
  fastchat.answer(one, str(path), out, 'm')
  assert seen == [['u:hi\na:'], ['u:hi\na:said 1</s>u:more\na:']]
  assert json.loads(out.read_text())['choices'][0]['turns'] == [
    'said 1',
    'said 2',
  ]


@pytest.mark.slow
def test_stop_strings_and_draws_by_command(workdir, capsys):
  words = ['generate', '--workdir', str(workdir), '--prompt', 'ab']
  words += ['--max-new-tokens', '40', '--temperature', '1.5', '--seed', '3']
  assert cli.main(words) == 0
  whole = capsys.readouterr().out.strip()
  assert len(whole) > 4
  assert cli.main([*words, '--stop', whole[3], '--top-k', '0']) == 0
  assert (
    capsys.readouterr().out.strip() == whole[: whole.find(whole[3])].strip()
  )
  asked = [*words[:3], '--questions', 'q.jsonl', '--out', 'a.jsonl']
  assert cli.main([*asked, '--top-k', '3']) == 1
  assert '--top-k is for --prompt' in capsys.readouterr().err
  assert cli.main([*words, '--top-p', '1.5']) == 1
  assert 'top_p=1.5: expected more than 0' in capsys.readouterr().err
  assert cli.main([*words[:-6], '--top-k', '1', '--temperature', '1']) == 0
  top = capsys.readouterr().out
  assert cli.main(words[:3] + words[3:5] + ['--max-new-tokens', '100']) == 0
  # The likeliest alone is what is greedy.
  assert capsys.readouterr().out.startswith(top.rstrip('\n')[:20])
