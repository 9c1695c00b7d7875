"""Answers to Vicuna-80 and MT-bench questions, for FastChat's judges.

Questions and answers are FastChat's files (fastchat/llm_judge): a question a
line, {'question_id', 'category', 'turns'}, and an answer a line, which its
gen_judgment reads. Temperatures by category are its own. Questions that the
file of answers has already are not asked again.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qdora_jax import chat, rows
from qdora_jax.benchmark import Subject
from qdora_jax.generate import generate_text
from qdora_jax.rows import Row

# fastchat/llm_judge/common.py, temperature_config; .7 for others.
TEMPERATURES = {
  'writing': 0.7,
  'roleplay': 0.7,
  'extraction': 0.0,
  'math': 0.0,
  'coding': 0.0,
  'reasoning': 0.0,
  'stem': 0.1,
  'humanities': 0.1,
}
OTHER = 0.7


def answer(
  subject: Subject,
  questions: str,
  out: Path,
  model_id: str,
  *,
  max_new_tokens: int = 1024,
  batch_size: int = 8,
  seed: int = 0,
  progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> int:
  """Answers all questions that are not answered yet, turn by turn.

  Args:
    subject: the model.
    questions: a file of them.
    out: file of answers, added to.
    model_id: stands in each answer.
    max_new_tokens: of each turn.
    batch_size: questions answered at once, of one temperature and as many
      turns.
    seed: of what is drawn.
    progress: wraps the iterable over batches.

  Returns:
    How many were answered now.

  Raises:
    ValueError: for a line that is no question, naming it, or answers that are
      no .jsonl file.
  """
  if out.suffix != '.jsonl':
    raise ValueError(f'{out}: expected a name that ends in .jsonl')
  asked = [_checked(row) for row in rows.read(questions)]
  done = set()
  if out.exists():
    done = {row.values['question_id'] for row in rows.read(str(out))}
  groups: dict[tuple[float, int], list[Mapping[str, Any]]] = {}
  for question in asked:
    if question['question_id'] not in done:
      key = temperature(question), len(question['turns'])
      groups.setdefault(key, []).append(question)
  parts = [
    (heat, group[start : start + batch_size])
    for (heat, _), group in groups.items()
    for start in range(0, len(group), batch_size)
  ]
  out.parent.mkdir(parents=True, exist_ok=True)
  for heat, part in progress(parts):
    said = _turns(subject, part, heat, max_new_tokens, seed)
    with out.open('a') as file:
      for question, turns in zip(part, said, strict=True):
        line = {
          'question_id': question['question_id'],
          'answer_id': uuid.uuid4().hex[:22],
          'model_id': model_id,
          'choices': [{'index': 0, 'turns': turns}],
          'tstamp': time.time(),
        }
        file.write(json.dumps(line, ensure_ascii=False) + '\n')
  return sum(len(part) for _, part in parts)


def temperature(question: Mapping[str, Any]) -> float:
  """At which FastChat has a question answered."""
  if 'required_temperature' in question:
    return question['required_temperature']
  category = question['category'] if 'category' in question else ''
  return TEMPERATURES[category] if category in TEMPERATURES else OTHER


def _checked(row: Row) -> Mapping[str, Any]:
  values = row.values
  turns = values['turns'] if 'turns' in values else None
  number = values['question_id'] if 'question_id' in values else None
  texts = isinstance(turns, list) and all(isinstance(t, str) for t in turns)
  if not isinstance(number, int) or not texts or not turns:
    raise ValueError(
      f"{row.place} is no question of FastChat's: expected 'question_id', a "
      "number, and 'turns', a list of texts; it has "
      + (', '.join(f'{k}={str(v)[:40]!r}' for k, v in values.items()))
    )
  return values


def _turns(
  subject: Subject,
  part: Sequence[Mapping[str, Any]],
  heat: float,
  max_new_tokens: int,
  seed: int,
) -> list[list[str]]:
  """What is said to each turn of each question."""
  chats: list[list[dict[str, str]]] = [[] for _ in part]
  said: list[list[str]] = [[] for _ in part]
  key = jax.random.fold_in(jax.random.key(seed), part[0]['question_id'])
  for n in range(len(part[0]['turns'])):
    for question, turns in zip(part, chats, strict=True):
      turns.append({'role': 'user', 'content': question['turns'][n]})
    # The answer to come is what question_ids leaves out.
    prompts = [
      chat.question_ids(
        subject.tokenizer,
        Row({'messages': [*turns, {'role': 'assistant', 'content': ''}]}),
        subject.form,
      )
      for turns in chats
    ]
    texts = generate_text(
      subject.model,
      subject.params,
      subject.tokenizer,
      prompts,
      max_new_tokens,
      # QLoRA's models go on to ask what they are asked.
      stop_strings=['### Human:'],
      temperature=heat,
      key=jax.random.fold_in(key, n),
    )
    for text, turns, answers in zip(texts, chats, said, strict=True):
      answers.append(text.strip())
      turns.append({'role': 'assistant', 'content': text.strip()})
  return said
