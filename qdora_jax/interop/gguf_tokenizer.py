"""A GGUF file's vocabulary as a Hugging Face fast tokenizer.

The file holds tokens, merges, token types and the *name* of the rule that
splits text before the merges apply. The rule itself is nowhere in the file, so
a name is supported here only if its rule is known; guessing one gives a
tokenizer that is right on most words and wrong on numbers.
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


def build(fields: Mapping[str, Any], path: str) -> 'PreTrainedTokenizerFast':
  """The tokenizer described by a GGUF file's metadata.

  Byte-level BPE; control tokens are matched whole in the text and count as
  special; beginning- and end-of-text tokens are added to a text only if the
  file says so; the chat template is the file's.

  Args:
    fields: metadata by key, see `gguf_header.Header`.
    path: the file, for error messages.

  Raises:
    ValueError: the vocabulary is not byte-level BPE, the splitting rule is
      not one of 'smollm' and 'gpt-2', or a key is missing.
  """
  import tokenizers
  from transformers import PreTrainedTokenizerFast

  needed = [f'tokenizer.ggml.{k}' for k in ('model', 'pre', 'tokens', 'merges')]
  missing = [key for key in needed if key not in fields]
  if missing:
    raise ValueError(
      f'{path}: metadata {missing} is missing, so its tokenizer is unknown.'
      " Load the tokenizer of the model's Hugging Face directory instead"
    )
  model, rule, tokens, merges = (fields[key] for key in needed)
  if model != 'gpt2':
    raise ValueError(
      f"{path}: tokenizer.ggml.model is {model!r}, expected 'gpt2' (byte-level"
      " BPE). Load the tokenizer of the model's Hugging Face directory instead"
    )
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {token: i for i, token in enumerate(tokens)},
      [tuple(merge.split(' ')) for merge in merges],
    )
  )
  backend.pre_tokenizer = _splitter(rule, path)
  backend.decoder = tokenizers.decoders.ByteLevel()
  roles = {r: tokens[fields[k]] for r, k in _ROLES.items() if k in fields}
  _add_whole_tokens(backend, fields, tokens)
  _add_ends(backend, fields, roles)
  if 'tokenizer.chat_template' in fields:
    roles['chat_template'] = fields['tokenizer.chat_template']
  if 'llama.context_length' in fields:
    roles['model_max_length'] = fields['llama.context_length']
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles
  )


def _splitter(rule: str, path: str) -> 'PreTokenizer':
  """The pre-tokenizer that llama.cpp calls `rule`."""
  from tokenizers import pre_tokenizers

  # use_regex: GPT-2's pattern.
  bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  if rule == 'gpt-2':
    return bytes_
  if rule == 'smollm':
    # llama.cpp llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM: \p{N} one by
    # one, then GPT-2's pattern; HuggingFaceTB/SmolLM2 tokenizer.json.
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, bytes_])
  raise ValueError(
    f"{path}: tokenizer.ggml.pre is {rule!r}, expected 'smollm' or 'gpt-2'."
    " Load the tokenizer of the model's Hugging Face directory instead"
  )


def _add_whole_tokens(
  backend: Any, fields: Mapping[str, Any], tokens: list[str]
) -> None:
  """Marks the tokens that text is searched for before it is split."""
  from tokenizers import AddedToken

  if 'tokenizer.ggml.token_type' not in fields:
    return
  types = fields['tokenizer.ggml.token_type']
  backend.add_tokens(
    [
      AddedToken(token, special=kind == _CONTROL, normalized=False)
      for token, kind in zip(tokens, types, strict=True)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
  )


def _add_ends(
  backend: Any, fields: Mapping[str, Any], roles: Mapping[str, str]
) -> None:
  """Adds beginning and end of text around a text if the file asks for it."""
  from tokenizers import processors

  parts, ids = ['$A'], []
  for end in ('bos', 'eos'):
    if (f'tokenizer.ggml.add_{end}_token', True) in fields.items():
      token = roles[f'{end}_token']
      parts = [token, *parts] if end == 'bos' else [*parts, token]
      ids.append((token, backend.token_to_id(token)))
  if ids:
    backend.post_processor = processors.TemplateProcessing(
      single=parts, special_tokens=ids
    )
