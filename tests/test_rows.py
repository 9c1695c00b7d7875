"""Rows are read from every kind of file, and what is wrong has a place."""

import gzip
import json

import pytest
import tiny

from qdora_jax import rows
from qdora_jax.rows import Row

SUMS = [{'prompt': f'{n}+1', 'completion': f'{n + 1}'} for n in range(5)]
LINES = ''.join(json.dumps(row) + '\n' for row in SUMS)


def values(found):
  return [dict(row.values) for row in found]


@pytest.mark.parametrize(
  'name, data',
  [
    ('a.jsonl', LINES.encode()),
    ('a.jsonl', ('\n' + LINES.replace('\n', '\n\n')).encode()),
    ('a.jsonl', LINES.strip().replace('\n', '\r\n').encode()),
    ('a.jsonl', b'\xef\xbb\xbf' + LINES.encode()),
    ('a.json', json.dumps(SUMS).encode()),
    ('a.json', json.dumps(SUMS, indent=2).encode()),
    ('a.json', LINES.encode()),
    ('a.jsonl.gz', gzip.compress(LINES.encode(), mtime=0)),
    ('a.json.gz', gzip.compress(json.dumps(SUMS).encode(), mtime=0)),
  ],
)
def test_json_in_all_its_files(tmp_path, name, data):
  path = tmp_path / name
  path.write_bytes(data)
  assert values(rows.read(str(path))) == SUMS


def test_places_are_lines_or_numbers(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('\n' + LINES)
  assert [row.place for row in rows.read(str(path))][:2] == [
    f'{path}:2',
    f'{path}:3',
  ]
  path.write_text(json.dumps(SUMS))
  assert rows.read(str(path))[1].place == f'{path}[1]'


def test_a_line_may_hold_other_line_separators(tmp_path):
  path = tmp_path / 'a.jsonl'
  text = 'one\u2028two\x85three'
  path.write_text(json.dumps({'text': text}, ensure_ascii=False))
  assert values(rows.read(str(path))) == [{'text': text}]


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  turns = [[{'role': 'user', 'content': 'hi'}]] * 5
  table = pyarrow.table(
    {
      'prompt': [row['prompt'] for row in SUMS],
      'completion': [row['completion'] for row in SUMS],
      'messages': turns,
    }
  )
  path = tmp_path / 'a.parquet'
  parquet.write_table(table, path)
  found = rows.read(str(path))
  assert values(found) == [row | {'messages': turns[0]} for row in SUMS]
  assert found[3].place == f'{path}[3]'
  assert found[0].form == ('messages',)


def test_hub_data_sets(tmp_path):
  """As `datasets` loads them; a local directory stands for the hub."""
  pytest.importorskip('datasets')
  (tmp_path / 'train.jsonl').write_text(LINES)
  (tmp_path / 'test.jsonl').write_text(LINES.split('\n')[0])
  name = f'hub:{tmp_path}'
  assert values(rows.read(name)) == SUMS
  found = rows.read(name, options={'split': 'test'})
  assert values(found) == SUMS[:1]
  assert found[0].place == f'{name}/test[0]'
  # A benchmark's source has its split with it.
  assert values(rows.read(f'{name}?split=test')) == SUMS[:1]
  with pytest.raises(ValueError, match=r"\?test: expected .*&split=SPLIT'"):
    rows.read(f'{name}?test')


def test_a_hub_that_gives_nothing_says_so(monkeypatch):
  datasets = pytest.importorskip('datasets')

  def unreachable(name, **options):
    raise ConnectionError("Couldn't reach the Hub")

  monkeypatch.setattr(datasets, 'load_dataset', unreachable)
  with pytest.raises(FileNotFoundError, match=r'hub:o/n: .*reach the Hub'):
    rows.read('hub:o/n')


@pytest.mark.parametrize('source', ['hub:o/n', 'a.parquet'])
def test_what_needs_the_extra_says_so(source, tmp_path, monkeypatch):
  for module in ('datasets', 'pyarrow', 'pyarrow.parquet'):
    monkeypatch.setitem(__import__('sys').modules, module, None)
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.parquet').write_bytes(b'')
  with pytest.raises(ImportError, match=r"pip install 'qdora_jax\[hf\]'"):
    rows.read(source)


def test_fields_are_renamed(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"question": "1+1", "answer": "2"}')
  fields = {'prompt': 'question', 'completion': 'answer'}
  (row,) = rows.read(str(path), fields)
  assert (row.question, row.answer) == ('1+1', '2')
  fields = {'prompt': 'question', 'completion': 'anwser'}
  words = rf"{path}:1 has no field 'anwser' .*\.completion\); it has 'answer'"
  with pytest.raises(ValueError, match=words):
    rows.read(str(path), fields)


@pytest.mark.parametrize(
  'name, data, words',
  [
    ('a.jsonl', b'{"text": "a"}\n{"text": \n', r'a\.jsonl:2: not JSON'),
    ('a.json', b'[{"text": "a"},\n {"text" "b"}]', r'a\.json:2: not JSON'),
    ('a.jsonl', b'{"text": "a"}\n3\n', r"a\.jsonl:2: '3' is no object"),
    ('a.json', b'[{"text": "a"}, "b"]', r"a\.json\[1\]: 'b' is no object"),
    ('a.jsonl', b'\xff\xfe\x00', r'a\.jsonl: not UTF-8'),
    ('a.jsonl.gz', b'text', r'a\.jsonl\.gz: not a whole gzip file'),
    (
      'a.jsonl.gz',
      gzip.compress(LINES.encode(), mtime=0)[:-9],
      r'a\.jsonl\.gz: not a whole gzip file',
    ),
    ('a.jsonl', b'\n', r'a\.jsonl is empty'),
    ('a.json', b'[]', r'a\.json is empty'),
    ('a.csv', b'', r"a\.csv': expected a file that ends in \.jsonl"),
    ('a.parquet', b'PAR1', r'a\.parquet: not a Parquet file'),
  ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, data, words):
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(ValueError, match=words):
    rows.read(str(path))


def test_a_missing_file_names_near_ones(tmp_path):
  (tmp_path / 'train.jsonl').write_text(LINES)
  with pytest.raises(FileNotFoundError, match=r'beside it: train\.jsonl'):
    rows.read(str(tmp_path / 'tran.jsonl'))


@pytest.mark.parametrize(
  'bad, words',
  [
    (
      {'question': 'a'},
      r"needs 'messages', .* this one has 'question'.*fields",
    ),
    ({'prompt': 'a'}, r"this one has 'prompt'"),
    ({'prompt': 'a', 'completion': 3}, r'completion=3: expected a string'),
    ({'text': None}, r'text=None: expected a string'),
    ({'messages': 'hi'}, r"messages='hi': expected a list of"),
    ({'messages': []}, r'messages=.*: expected a list'),
    ({'messages': [{'role': 'user'}]}, r'expected a list of .*both strings'),
  ],
)
def test_a_row_that_says_nothing_is_named(bad, words):
  with pytest.raises(ValueError, match='a.jsonl:3: .*' + words):
    _ = Row(bad, 'a.jsonl:3').form


def test_questions_and_answers():
  turns = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': ' b '},
  ]
  assert Row({'messages': turns}).answer == 'b'
  assert Row({'messages': turns}).question == 'a'
  assert Row({'messages': turns[:1]}).answer is None
  assert Row({'messages': turns[:1]}).question == 'a'
  assert Row({'text': ' a'}).answer is None
  row = Row({'prompt': 'a', 'completion': '3 '})
  assert (row.score(' 3'), row.score('4')) == (1, 0)
  judged = Row(row.values, judge=lambda answer: 0.5)
  assert judged.score('3') == 0.5


def test_the_judge_is_the_tasks_own(monkeypatch):
  tiny.use_sums(monkeypatch)
  found = rows.of_task('sums', 6, 0, {})
  row = found[3]
  assert (row.question, row.answer) == ('3+0=', '3')
  assert row.score('3') == 1
  assert row.score('4') == 0.01


def test_a_task_that_is_too_small_or_has_no_answers_is_refused(monkeypatch):
  tiny.use_sums(monkeypatch)
  words = 'has 20 distinct questions among 60.* ask for 30'
  with pytest.raises(ValueError, match=words):
    rows.of_task('sums', 30, 0, {'distinct': 20})
  monkeypatch.setattr(
    tiny.Sums, '__getitem__', lambda _, i: {'question': f'{i}', 'answer': None}
  )
  with pytest.raises(ValueError, match=r'sums\[0\] gives no answer'):
    rows.of_task('sums', 3, 0, {})
