"""From a row to token ids, and which of them are learned.

Learned are completions: every assistant turn of a chat with the token that ends
it, the completion of a prompt, all of a plain text. What a model will be given
when it generates is tokenized the way it will be given.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jinja2
import numpy as np

from qdora_jax.interop import template
from qdora_jax.rows import Row

Chat = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Format:
  """How rows become text.

  Attributes:
    template: 'chat' puts a prompt and its completion into the model's chat
      template, 'plain' joins them as they are.
    system: the system message of a chat; '' leaves it to the template.
    instruction: stands in a line of its own after each prompt.
  """

  template: Literal['chat', 'plain'] = 'chat'
  system: str = ''
  instruction: str = ''


# The model's own chat template, and nothing else.
CHAT = Format()


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """Token ids i32 [L], and bool [L]: is this token learned?"""

  tokens: np.ndarray
  learned: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)


def encode(
  tokenizer: Any, row: Row | Mapping[str, Any], form: Format = CHAT
) -> Example:
  """A row as token ids.

  BOS stands once: where the chat template writes it, or in front of plain text
  if the tokenizer puts it there. Every completion ends in its end-of-turn token
  (EOS where the template has none), which is learned too.

  Args:
    tokenizer: a transformers fast tokenizer.
    row: a Row, or a mapping with one of `rows.FORMS`.
    form: how it becomes text.

  Raises:
    ValueError: with the row's place, if it has no completion to learn, or the
      chat template cannot say it.
  """
  row = row if isinstance(row, Row) else Row(row)
  chat = whole(row, form)
  if chat is not None:
    said = [turn['content'] for turn in chat if turn['role'] == 'assistant']
  else:
    said = [row.values[row.form[-1]]]
  if not ''.join(said).strip():
    roles = ', '.join(turn['role'] for turn in chat or ())
    raise ValueError(
      f'{row.place}: there is no completion token to learn; expected an answer '
      'that is not empty'
      + (f", by the role 'assistant'; its roles are {roles}" if roles else '')
    )
  if chat is not None:
    segments, first = _turns(tokenizer, chat, row.place), []
  else:
    asked = [(_ask(row, form), False)] if row.form != ('text',) else []
    segments, first = [*asked, (said[0], True)], bos(tokenizer)
  tokens, learned = list(first), [False] * len(first)
  for ids, learn in _tokenize(tokenizer, segments):
    tokens += ids
    learned += _learned(tokenizer, ids) if learn else [False] * len(ids)
  # What follows the last completion is never seen by one.
  last = max(n for n, learn in enumerate(learned) if learn) + 1
  tokens, learned = tokens[:last], learned[:last]
  if tokens[-1] not in (*tokenizer.all_special_ids, tokenizer.eos_token_id):
    tokens.append(tokenizer.eos_token_id)
    learned.append(True)
  return Example(np.array(tokens, np.int32), np.array(learned, bool))


def whole(row: Row, form: Format) -> Chat | None:
  """A row as a chat, answers included; None if it is plain text."""
  if row.form == ('messages',):
    turns = [dict(turn) for turn in row.values['messages']]
    if form.system and turns[0]['role'] != 'system':
      turns.insert(0, {'role': 'system', 'content': form.system})
    return turns
  if row.form == ('text',) or form.template == 'plain':
    return None
  answer = {'role': 'assistant', 'content': row.values['completion']}
  return [*opening(_ask(row, form), form), answer]


def opening(prompt: str, form: Format) -> Chat:
  """A chat that begins with a prompt."""
  system = [{'role': 'system', 'content': form.system}] if form.system else []
  return [*system, {'role': 'user', 'content': prompt}]


def _ask(row: Row, form: Format) -> str:
  prompt = row.values['prompt']
  return f'{prompt}\n{form.instruction}' if form.instruction else prompt


def question_ids(
  tokenizer: Any, row: Row, form: Format, shots: Sequence[Row] = ()
) -> list[int]:
  """Token ids that ask a row's question, answered ones before it.

  Args:
    tokenizer: a transformers fast tokenizer.
    row: one with an answer.
    form: as for `encode`.
    shots: rows shown with their answers.
  """
  chat = whole(row, form)
  if chat is None:
    solved = [
      f'{_ask(shot, form)}{shot.values["completion"]}\n\n' for shot in shots
    ]
    text = ''.join([*solved, _ask(row, form)])
    return bos(tokenizer) + _ids(tokenizer, text)
  *asked, _ = chat
  system = [turn for turn in asked[:1] if turn['role'] == 'system']
  before = []
  for shot in shots:
    before += [t for t in whole(shot, form) if t['role'] != 'system']
  return prompt_ids(tokenizer, [*system, *before, *asked[len(system) :]])


def prompt_ids(tokenizer: Any, chat: Chat) -> list[int]:
  """Token ids of a chat, up to where the assistant starts to speak."""
  return _ids(tokenizer, _render(tokenizer, chat, True, 'the prompt'))


def bos(tokenizer: Any) -> list[int]:
  """What the tokenizer puts in front of plain text: [BOS] or nothing."""
  first = tokenizer.encode('')[:1]
  return first if first == [tokenizer.bos_token_id] else []


def _ids(tokenizer: Any, text: str) -> list[int]:
  return tokenizer.encode(text, add_special_tokens=False)


def _render(tokenizer: Any, chat: Chat, ask: bool, place: str) -> str:
  if isinstance(tokenizer.chat_template, str):
    template.check(tokenizer.chat_template, tokenizer.name_or_path)
  try:
    return tokenizer.apply_chat_template(
      chat, tokenize=False, add_generation_prompt=ask
    )
  except jinja2.TemplateError as error:
    roles = ', '.join(turn['role'] for turn in chat)
    raise ValueError(
      f"{place}: the model's chat template refuses these turns ({roles}): "
      f'{error}'
    ) from error
  except ValueError as error:
    if tokenizer.chat_template is not None:
      raise
    raise ValueError(
      "the model's tokenizer has no chat template; set "
      "config.data.template='plain', or choose an instruction-tuned model"
    ) from error


def _turns(tokenizer: Any, chat: Chat, place: str) -> list[tuple[str, bool]]:
  """(text, learned) parts of a chat: each answer apart from what asks it."""
  parts, done = [], ''
  for n, turn in enumerate(chat):
    if turn['role'] != 'assistant':
      continue
    before = _render(tokenizer, chat[:n], True, place)
    after = _render(tokenizer, chat[: n + 1], False, place)
    if not (before.startswith(done) and after.startswith(before)):
      raise ValueError(
        f"{place}: the model's chat template rewrites what was said before "
        f'turn {n}, so that its answer cannot be told apart; expected a '
        'template that only adds turns'
      )
    parts += [(before[len(done) :], False), (after[len(before) :], True)]
    done = after
  return parts


def _tokenize(
  tokenizer: Any, parts: list[tuple[str, bool]]
) -> list[tuple[list[int], bool]]:
  """Ids of each part: cut out of the whole, or made part by part.

  A generating model sees the parts up to an answer tokenized by themselves. The
  whole is taken if it starts with the same ids at every seam; else (a token
  reaches over a seam) every part stands for itself.
  """
  ids = _ids(tokenizer, ''.join(text for text, _ in parts))
  cuts, text = [0], ''
  for part, _ in parts[:-1]:
    text += part
    start = _ids(tokenizer, text)
    if ids[: len(start)] != start:
      return [(_ids(tokenizer, part), learn) for part, learn in parts]
    cuts.append(len(start))
  cuts.append(len(ids))
  return [
    (ids[a:b], learn)
    for a, b, (_, learn) in zip(cuts, cuts[1:], parts, strict=False)
  ]


def _learned(tokenizer: Any, ids: list[int]) -> list[bool]:
  """All of an answer up to its end-of-turn token, and not the space behind."""
  special = set(tokenizer.all_special_ids)
  ends = [n for n, token in enumerate(ids) if token in special]
  last = ends[-1] if ends else len(ids) - 1
  return [n <= last for n in range(len(ids))]
