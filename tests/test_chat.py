"""Rows as tokens: what is learned, BOS once, the end of every answer."""

import os

import numpy as np
import pytest
import tiny
import tokenizers
import transformers

from qdora_jax import chat
from qdora_jax.chat import Format
from qdora_jax.rows import Row

# The templates of some families, as their checkpoints write them.
CHATML = (
  "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe.<|im_end|>\n"
  '{% endif %}{% for m in messages %}'
  "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
  '{% endif %}'
)
LLAMA2 = (
  "{% for m in messages %}{% if m['role'] == 'user' %}"
  "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
  "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Says nothing at the end of a turn.
ENDLESS = (
  "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
)
# Takes back what was said before the last turn.
FORGETFUL = (
  "{% for m in messages %}{{ m['content'] if loop.last else '-' }};{% endfor %}"
)
# Leaves out the reasoning of earlier turns, as Qwen3's template does.
THINKS = (
  '{% set ns = namespace(last=0) %}{% for m in messages %}'
  "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
  '{% endfor %}{% for m in messages %}'
  "{{ '<|im_start|>' + m['role'] + '\n' }}"
  "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
  "{{ '<think>\n' + m['reasoning_content']|default('') + '\n</think>\n' }}"
  "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Does not say what was answered.
SILENT = (
  "{% for m in messages if m['role'] == 'user' %}{{ m.content }}{% endfor %}"
)
STRICT = "{{ raise_exception('no system role here') }}"


def tokenizer(template=None, bos=False):
  """Byte-level, with merges over ' b' and 'ab', as real ones have."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  special = ['<s>', '</s>', '<|im_start|>', '<|im_end|>']
  words = [*special, *alphabet, 'Ġb', 'ab', 'ĊĊ']
  model = tokenizers.models.BPE(
    vocab={word: n for n, word in enumerate(words)},
    merges=[('Ġ', 'b'), ('a', 'b'), ('Ċ', 'Ċ')],
  )
  raw = tokenizers.Tokenizer(model)
  raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  raw.decoder = tokenizers.decoders.ByteLevel()
  raw.add_special_tokens(special)
  if bos:
    raw.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)]
    )
  end = '<|im_end|>' if template == CHATML else '</s>'
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw,
    bos_token='<s>',
    eos_token=end,
    extra_special_tokens=special[2:],
    chat_template=template,
  )


def learned(tok, example):
  """The text, with what is learned in brackets."""
  text, inside = '', False
  for token, learn in zip(example.tokens, example.learned, strict=True):
    if learn != inside:
      text, inside = text + ('[' if learn else ']'), bool(learn)
    text += tok.decode([token])
  return text + (']' if inside else '')


TURNS = {
  'messages': [
    {'role': 'user', 'content': 'hi'},
    {'role': 'assistant', 'content': 'yes'},
    {'role': 'user', 'content': 'so'},
    {'role': 'assistant', 'content': 'no'},
    {'role': 'user', 'content': 'bye'},
  ]
}


@pytest.mark.parametrize(
  'template, want',
  [
    (
      CHATML,
      '<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n'
      '<|im_start|>assistant\n[yes<|im_end|>]\n<|im_start|>user\nso<|im_end|>\n'
      '<|im_start|>assistant\n[no<|im_end|>]',
    ),
    (LLAMA2, '<s>[INST] hi [/INST][ yes </s>]<s>[INST] so [/INST][ no </s>]'),
    (ENDLESS, 'user:hi[assistant:yes]user:so[assistant:no</s>]'),
  ],
  ids=['chatml', 'llama 2', 'endless'],
)
def test_every_assistant_turn_is_learned_with_its_end(template, want):
  # A tokenizer that would put BOS in front: the template alone decides.
  tok = tokenizer(template, bos=True)
  assert learned(tok, chat.encode(tok, TURNS)) == want


def test_a_prompt_and_its_completion_are_a_chat():
  tok = tokenizer(CHATML)
  row = {'prompt': 'hi', 'completion': 'yes'}
  want = '<|im_start|>assistant\n[yes<|im_end|>]'
  assert learned(tok, chat.encode(tok, row)).endswith(want)
  form = Format(system='Sit.', instruction='Now.')
  text = learned(tok, chat.encode(tok, row, form))
  assert text == (
    '<|im_start|>system\nSit.<|im_end|>\n<|im_start|>user\nhi\nNow.<|im_end|>\n'
    '<|im_start|>assistant\n[yes<|im_end|>]'
  )


def test_a_system_message_is_put_before_messages_that_have_none():
  tok = tokenizer(CHATML)
  text = learned(tok, chat.encode(tok, TURNS, Format(system='Sit.')))
  assert text.startswith('<|im_start|>system\nSit.<|im_end|>\n<|im_start|>user')
  own = {
    'messages': [{'role': 'system', 'content': 'Mine'}, *TURNS['messages']]
  }
  text = learned(tok, chat.encode(tok, own, Format(system='Sit.')))
  assert 'Mine' in text and 'Sit.' not in text


@pytest.mark.parametrize('bos', [False, True])
def test_plain_text_begins_with_bos_once_if_the_tokenizer_has_it(bos):
  tok, first = tokenizer(bos=bos), '<s>' if bos else ''
  plain = Format('plain')
  row = {'prompt': 'abc|', 'completion': 'd'}
  assert learned(tok, chat.encode(tok, row, plain)) == f'{first}abc|[d</s>]'
  text = learned(tok, chat.encode(tok, {'text': 'abc'}))
  # All of a text is learned; its first token is predicted from BOS or not.
  assert text == f'{first}[abc</s>]'


@pytest.mark.parametrize(
  'prompt, completion',
  [('a', 'b'), ('a ', 'b'), ('a', ' b'), ('a\n', '\nb'), ('x', 'é'), ('', 'b')],
)
def test_a_prompt_is_tokenized_as_it_will_be_given(prompt, completion):
  """Though a token of the whole text would reach over the seam."""
  tok = tokenizer()
  row = {'prompt': prompt, 'completion': completion}
  form = Format('plain')
  example = chat.encode(tok, row, form)
  start = chat.question_ids(tok, Row(row), form)
  assert example.tokens[: len(start)].tolist() == start
  assert example.learned.tolist() == [
    n >= len(start) for n in range(len(example))
  ]
  assert tok.decode(example.tokens) == prompt + completion + '</s>'


def test_questions_are_asked_as_they_are_learned():
  tok = tokenizer(CHATML)
  row = Row({'prompt': 'hi', 'completion': 'yes'})
  example = chat.encode(tok, row)
  ids = chat.question_ids(tok, row, chat.CHAT)
  assert example.tokens[: len(ids)].tolist() == ids
  assert example.learned.argmax() == len(ids)
  # The last answer of a conversation is asked for, those before it are given.
  turns = Row({'messages': TURNS['messages'][:4]})
  ids = chat.question_ids(tok, turns, chat.CHAT)
  example = chat.encode(tok, turns)
  assert example.tokens[: len(ids)].tolist() == ids
  assert example.learned[len(ids) :].all()


def test_solved_rows_stand_before_a_question():
  tok = tokenizer(CHATML)
  row, shot = (Row({'prompt': p, 'completion': p * 2}) for p in 'xy')
  form = Format(system='Sit.')
  text = tok.decode(chat.question_ids(tok, row, form, [shot]))
  assert text == (
    '<|im_start|>system\nSit.<|im_end|>\n<|im_start|>user\ny<|im_end|>\n'
    '<|im_start|>assistant\nyy<|im_end|>\n<|im_start|>user\nx<|im_end|>\n'
    '<|im_start|>assistant\n'
  )
  plain = tok.decode(chat.question_ids(tok, row, Format('plain'), [shot]))
  assert plain == 'yyy\n\nx'


def test_a_row_without_a_completion_is_named():
  tok = tokenizer(CHATML)
  for values in (
    {'messages': TURNS['messages'][:1]},
    {
      'messages': [*TURNS['messages'][:1], {'role': 'assistant', 'content': ''}]
    },
    {'prompt': 'hi', 'completion': ' \n'},
    {'text': ''},
  ):
    with pytest.raises(ValueError, match=r'a\.jsonl:7: there is no completion'):
      chat.encode(tok, Row(values, 'a.jsonl:7'))


@pytest.mark.parametrize(
  'template, words',
  [
    (None, r"no chat template; set config\.data\.template='plain'"),
    (SILENT, r"a\.jsonl:7: .* says nothing of the assistant's turns"),
    (THINKS, r'a\.jsonl:7: .* expected `encode_turns`, which gives 2, one a'),
    (FORGETFUL, r'a\.jsonl:7: .* rewrites what was said before turn 1'),
    (STRICT, r'a\.jsonl:7: .* refuses these turns \(user\): no system role'),
  ],
)
def test_what_a_template_cannot_say_is_an_error(template, words):
  with pytest.raises(ValueError, match=words):
    chat.encode(tokenizer(template), Row(TURNS, 'a.jsonl:7'))


REASONED = {
  'messages': [
    {'role': 'user', 'content': 'hi'},
    {'role': 'assistant', 'content': 'yes', 'reasoning_content': 'ab'},
    {'role': 'user', 'content': 'so'},
    {'role': 'assistant', 'content': 'no'},
    {'role': 'assistant', 'content': 'never'},
    {'role': 'user', 'content': 'bye'},
  ]
}


def test_turns_that_are_rewritten_are_learned_one_by_one():
  """What transformers says at each turn, of which the answer is learned."""
  tok = tokenizer(THINKS)
  messages = REASONED['messages']
  examples = chat.encode_turns(tok, REASONED)
  assert [example.part for example in examples] == [1, 2, 3]
  for n, example in zip((1, 3, 4), examples, strict=True):
    whole, asked = (
      tok.apply_chat_template(messages[:end], tokenize=False, **options)
      for end, options in ((n + 1, {}), (n, {'add_generation_prompt': True}))
    )
    answer = whole.removeprefix(asked).removesuffix('\n')
    assert answer.startswith('<think>') and answer.endswith('<|im_end|>')
    assert learned(tok, example) == f'{asked}[{answer}]'
    # And as a model that generates will be given it.
    ids = tok.encode(asked, add_special_tokens=False)
    assert example.tokens[: len(ids)].tolist() == ids
    assert example.learned.argmax() == len(ids)
  assert '<think>\nab\n</think>\nyes' in learned(tok, examples[0])
  assert 'ab' not in tok.decode(examples[1].tokens)


@pytest.mark.parametrize('template', [CHATML, LLAMA2, ENDLESS, THINKS])
def test_turns_that_are_only_added_to_are_one_example(template):
  tok = tokenizer(template)
  for row in (
    {'prompt': 'hi', 'completion': 'yes'},
    {'messages': TURNS['messages'][:2]},
    *([TURNS] if template != THINKS else []),
  ):
    (example,) = chat.encode_turns(tok, row)
    assert example.part == 0
    assert learned(tok, example) == learned(tok, chat.encode(tok, row))


# What a template may ask of its sandbox and of transformers.
LANGUAGE = (
  '{%- set ns = namespace(n=0) -%}{%- macro say(x) -%}<{{ x }}>{%- endmacro -%}'
  "{{ bos_token }}{{ tools is none }}{{ strftime_now('%Y') }}\n"
  '{% for m in messages %}{% if loop.first %}{{ m|tojson }}{% endif %}\n'
  '  {% if loop.index > 4 %}{% break %}{% endif %}\n'
  '{{ say(m.role) }}{{ m.content|trim }}{{ loop.length }}'
  '{{ m.get("reasoning_content", "-") }}{{ "name" in m }}'
  '{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}'
  "{{ dict(a=1)|tojson(indent=1) }}{% generation %}{{ 'é€\ud83d' }}"
  '{% endgeneration %}{% if add_generation_prompt %}{{ eos_token }}{% endif %}'
)


@pytest.mark.parametrize(
  'template', [CHATML, LLAMA2, ENDLESS, THINKS, FORGETFUL, LANGUAGE]
)
def test_a_template_says_what_transformers_lets_it_say(template):
  tok = tokenizer(template)
  messages = [*REASONED['messages'], {'role': 'user', 'content': ' é\u2028" '}]
  messages[0] = {**messages[0], 'name': None}
  cuts = [(n, ask) for n in range(1, 8) for ask in (True, False)]
  got = list(chat._render(tok, [('here', messages, cuts)]))
  assert got == [
    tok.apply_chat_template(
      messages[:n], tokenize=False, add_generation_prompt=ask
    )
    for n, ask in cuts
  ]


def test_many_rows_are_encoded_as_each_by_itself(monkeypatch):
  monkeypatch.setattr(chat, '_ROWS', 3)
  tok = tokenizer(THINKS)
  rows = [
    Row({'prompt': 'hi', 'completion': 'yes'}),
    Row({'text': 'abc'}),
    *(Row(values) for values in (TURNS, REASONED) * 3),
  ]
  every = list(chat.encode_rows(tok, rows))
  assert [len(some) for some in every] == [1, 1, *[2, 3] * 3]
  for row, some in zip(rows, every, strict=True):
    for got, want in zip(some, chat.encode_turns(tok, row), strict=True):
      assert learned(tok, got) == learned(tok, want)


@tiny.needs_data
def test_real_rows_come_back_as_they_were():
  """GSM8K, Alpaca and OpenAssistant: nothing lost, many languages."""
  from qdora_jax import rows

  tok = tokenizer(CHATML)
  for file in sorted(tiny.DATA.glob('*/*')):
    if not file.name.endswith(rows.SUFFIXES) or 'easy_vqa' in file.parts:
      continue
    some = rows.read(os.fspath(file))[:50]
    for row in some:
      fields = [v for v in row.values.values() if isinstance(v, str) and v]
      if len(fields) < 2:
        continue
      values = {'prompt': fields[0], 'completion': fields[1]}
      example = chat.encode(tok, Row(values, row.place))
      text = tok.decode(example.tokens[example.learned])
      assert text == fields[1] + '<|im_end|>'
      assert np.flatnonzero(example.learned)[0] > 0


def test_what_is_learned_is_what_transformers_marks():
  """By its own mask of assistant tokens, of a template that marks them."""
  marked = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
  )
  assert marked != CHATML
  tok = tokenizer(marked)
  theirs = tok.apply_chat_template(
    TURNS['messages'],
    return_dict=True,
    return_assistant_tokens_mask=True,
  )
  example = chat.encode(tok, TURNS)
  length = len(example)
  assert theirs['input_ids'][:length] == example.tokens.tolist()
  assert theirs['assistant_masks'][:length] == example.learned.tolist()
  assert not any(theirs['assistant_masks'][length:])
