"""Benchmarks are posed and scored as those posed them who published figures."""

import gzip
import json
import re

import pytest
import tiny

from qdora_jax import chat, prompts, rows, tasks
from qdora_jax.prompts import Format
from qdora_jax.rows import Row

DATA = tiny.DATA
SAMPLES = DATA / 'commonsense' / 'llm_adapters_samples.jsonl'
TESTS = {
  'boolq': 'val',
  'piqa': 'val',
  'siqa': 'val',
  'winogrande': 'val',
  'arc_easy': 'test',
  'arc_challenge': 'test',
  'openbookqa': 'test',
  'hellaswag': 'val',
}


def commonsense(name: str) -> list[Row]:
  file = DATA / 'commonsense' / name / f'{TESTS[name]}.jsonl.gz'
  return rows.read(f'{name}:{file}')


@tiny.needs_data
def test_prompts_are_the_papers_record_by_record():
  """35 records of LLM-Adapters' own test files."""
  samples = [json.loads(line) for line in SAMPLES.read_text().splitlines()]
  assert len(samples) == 35
  every = tasks.find('commonsense')
  for sample in samples:
    (row,) = every.rows(sample)
    assert row['prompt'] == sample['instruction']
    assert every.score(row, f'It is {sample["answer"]}') == 1
    assert every.score(row, 'none of these') == 0
  for task in {sample['task'] for sample in samples}:
    ours = commonsense(task)
    for sample in samples:
      if sample['task'] == task:
        row = ours[sample['index']]
        assert row.values['prompt'] == sample['instruction'], row.place
        assert row.values['completion'] == sample['output']
        assert row.values['answer'] == sample['answer']
        assert row.score(sample['output']) == 1
    # The same record as the hub's file has it is the same row.
    (again,) = tasks.find(task).rows(sample)
    assert again['prompt'] == sample['instruction']


@tiny.needs_data
@pytest.mark.parametrize(
  'name, count',
  [
    ('boolq', 3270),
    ('piqa', 1838),
    ('siqa', 1954),
    ('winogrande', 1267),
    ('arc_easy', 2376),
    ('arc_challenge', 1172),
    ('openbookqa', 500),
    ('hellaswag', 10042),
  ],
)
def test_the_papers_test_sets(name, count):
  """Sizes of the DoRA paper's; each answer is among those its prompt names."""
  found = commonsense(name)
  assert len(found) == count
  for row in found:
    values = row.values
    form = values['prompt'].rpartition('Answer format: ')[2].split('/')
    assert form[values['label']] == values['answer'] or name == 'boolq'
    assert values['answer'] in form
    assert len(values['choices']) == len(form)
    assert row.score(f'So {values["completion"]}, I think') == 1


HUB = {
  # Records as the hub's data sets have them, and the choice that is right.
  'boolq': ({'question': 'is it', 'passage': 'It is.', 'answer': True}, 'true'),
  'piqa': ({'goal': 'g', 'sol1': 'a', 'sol2': 'b', 'label': 1}, 'solution2'),
  'siqa': (
    {
      'context': 'c.',
      'question': 'q?',
      'answerA': 'x',
      'answerB': 'y',
      'answerC': 'z',
      'label': '3',
    },
    'answer3',
  ),
  'hellaswag': (
    {
      'activity_label': 'Skiing',
      'ctx': 'A [x] man. he',
      'ctx_a': 'A [x] man.',
      'ctx_b': 'he',
      'endings': ['s', 't', 'u', 'v'],
      'label': '2',
    },
    'ending3',
  ),
  'winogrande': (
    {'sentence': 'a _ b', 'option1': 'x', 'option2': 'y', 'answer': '2'},
    'option2',
  ),
  'arc_easy': (
    {
      'question': 'q',
      'choices': {'text': ['a', 'b', 'c'], 'label': ['1', '2', '3']},
      'answerKey': '2',
    },
    'answer2',
  ),
  'openbookqa': (
    {
      'question_stem': 'q',
      'choices': {'text': ['a', 'b', 'c', 'd'], 'label': ['A', 'B', 'C', 'D']},
      'answerKey': 'D',
    },
    'answer4',
  ),
}


@pytest.mark.parametrize('name', HUB)
def test_records_as_the_hub_has_them(name):
  record, answer = HUB[name]
  (row,) = tasks.find(name).rows(record)
  assert row['completion'] == f'the correct answer is {answer}'
  assert tasks.find(name).score(row, row['completion']) == 1
  if name == 'hellaswag':
    assert row['prompt'] == (
      'Please choose the correct ending to complete the given sentence: '
      'Skiing: A [x] man. he\n\nEnding1: s Ending2: t Ending3: u Ending4: v\n\n'
      'Answer format: ending1/ending2/ending3/ending4'
    )
    assert row['context'] == 'Skiing: A man. He'
  if name == 'winogrande':
    assert row['context'] == ['a x', 'a y']
    assert row['choices'] == [' b', ' b']


@pytest.mark.parametrize(
  'answer, formed, right',
  [
    ('the correct answer is answer2', 1, 1),
    # The first that is named counts.
    ('answer2, not answer1', 1, 1),
    ('answer1, not answer2', 1, 0),
    # Lower case alone is looked for.
    ('Answer2', 0, 0),
    ('', 0, 0),
    ('answer9', 0, 0),
    # In the last response alone, if the model goes on to another.
    ('answer1\n\n### Response:\nanswer2', 1, 1),
    ('answer2\n\n### Response:\nanswer1', 1, 0),
    ('answer2\n\n### Response:\n', 0, 0),
  ],
)
def test_the_answer_is_the_first_word_of_its_form(answer, formed, right):
  values = {'answer': 'answer2', 'completion': 'the correct answer is answer2'}
  siqa = tasks.find('siqa')
  assert siqa.score(values, answer) == right
  assert bool(re.fullmatch(siqa.pattern, answer)) == formed


@pytest.mark.parametrize(
  'text, number',
  [
    ('#### 1,234', 1234),
    ('She pays $5. In all: -3.50.', -3.5),
    ('3 apples #### 4\nand 5', 5),
    ('#### 72.', 72),
    ('none', None),
    ('7 ####', None),
  ],
)
def test_the_number_that_is_an_answer(text, number):
  assert tasks.number(text) == number


def test_orca_math_as_it_is_asked_and_judged_there():
  record = {'question': 'How much?', 'answer': 'In all 3 x $2.50 = $7.50.'}
  (values,) = tasks.find('orca_math').rows(record)
  assert values['prompt'] == '###Question:\nHow much?\n###Answer:\n'
  for answer, right in (
    ('So $7.50', 1),
    ('So 7.50', 0),
    ('$7.50 for 3', 0),
    ('$7.5', 0),
    ('none', 0),
  ):
    assert tasks.find('orca_math').score(values, answer) == right
  ratio = {'completion': 'as 3:4'}
  assert tasks.find('orca_math').score(ratio, '6:8, that is 3:4.') == 1
  assert tasks.find('orca_math').score(ratio, '1:4') == 0
  nothing = {'completion': 'no number'}
  assert tasks.find('orca_math').score(nothing, 'none') == 0


@tiny.needs_data
def test_gsm8k():
  found = rows.read(f'gsm8k:{DATA / "gsm8k" / "test.jsonl"}')
  assert len(found) == 1319
  assert '<<' not in found[0].values['completion']
  assert found[0].score('She has 9 and makes $18.00 a day.') == 1
  assert found[0].score('#### 17') == 0
  for row in found:
    assert row.score(row.values['completion']) == 1
    answer = row.values['completion'].rpartition('#### ')[2]
    assert tasks.number(answer) == float(answer.replace(',', ''))


@tiny.needs_data
def test_e2e_has_several_references_for_one_input():
  found = rows.read(f'e2e:{DATA / "e2e_nlg" / "test.txt"}')
  assert len(found) == 4693
  groups = tasks.grouped([row.values for row in found])
  # 630 inputs: Dusek et al. 2020, table 1.
  assert len(groups) == 630
  assert sum(len(group['references']) for group in groups) == 4693
  assert groups[0]['references'][1] == (
    'Blue Spice is a coffee shop in city centre .'
  )


@tiny.needs_data
def test_guanaco_is_a_conversation():
  file = DATA / 'oasst1_guanaco_subset' / 'oa_questions.jsonl'
  found = rows.read(f'guanaco:{file}')
  first = json.loads(file.read_text().splitlines()[0])
  text = ''.join(t for t, _ in prompts.said(found[0], Format('guanaco')))
  assert text.replace(' ', '') == (first['input'] + first['output']).replace(
    ' ', ''
  )
  assert {row.values['messages'][-1]['role'] for row in found} == {'assistant'}


def test_the_papers_prompts_for_base_models():
  row = Row({'prompt': 'Say one.', 'completion': 'one'})
  blank = ' ' * 16
  head = (
    'Below is an instruction that describes a task. Write a response that '
    'appropriately completes the request.'
  )
  learned = (
    f'{head}  \n\n{blank}### Instruction:\n{blank}Say one.\n{blank}\n'
    f'{blank}### Response:\n{blank}'
  )
  asked = (
    f'{head} \n\n{blank}### Instruction:\n{blank}Say one.\n\n'
    f'{blank}### Response:\n{blank}'
  )
  form = Format('llm_adapters')
  assert prompts.said(row, form) == [(learned, False), ('one', True)]
  assert prompts.asked(row, form) == asked
  form = Format('alpaca')
  asked = f'{head}\n\n### Instruction:\nSay one.\n\n### Response:\n'
  assert prompts.asked(row, form) == asked
  assert prompts.said(row, form) == [(asked, False), ('one', True)]
  (given,) = tasks.find('alpaca').rows(
    {'instruction': 'Add.', 'input': '1, 2', 'output': '3'}
  )
  assert prompts.asked(Row(given), form).endswith(
    'completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n'
    '### Response:\n'
  )
  assert given['prompt'] == 'Add.\n\n1, 2'


def test_a_conversation_in_guanacos_form():
  turns = ['hi', 'hello', 'bye', 'farewell']
  roles = ['user', 'assistant'] * 2
  messages = [
    {'role': r, 'content': c} for r, c in zip(roles, turns, strict=True)
  ]
  row, form = Row({'messages': messages}), Format('guanaco')
  tokenizer = tiny.loaded()[2]
  example = chat.encode(tokenizer, row, form)
  text = tokenizer.decode(example.tokens[:-1])
  assert text == (
    '### Human: hi### Assistant: hello### Human: bye### Assistant: farewell'
  )
  assert example.tokens[-1] == tiny.EOS
  learned = tokenizer.decode(example.tokens[example.learned][:-1])
  assert learned == ' hello farewell'
  asked = chat.question_ids(tokenizer, row, form)
  assert tokenizer.decode(asked) == text.removesuffix(' farewell')
  odd = Row({'messages': [{'role': 'system', 'content': 'x'}]}, 'a.jsonl:3')
  with pytest.raises(ValueError, match=r"a\.jsonl:3.*no role 'system'"):
    prompts.said(odd, form)


def test_unknown_tasks_and_records_of_others(tmp_path):
  file = tmp_path / 'a.jsonl.gz'
  with gzip.open(file, 'wt') as out:
    out.write('{"question": "q", "label": 1}\n{"goal": "g"}\n')
  with pytest.raises(ValueError, match="no task 'bolq'; near: boolq"):
    rows.read(f'bolq:{file}')
  with pytest.raises(
    ValueError, match=r'a\.jsonl\.gz:2 is no record of.*boolq'
  ):
    rows.read(f'boolq:{file}')
  with pytest.raises(ValueError, match="'goal'"):
    rows.read(f'boolq:{file}')
  with pytest.raises(FileNotFoundError, match=r'beside it: a\.jsonl\.gz'):
    rows.read(f'boolq:{tmp_path / "b.jsonl.gz"}')
