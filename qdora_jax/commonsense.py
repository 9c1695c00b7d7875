"""Eight data sets of commonsense, posed as in the DoRA paper's code base.

The code base took them from LLM-Adapters (Hu et al. 2023, arXiv 2304.01933): an
instruction that ends in the answer's form, and 'the correct answer is option2'
to learn. Scored is the first word of that form in what the model says (after
its last '### Response:', if it says that), upper and lower case told apart:
none is a wrong answer. That code searches with four beams, and so does
experiments/configs/commonsense.py (config.eval.beams=4; `qdora evaluate --beams
4`). Prompts of HellaSwag keep WikiHow's marks ([header], [title]), as there, if
the file has them. Contexts of choices are those of lm-evaluation-harness.
"""

import re
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


def _choices(record: Record) -> list[str]:
  """The choices of a record, in this library's form or the hub's."""
  if 'choices' in record:
    found = record['choices']
    return list(found['text'] if isinstance(found, Mapping) else found)
  if 'endings' in record:
    return list(record['endings'])
  for names in (
    ('sol1', 'sol2'),
    ('option1', 'option2'),
    ('answerA', 'answerB', 'answerC'),
  ):
    if names[0] in record:
      return [record[name] for name in names]
  raise KeyError('choices')


def _label(record: Record) -> int:
  """The index of the right choice."""
  if 'answerKey' in record:
    return list(record['choices']['label']).index(record['answerKey'])
  if 'answerA' in record or 'option1' in record:
    # Social IQa and WinoGrande count from 1.
    key = 'label' if 'answerA' in record else 'answer'
    return int(record[key]) - 1
  if 'answer' in record:
    return int(record['answer'])
  return int(record['label'])


def _stem(record: Record) -> str:
  if 'question_stem' in record:
    return record['question_stem']
  return record['question']


def _row(prompt: str, answer: str, **values: Any) -> list[dict[str, Any]]:
  completion = f'the correct answer is {answer}'
  return [
    {'prompt': prompt, 'completion': completion, 'answer': answer, **values}
  ]


def _choice(
  record: Record,
  ask: str,
  word: str,
  context: str,
  between: str = ' ',
  end: str = '\n\n',
) -> list[dict[str, Any]]:
  """The question, its options by number ('Answer2: ...'), the answer's form."""
  options, label = _choices(record), _label(record)
  heads = [f'{word}{n}' for n in range(1, len(options) + 1)]
  listed = between.join(
    f'{head}: {option}' for head, option in zip(heads, options, strict=True)
  )
  form = '/'.join(head.lower() for head in heads)
  return _row(
    f'Please choose the correct {ask}\n\n{listed}{end}Answer format: {form}',
    heads[label].lower(),
    context=context,
    choices=[f' {option}' for option in options],
    label=label,
  )


def boolq(record: Record) -> list[dict[str, Any]]:
  question = record['question']
  ask = 'Please answer the following question with true or false, question: '
  context = f'Question: {question}?\nAnswer:'
  if 'passage' in record:
    context = f'{record["passage"]}\n{context}'
  return _row(
    f'{ask}{question}?\n\nAnswer format: true/false',
    ('false', 'true')[_label(record)],
    context=context,
    choices=[' no', ' yes'],
    label=_label(record),
  )


def piqa(record: Record) -> list[dict[str, Any]]:
  goal = record['goal']
  ask = f'solution to the question: {goal}'
  context = f'Question: {goal}\nAnswer:'
  return _choice(record, ask, 'Solution', context, between='\n\n')


def answer_choice(record: Record) -> list[dict[str, Any]]:
  question = _stem(record)
  context = f'Question: {question}\nAnswer:'
  if 'context' in record:
    # Social IQa.
    question = f'{record["context"]} {question}'
    context = f'Q: {question}\nA:'
  ask = f'answer to the question: {question}'
  return _choice(record, ask, 'Answer', context)


def openbookqa(record: Record) -> list[dict[str, Any]]:
  return [{**row, 'context': _stem(record)} for row in answer_choice(record)]


def hellaswag(record: Record) -> list[dict[str, Any]]:
  text = record['ctx']
  if 'activity_label' in record:
    text = f'{record["activity_label"]}: {text}'
  ask = f'ending to complete the given sentence: {text}'
  (row,) = _choice(record, ask, 'Ending', text)
  if 'ctx_a' in record:
    text = f'{record["ctx_a"]} {record["ctx_b"].capitalize()}'
    text = f'{record["activity_label"]}: {text}'
  row['context'] = _unmarked(text)
  row['choices'] = [f' {_unmarked(choice)}' for choice in _choices(record)]
  return [row]


def _unmarked(text: str) -> str:
  """Without WikiHow's marks, as the harness reads HellaSwag."""
  text = text.strip().replace(' [title]', '. ')
  return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


def winogrande(record: Record) -> list[dict[str, Any]]:
  sentence = record['sentence']
  ask = (
    f'answer to fill in the blank to complete the given sentence: {sentence}'
  )
  (row,) = _choice(record, ask, 'Option', '', end=' ')
  before, _, after = sentence.partition('_')
  # The options differ in what comes before; the rest is what is likely.
  row['context'] = [before + option for option in _choices(record)]
  row['choices'] = [f' {after.strip()}'] * len(row['context'])
  return [row]


def published(record: Record) -> list[dict[str, Any]]:
  """A record of LLM-Adapters' own files."""
  return [
    {
      'prompt': record['instruction'],
      'completion': record['output'],
      'answer': record['answer'],
    }
  ]


_RESPONSE = '### Response:'


def answered(text: str, words: str) -> str | None:
  """The word that a text gives as its answer; words: regex of them."""
  found = re.search(words, text.rpartition(_RESPONSE)[2])
  return found[0] if found else None


def pattern(words: str) -> str:
  """Regex of answers that have one: no further response follows it."""
  return f'(?s).*({words})(?!.*{_RESPONSE}).*'
