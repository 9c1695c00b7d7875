"""Benchmarks: how the records of a data set are posed, and what is right.

A source 'boolq:FILE' (or 'boolq:hub:OWNER/NAME') is FILE read as records of the
task boolq: wherever a config or `qdora evaluate` takes a file, it takes such a
source. A task turns a record into a row with

  prompt, completion    what is asked, and learned
  context, choices, label    for the likelihood of each choice (where there are
                        any): the choice follows its context, label is the index
                        of the right one
  references            texts that an answer is compared with (data to text)

commonsense.py says how its eight tasks are posed and scored. Numbers (GSM8K):
of what stands after the last '####', or of the whole answer without one, the
last number counts, its commas and a closing point left out; right is what
differs by at most 0.001, as in LLM-Adapters. Orca-Math is posed and scored as
Answer.AI's fsdp_qlora does: the last number, ratio or amount of money, and
right is the same text: '$5' is not '5'.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qdora_jax import commonsense, paths

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
  """A benchmark.

  Attributes:
    rows: values of the rows that a record makes; KeyError for a field it has
      not.
    right: (answer, values of its row) -> is it right? None: exact match.
    pattern: regex of an answer that has the form asked for.
    max_new_tokens: as many as an answer may need.
  """

  rows: Callable[[Record], Iterable[dict[str, Any]]]
  right: Callable[[str, Mapping[str, Any]], bool] | None = None
  pattern: str = r'(?s).+'
  max_new_tokens: int = 64

  def score(self, values: Mapping[str, Any], answer: str) -> float:
    """1 for a right answer to the row of some values."""
    if self.right is None:
      return float(answer.strip() == values['completion'].strip())
    return float(self.right(answer, values))


def find(name: str) -> Task:
  """The task of a name.

  Raises:
    ValueError: for an unknown one, naming the nearest.
  """
  if name not in TASKS:
    near = paths.near(name, TASKS)
    hint = f'; near: {", ".join(near)}' if near else ''
    raise ValueError(
      f'no task {name!r}{hint}; tasks: {", ".join(sorted(TASKS))}'
    )
  return TASKS[name]


def split(source: str) -> tuple[str, str]:
  """('boolq', 'FILE') of 'boolq:FILE'; ('', source) without a task.

  Raises:
    ValueError: for a task that there is not.
  """
  name, colon, rest = source.partition(':')
  if not colon or name == 'hub' or not re.fullmatch(r'\w{2,}', name):
    return '', source
  find(name)
  return name, rest


# --- Commonsense ---


def _choosing(
  pose: Callable[[Record], list[dict[str, Any]]], words: str
) -> Task:
  """A commonsense task; words: regex of its answers."""

  def rows(record: Record) -> list[dict[str, Any]]:
    return (commonsense.published if 'instruction' in record else pose)(record)

  def right(answer: str, values: Mapping[str, Any]) -> bool:
    return commonsense.answered(answer, words) == values['answer']

  return Task(rows, right, commonsense.pattern(words), 32)


# --- Numbers ---

_NUMBER = re.compile(r'-?\d+\.?\d*')


def number(text: str) -> float | None:
  """The number that a text gives as its answer; None if there is none."""
  found = _NUMBER.findall(text.rpartition('####')[2].replace(',', ''))
  return float(found[-1]) if found else None


def _same_number(answer: str, values: Mapping[str, Any]) -> bool:
  got, want = number(answer), number(values['completion'])
  return got is not None and want is not None and abs(got - want) <= 1e-3


def _gsm8k(record: Record) -> list[dict[str, Any]]:
  # What the calculator was asked: <<48/2=24>>.
  steps = re.sub(r'<<[^>]*>>', '', record['answer'])
  return [{'prompt': record['question'], 'completion': steps}]


# fsdp_qlora, experiments/orca_math/eval_utils.py.
_AMOUNT = re.compile(r'[$€£]?\d+(?:\.\d+)?(?::\d+(?:\.\d+)?)?')


def amount(text: str) -> str | None:
  """The last number, ratio or amount of money in a text, or None."""
  found = _AMOUNT.findall(text)
  return found[-1] if found else None


def _same_amount(answer: str, values: Mapping[str, Any]) -> bool:
  got = amount(answer)
  return got is not None and got == amount(values['completion'])


def _orca_math(record: Record) -> list[dict[str, Any]]:
  asked = f'###Question:\n{record["question"]}\n###Answer:\n'
  return [{'prompt': asked, 'completion': record['answer']}]


# --- Instructions and conversations ---


def _alpaca(record: Record) -> list[dict[str, Any]]:
  given = record['input'] if 'input' in record else ''
  ask = record['instruction']
  row = {'prompt': ask, 'completion': record['output']}
  if given:
    # The template 'alpaca' keeps them apart.
    row |= {'prompt': f'{ask}\n\n{given}', 'asked': ask, 'given': given}
  return [row]


_TURN = re.compile(r'### (Human|Assistant):')


def _guanaco(record: Record) -> list[dict[str, Any]]:
  """A conversation in the form '### Human: ...### Assistant: ...'."""
  if 'output' in record:
    text = f'{record["input"]} {record["output"]}'
  else:
    text = record['text']
  _, *parts = _TURN.split(text)
  turns = [
    {'role': 'user' if who == 'Human' else 'assistant', 'content': said.strip()}
    for who, said in zip(parts[::2], parts[1::2], strict=True)
  ]
  return [{'messages': turns}]


# --- Data to text ---


def _e2e(record: Record) -> list[dict[str, Any]]:
  """Lines 'name : Blue Spice | area : riverside||A sentence .' of a text."""
  found = []
  for line in record['text'].splitlines():
    fields, bars, sentence = line.partition('||')
    if bars:
      found.append({'prompt': fields.strip(), 'completion': sentence.strip()})
  return found


def grouped(some: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Rows of one prompt as one row with all their completions as references."""
  groups: dict[str, dict[str, Any]] = {}
  for values in some:
    group = groups.setdefault(values['prompt'], {**values, 'references': []})
    group['references'].append(values['completion'])
  return list(groups.values())


# Of rows that are no benchmark's.
PLAIN = Task(lambda record: [dict(record)])
TASKS = {
  'boolq': _choosing(commonsense.boolq, 'true|false'),
  'piqa': _choosing(commonsense.piqa, 'solution1|solution2'),
  'siqa': _choosing(commonsense.answer_choice, 'answer[1-5]'),
  'hellaswag': _choosing(commonsense.hellaswag, 'ending[1-4]'),
  'winogrande': _choosing(commonsense.winogrande, 'option1|option2'),
  'arc_easy': _choosing(commonsense.answer_choice, 'answer[1-5]'),
  'arc_challenge': _choosing(commonsense.answer_choice, 'answer[1-5]'),
  'openbookqa': _choosing(commonsense.openbookqa, 'answer[1-5]'),
  # All eight, as commonsense_170k.json of LLM-Adapters holds them.
  'commonsense': _choosing(
    commonsense.published, 'true|false|(?:solution|option|answer|ending)[1-5]'
  ),
  'gsm8k': Task(_gsm8k, _same_number, r'(?s).*####\s*-?[\d.,]+\s*', 256),
  'orca_math': Task(_orca_math, _same_amount, r'(?s).*\d.*', 512),
  'alpaca': Task(_alpaca, max_new_tokens=256),
  'guanaco': Task(_guanaco, max_new_tokens=256),
  'e2e': Task(_e2e, max_new_tokens=64),
}
