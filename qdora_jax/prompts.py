"""How a row becomes text without a chat template: as papers have posed it.

Base models know no chat template. What they are trained on is the text that the
work which is to be reproduced has trained on, blanks included.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from qdora_jax.rows import Row

Parts = list[tuple[str, bool]]
Template = Literal['chat', 'plain', 'alpaca', 'guanaco', 'llm_adapters']
# The prompts of https://github.com/tatsu-lab/stanford_alpaca, from which
# LLM-Adapters has its own.
_TASK = 'Below is an instruction that describes a task'
_WRITE = 'Write a response that appropriately completes the request.'
# LLM-Adapters' texts are indented as the source code is that makes them; other
# blanks stand before an answer that is learned (finetune.py) than before one
# that is asked for (commonsense_evaluate.py).
_INDENT = ' ' * 16
_LEARNED = f'\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}'
_ASKED = f'\n\n{_INDENT}### Response:\n{_INDENT}'


@dataclasses.dataclass(frozen=True)
class Format:
  """How rows become text.

  Attributes:
    template: 'chat' puts a prompt and its completion into the model's chat
      template, 'plain' joins them as they are. For base models: 'alpaca'
      (Stanford Alpaca's), 'guanaco' (QLoRA's for OpenAssistant), 'llm_adapters'
      (the DoRA paper's for commonsense).
    system: the system message of a chat; '' leaves it to the template.
    instruction: stands in a line of its own after each prompt.
  """

  template: Template = 'chat'
  system: str = ''
  instruction: str = ''


def said(row: Row, form: Format) -> Parts:
  """(text, learned) parts of a row.

  Raises:
    ValueError: for a role that the template does not know.
  """
  if row.form == ('text',):
    return [(row.values['text'], True)]
  if row.form == ('messages',):
    return _guanaco(row, row.values['messages'])
  answer = row.values['completion']
  if form.template == 'guanaco':
    turns = [('user', prompt(row, form)), ('assistant', answer)]
    return _guanaco(row, [{'role': r, 'content': c} for r, c in turns])
  if form.template == 'llm_adapters':
    return [
      (_instruction(prompt(row, form), '  ', _LEARNED), False),
      (answer, True),
    ]
  return [(asked(row, form), False), (answer, True)]


def asked(row: Row, form: Format) -> str:
  """What a row's answer follows."""
  if row.form == ('messages',) or form.template == 'guanaco':
    *before, _ = said(row, form)
    return ''.join(text for text, _ in before)
  if form.template == 'llm_adapters':
    return _instruction(prompt(row, form), ' ', _ASKED)
  if form.template == 'alpaca':
    return _alpaca(row, form)
  return prompt(row, form)


def prompt(row: Row, form: Format) -> str:
  """A row's prompt with the format's instruction behind it."""
  ask = row.values['prompt']
  return f'{ask}\n{form.instruction}' if form.instruction else ask


def _instruction(ask: str, blank: str, end: str) -> str:
  head = f'{_TASK}. {_WRITE}{blank}\n\n{_INDENT}### Instruction:'
  return f'{head}\n{_INDENT}{ask}{end}'


def _alpaca(row: Row, form: Format) -> str:
  if 'given' not in row.values:
    ask = prompt(row, form)
    return f'{_TASK}. {_WRITE}\n\n### Instruction:\n{ask}\n\n### Response:\n'
  ask, given = row.values['asked'], row.values['given']
  return (
    f'{_TASK}, paired with an input that provides further context. {_WRITE}\n\n'
    f'### Instruction:\n{ask}\n\n### Input:\n{given}\n\n### Response:\n'
  )


def _guanaco(row: Row, turns: Sequence[Mapping[str, str]]) -> Parts:
  """https://github.com/artidoro/qlora: one turn behind the other."""
  parts: Parts = []
  for turn in turns:
    role, content = turn['role'], turn['content']
    if role == 'user':
      parts.append((f'### Human: {content}', False))
    elif role == 'assistant':
      parts += [('### Assistant:', False), (f' {content}', True)]
    else:
      raise ValueError(
        f"{row.place}: the template 'guanaco' has no role {role!r}; expected "
        "'user' and 'assistant'"
      )
  return parts
