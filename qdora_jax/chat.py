"""From a row to token ids, and which of them are learned.

Learned are completions: every assistant turn of a chat with the token that ends
it, the completion of a prompt, all of a plain text. What a model will be given
when it generates is tokenized the way it will be given.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qdora_jax import prompts
from qdora_jax.interop import template
from qdora_jax.prompts import Format, Parts
from qdora_jax.rows import Row

Chat = list[dict[str, str]]
# Rows whose chats are rendered at a time.
_ROWS = 64


# The model's own chat template, and nothing else.
CHAT = Format()


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """Token ids i32 [L], and bool [L]: is this token learned?

  `part` is 0 for all of a row; for one turn of a conversation that had to be
  split, 1, 2, ...
  """

  tokens: np.ndarray
  learned: np.ndarray
  part: int = 0

  def __len__(self) -> int:
    return len(self.tokens)

  def all_learned(self) -> 'Example':
    """The same tokens, the prompt's learned like the answer's."""
    return dataclasses.replace(self, learned=np.ones_like(self.learned))


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
    ValueError: with the row's place, if it has no completion to learn, the chat
      template cannot say it, or it takes several examples (`encode_turns`).
  """
  first, *more = encode_turns(tokenizer, row, form)
  if more:
    raise ValueError(
      f'{row.place if isinstance(row, Row) else Row(row).place}: the '
      "model's chat template rewrites earlier turns as a conversation goes on "
      '(it leaves out their reasoning, say), so that no one example holds what '
      f'the model sees at every turn; expected `encode_turns`, which gives '
      f'{1 + len(more)}, one a turn'
    )
  return first


def encode_turns(
  tokenizer: Any, row: Row | Mapping[str, Any], form: Format = CHAT
) -> list[Example]:
  """A row as the one example it is, or as one for each assistant turn.

  Some chat templates rewrite earlier turns as a conversation goes on: Qwen3's
  leaves out their reasoning. What the model sees when it speaks is then another
  text at every turn. So each becomes an example: the conversation up to it, of
  which this turn alone is learned. A row whose template only adds turns is one
  example, as `encode` gives it.

  Args, Raises: as for `encode`.
  """
  row = row if isinstance(row, Row) else Row(row)
  (examples,) = encode_rows(tokenizer, [row], form)
  return examples


def encode_rows(
  tokenizer: Any, some: Iterable[Row], form: Format = CHAT
) -> Iterator[list[Example]]:
  """`encode_turns` of many rows, in less time."""
  some = iter(some)
  while rows := list(itertools.islice(some, _ROWS)):
    chats = [_checked(row, form) for row in rows]
    asked = [
      (row.place, chat, _cuts(chat))
      for row, chat in zip(rows, chats, strict=True)
      if chat is not None
    ]
    with contextlib.closing(_render(tokenizer, asked)) as texts:
      for row, chat in zip(rows, chats, strict=True):
        if chat is None:
          yield [_example(tokenizer, prompts.said(row, form), bos(tokenizer))]
          continue
        every = _turns(chat, texts, row.place)
        split = len(every) > 1
        yield [
          _example(tokenizer, parts, part=split * n)
          for n, parts in enumerate(every, 1)
        ]


def _checked(row: Row, form: Format) -> Chat | None:
  """`whole`, if there is something to learn."""
  chat = whole(row, form)
  if chat is not None:
    said = [turn['content'] for turn in chat if turn['role'] == 'assistant']
  else:
    said = [text for text, learned in prompts.said(row, form) if learned]
  if not ''.join(said).strip():
    roles = ', '.join(turn['role'] for turn in chat or ())
    raise ValueError(
      f'{row.place}: there is no completion token to learn; expected an answer '
      'that is not empty'
      + (f", by the role 'assistant'; its roles are {roles}" if roles else '')
    )
  return chat


def _example(
  tokenizer: Any, parts: Parts, first: Sequence[int] = (), part: int = 0
) -> Example:
  """The example of some text, of which parts are learned."""
  tokens, learned = list(first), [False] * len(first)
  for ids, learn in _tokenize(tokenizer, parts):
    tokens += ids
    learned += _learned(tokenizer, ids) if learn else [False] * len(ids)
  # What follows the last completion is never seen by one.
  last = max(n for n, learn in enumerate(learned) if learn) + 1
  tokens, learned = tokens[:last], learned[:last]
  if tokens[-1] not in (*tokenizer.all_special_ids, tokenizer.eos_token_id):
    tokens.append(tokenizer.eos_token_id)
    learned.append(True)
  return Example(np.array(tokens, np.int32), np.array(learned, bool), part)


def whole(row: Row, form: Format) -> Chat | None:
  """A row as a chat, answers included; None if it is plain text."""
  if row.form == ('messages',) and form.template == 'guanaco':
    return None
  if row.form == ('messages',):
    turns = [dict(turn) for turn in row.values['messages']]
    if form.system and turns[0]['role'] != 'system':
      turns.insert(0, {'role': 'system', 'content': form.system})
    return turns
  if row.form == ('text',) or form.template != 'chat':
    return None
  answer = {'role': 'assistant', 'content': row.values['completion']}
  return [*opening(prompts.prompt(row, form), form), answer]


def opening(prompt: str, form: Format) -> Chat:
  """A chat that begins with a prompt."""
  system = [{'role': 'system', 'content': form.system}] if form.system else []
  return [*system, {'role': 'user', 'content': prompt}]


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
      ''.join(text for text, _ in [*prompts.said(shot, form), ('\n\n', False)])
      for shot in shots
    ]
    text = ''.join([*solved, prompts.asked(row, form)])
    return bos(tokenizer) + _ids(tokenizer, text)
  *asked, _ = chat
  system = [turn for turn in asked[:1] if turn['role'] == 'system']
  before = []
  for shot in shots:
    before += [t for t in whole(shot, form) if t['role'] != 'system']
  return prompt_ids(tokenizer, [*system, *before, *asked[len(system) :]])


def prompt_ids(tokenizer: Any, chat: Chat) -> list[int]:
  """Token ids of a chat, up to where the assistant starts to speak."""
  asked = [('the prompt', chat, [(len(chat), True)])]
  (text,) = _render(tokenizer, asked)
  return _ids(tokenizer, text)


def bos(tokenizer: Any) -> list[int]:
  """What the tokenizer puts in front of plain text: [BOS] or nothing."""
  first = tokenizer.encode('')[:1]
  return first if first == [tokenizer.bos_token_id] else []


def _ids(tokenizer: Any, text: str) -> list[int]:
  # Not verbose: what is longer than a row is counted, and said, by the data.
  return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _render(
  tokenizer: Any, asked: Sequence[tuple[str, Chat, template.Cuts]]
) -> Iterator[str]:
  """The text of each (place, chat, cuts) at each of its cuts."""
  if not asked:
    return
  texts = template.render(
    _template(tokenizer),
    tokenizer.special_tokens_map,
    [(chat, cuts) for _, chat, cuts in asked],
    tokenizer.name_or_path,
  )
  with contextlib.closing(texts):
    for place, chat, cuts in asked:
      for n, _ in cuts:
        try:
          text = next(texts)
        except template.Refused as error:
          roles = ', '.join(turn['role'] for turn in chat[:n])
          raise ValueError(
            f"{place}: the model's chat template refuses these turns ({roles}"
            f'): {error}'
          ) from error
        yield text


def _template(tokenizer: Any) -> str:
  """The chat template that transformers would take."""
  try:
    return tokenizer.get_chat_template()
  except ValueError as error:
    if tokenizer.chat_template is not None:
      raise
    raise ValueError(
      "the model's tokenizer has no chat template; set "
      "config.data.template='plain', or choose an instruction-tuned model"
    ) from error


def _cuts(chat: Chat) -> template.Cuts:
  """Before and after every assistant turn."""
  ends = [n for n, turn in enumerate(chat) if turn['role'] == 'assistant']
  return [cut for n in ends for cut in ((n, True), (n + 1, False))]


def _turns(chat: Chat, texts: Iterator[str], place: str) -> list[Parts]:
  """(text, learned) parts of a chat: each answer apart from what asks it.

  Several such lists if the template rewrites what was said before: for every
  turn the chat as it then is.
  """
  turns: Parts = []
  seen: list[tuple[str, str]] = []
  for n, _ in _cuts(chat)[::2]:
    before, after = next(texts), next(texts)
    if not after.startswith(before):
      raise ValueError(
        f"{place}: the model's chat template rewrites what was said before "
        f'turn {n} once it is answered, so that its answer cannot be told '
        'apart; expected a template that says a question the same way before '
        'and after'
      )
    seen.append((before, after[len(before) :]))
  if not any(answer for _, answer in seen):
    raise ValueError(
      f"{place}: the model's chat template says nothing of the assistant's "
      'turns, so that there is nothing to learn; expected one that does, or '
      "config.data.template='plain'"
    )
  done = ''
  for before, answer in seen:
    if not before.startswith(done):
      # An answer of which the template says nothing is not learned.
      return [[(b, False), (a, True)] for b, a in seen if a]
    turns += [(before[len(done) :], False), (answer, True)]
    done = before + answer
  return [turns]


def _tokenize(tokenizer: Any, parts: Parts) -> list[tuple[list[int], bool]]:
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
