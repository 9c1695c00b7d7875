"""A GGUF file's vocabulary as a Hugging Face fast tokenizer.

The file holds tokens, merges or scores, token types and, for byte-level BPE,
the *name* of the rule that splits text before the merges apply. The rule itself
is nowhere in the file, so a name is supported here only if its rule is known;
guessing one gives a tokenizer that is right on most words and wrong on numbers.
SentencePiece vocabularies are built by transformers.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from tokenizers.pre_tokenizers import PreTokenizer
  from transformers import PreTrainedTokenizerFast

# ggml docs/gguf.md, tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4
_ROLES = {
  'bos_token': 'tokenizer.ggml.bos_token_id',
  'eos_token': 'tokenizer.ggml.eos_token_id',
  'unk_token': 'tokenizer.ggml.unknown_token_id',
  'pad_token': 'tokenizer.ggml.padding_token_id',
}
# llama.cpp llama-vocab.cpp: names of one rule each. GPT-2's pattern after
# single digits; cl100k's with digits by threes, or one by one; Mistral's.
_DIGITS = ('smollm', 'starcoder', 'refact', 'command-r', 'codeshell', 'minerva')
_LLAMA3 = ('llama3', 'llama-v3', 'llama-bpe', 'dbrx', 'smaug-bpe', 'falcon3')
_QWEN2 = ('qwen2', 'deepseek-r1-qwen')
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_UPPER = r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
_PATTERNS = {
  **dict.fromkeys(_LLAMA3, rf'{_WORDS}|\p{{N}}{{1,3}}{_REST}'),
  **dict.fromkeys(_QWEN2, rf'{_WORDS}|\p{{N}}{_REST}'),
  'tekken': (
    rf'{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}'
    r'| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  ),
}
# Whole tokens are taken before any merge, and a text begins with BOS.
_LLAMA3_OWN = ('llama3', 'llama-v3', 'llama-bpe')


def build(fields: Mapping[str, Any], path: str) -> 'PreTrainedTokenizerFast':
  """The tokenizer described by a GGUF file's metadata.

  Control tokens are matched whole in the text and count as special; beginning-
  and end-of-text tokens are added to a text if the file says so (or says
  nothing, and llama.cpp does); the chat template is the file's.

  Args:
    fields: metadata by key, see `gguf_header.Header`.
    path: the file, for error messages.

  Raises:
    ValueError: the vocabulary is neither byte-level BPE nor SentencePiece, its
      splitting rule is not known, or a key is missing.
  """
  from transformers import PreTrainedTokenizerFast

  model = _need(fields, 'model', path)
  if model == 'gpt2':
    backend = _byte_level(fields, path)
    begins = fields['tokenizer.ggml.pre'] in _LLAMA3_OWN
  elif model == 'llama':
    backend, begins = _sentencepiece(fields, path), True
  else:
    raise ValueError(
      f"{path}: tokenizer.ggml.model is {model!r}, expected 'gpt2' (byte-level "
      "BPE) or 'llama' (SentencePiece). Load the tokenizer of the model's "
      'Hugging Face directory instead'
    )
  tokens = _need(fields, 'tokens', path)
  roles = {r: tokens[fields[k]] for r, k in _ROLES.items() if k in fields}
  _add_whole_tokens(backend, fields, tokens)
  _add_ends(backend, fields, roles, begins)
  if 'tokenizer.chat_template' in fields:
    roles['chat_template'] = fields['tokenizer.chat_template']
  context = f'{fields["general.architecture"]}.context_length'
  if context in fields:
    roles['model_max_length'] = fields[context]
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles
  )


def _need(fields: Mapping[str, Any], name: str, path: str) -> Any:
  key = f'tokenizer.ggml.{name}'
  if key not in fields:
    raise ValueError(
      f'{path}: metadata {key!r} is missing, so its tokenizer is unknown. Load '
      "the tokenizer of the model's Hugging Face directory instead"
    )
  return fields[key]


def _byte_level(fields: Mapping[str, Any], path: str) -> Any:
  import tokenizers

  keys = ('tokens', 'merges', 'pre')
  tokens, merges, rule = (_need(fields, key, path) for key in keys)
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {token: i for i, token in enumerate(tokens)},
      [tuple(merge.split(' ')) for merge in merges],
      ignore_merges=rule in _LLAMA3_OWN,
    )
  )
  backend.pre_tokenizer = _splitter(rule, path)
  backend.decoder = tokenizers.decoders.ByteLevel()
  return backend


def _splitter(rule: str, path: str) -> 'PreTokenizer':
  """The pre-tokenizer that llama.cpp calls `rule`."""
  from tokenizers import Regex, pre_tokenizers

  # use_regex: GPT-2's pattern.
  bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  if rule == 'gpt-2':
    return bytes_
  if rule in _DIGITS:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, bytes_])
  if rule in _PATTERNS:
    split = pre_tokenizers.Split(Regex(_PATTERNS[rule]), 'isolated')
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_])
  known = ', '.join(('gpt-2', *_DIGITS, *_PATTERNS))
  raise ValueError(
    f'{path}: tokenizer.ggml.pre is {rule!r}, expected one of {known}. Load '
    "the tokenizer of the model's Hugging Face directory instead"
  )


def _sentencepiece(fields: Mapping[str, Any], path: str) -> Any:
  """transformers' own reading of a SentencePiece vocabulary."""
  try:
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs
  except ImportError as error:
    raise ValueError(
      f'{path}: reading its SentencePiece vocabulary needs a newer '
      "transformers: pip install -U transformers; or load the model's Hugging "
      'Face directory'
    ) from error
  parts = {'tokenizer_type': 'llama'}
  for name in ('tokens', 'scores'):
    parts[name] = _need(fields, name, path)
  for name in ('merges', 'token_type'):
    if f'tokenizer.ggml.{name}' in fields:
      parts[name] = fields[f'tokenizer.ggml.{name}']
  arch = fields['general.architecture']
  build = theirs.select_tokenizer_builder(arch, 'llama')
  return build(parts).backend_tokenizer


def _add_whole_tokens(
  backend: Any, fields: Mapping[str, Any], tokens: list[str]
) -> None:
  """Marks the tokens that text is searched for before it is split."""
  from tokenizers import AddedToken

  if 'tokenizer.ggml.token_type' not in fields:
    return
  types = fields['tokenizer.ggml.token_type']
  # Gemma's runs of spaces have other spellings by now: added as the file has
  # them, they were new tokens beyond the model's.
  known = backend.get_vocab()
  backend.add_tokens(
    [
      AddedToken(token, special=kind == _CONTROL, normalized=False)
      for token, kind in zip(tokens, types, strict=True)
      if kind in (_CONTROL, _USER_DEFINED) and token in known
    ]
  )


def _add_ends(
  backend: Any,
  fields: Mapping[str, Any],
  roles: Mapping[str, str],
  begins: bool,
) -> None:
  """Adds beginning and end of text around a text if the file asks for it."""
  from tokenizers import processors

  parts, ids = ['$A'], []
  for end in ('bos', 'eos'):
    key = f'tokenizer.ggml.add_{end}_token'
    wanted = fields[key] if key in fields else begins and end == 'bos'
    if wanted and f'{end}_token' in roles:
      token = roles[f'{end}_token']
      parts = [token, *parts] if end == 'bos' else [*parts, token]
      ids.append((token, backend.token_to_id(token)))
  if ids:
    backend.post_processor = processors.TemplateProcessing(
      single=parts, special_tokens=ids
    )
