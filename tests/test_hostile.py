"""Files are hostile until checked: clear errors, bounded time and memory."""

import json
import resource
import shutil
import struct
import time

import hypothesis
import jax
import pytest
import tiny
from golden import families, gguf_files, weights
from hypothesis import strategies as st
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  chat,
  export_base,
  init_adapter,
  load_adapter,
  load_pretrained,
  save_adapter,
)
from qdora_jax.interop import gguf, hf, template
from qdora_jax.interop.families import model_config

# Together more than 2,000 files.
EXAMPLES = {
  'hf': 700,
  'index': 200,
  'config': 500,
  'bnb': 300,
  'gguf': 500,
  'peft': 300,
  'peft_config': 300,
  'tokenizer': 150,
}
# Of one file: they hold some 100 kB.
MOST_SECONDS, MOST_BYTES = 5.0, 500e6
CLEAR = (ValueError, FileNotFoundError)


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """One whole checkpoint of every kind."""
  root = tmp_path_factory.mktemp('good')
  config, tensors = weights.tiny_llama(0)
  # Small, so that a mutation hits something that matters.
  config |= {'num_hidden_layers': 1, 'vocab_size': 16}
  tensors = {
    k: w[:16] if 'embed' in k else w
    for k, w in tensors.items()
    if '.layers.' not in k or '.layers.0.' in k
  }
  weights.write_hf(root / 'hf', config, tensors)
  weights.write_hf(root / 'index', config, tensors)
  index = {'weight_map': dict.fromkeys(tensors, 'model.safetensors')}
  (root / 'index' / 'model.safetensors.index.json').write_text(
    json.dumps(index)
  )
  shutil.copytree(root / 'hf', root / 'config')
  tiny.write(root / 'tokenizer')
  _, base, _ = load_pretrained(root / 'hf', QuantSpec())
  export_base(root / 'bnb', base, root / 'hf', 'float32')
  (root / 'gguf').mkdir()
  gguf_files.write(root / 'gguf' / 'model.gguf', config, tensors)
  adapter = init_adapter(jax.random.key(0), base, AdapterSpec(rank=2))
  save_adapter(root / 'peft', adapter)
  shutil.copytree(root / 'peft', root / 'peft_config')
  return root, base


FILES = {
  'hf': 'model.safetensors',
  'index': 'model.safetensors.index.json',
  'config': 'config.json',
  'bnb': 'model.safetensors',
  'gguf': 'model.gguf',
  'peft': 'adapter_model.safetensors',
  'peft_config': 'adapter_config.json',
  'tokenizer': 'tokenizer.json',
}


def open_whole(kind, folder, base):
  """Reads everything that the reader of this kind reads."""
  if kind.startswith('peft'):
    load_adapter(folder, base)
    return
  if kind == 'tokenizer':
    hf.HFCheckpoint(folder).tokenizer().encode('1 + 2 = 3')
    return
  if kind == 'gguf':
    checkpoint = gguf.GGUFCheckpoint(folder / 'model.gguf')
  else:
    checkpoint = hf.HFCheckpoint(folder)
  model_config(checkpoint.config, str(folder))
  for name in checkpoint.shapes:
    checkpoint.read(name)
  checkpoint.fingerprint()


@st.composite
def mutations(draw, size):
  """Bytes put over, into or out of a file, most of them near its head."""
  head = st.integers(0, min(size, 3000) - 1)
  places = st.one_of(head, head, st.integers(0, size - 1))
  numbers = st.sampled_from(
    [0, 1, 2, 2**7, 2**8 - 1, 2**15, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
  )
  chunks = st.one_of(
    st.binary(min_size=1, max_size=8),
    numbers.map(lambda n: struct.pack('<Q', n)),
    numbers.map(lambda n: struct.pack('<I', n % 2**32)),
    st.sampled_from([b'{', b'[' * 50, b'"', b'-1', b'9' * 30, b'1e999', b'..']),
  )
  kinds = st.sampled_from(['over', 'in', 'out', 'end'])
  return draw(
    st.lists(st.tuples(kinds, places, chunks), min_size=1, max_size=3)
  )


def mutate(data, steps):
  for kind, at, chunk in steps:
    at = min(at, max(len(data) - 1, 0))
    if kind == 'over':
      data = data[:at] + chunk + data[at + len(chunk) :]
    elif kind == 'in':
      data = data[:at] + chunk + data[at:]
    elif kind == 'out':
      data = data[:at] + data[at + len(chunk) :]
    else:
      data = data[:at]
  return data


@pytest.mark.parametrize('kind', EXAMPLES)
def test_a_mutated_file_is_read_or_refused(kind, good, tmp_path):
  root, base = good
  folder = tmp_path / 'it'
  shutil.copytree(root / kind, folder)
  file = folder / FILES[kind]
  whole = file.read_bytes()
  outcomes = {'read': 0, 'refused': 0}
  # What is compiled or imported for the first is no part of the bounds.
  open_whole(kind, folder, base)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

  @hypothesis.settings(
    max_examples=EXAMPLES[kind],
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(mutations(len(whole)))
  def check(steps):
    file.write_bytes(mutate(whole, steps))
    began = time.process_time()
    try:
      open_whole(kind, folder, base)
      outcomes['read'] += 1
    except CLEAR as error:
      outcomes['refused'] += 1
      assert str(tmp_path) in str(error), f'it does not say where: {error}'
    assert time.process_time() - began < MOST_SECONDS

  check()
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert (after - before) * 1024 < MOST_BYTES
  # Both happen, or nothing was tested.
  assert outcomes['refused'] > EXAMPLES[kind] / 5
  assert outcomes['read'] > 0 or kind == 'config'


def write_safetensors(file, header, data=b'\\0' * 64):
  text = json.dumps(header).encode() if isinstance(header, dict) else header
  file.write_bytes(struct.pack('<Q', len(text)) + text + data)


def tensor(begin, end, shape=(4, 4), dtype='F32'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


@pytest.mark.parametrize(
  'header',
  [
    {'a': tensor(0, 64), 'b': tensor(32, 96)},
    {'a': tensor(0, 128)},
    {'a': tensor(0, 64, (2**40, 2**40))},
    {'a': tensor(64, 0)},
    {'a': tensor(0, 64, (4, 5))},
    {'a': tensor(-64, 0)},
    {'a': tensor(0, 64, dtype='F99')},
    b'[' * 100_000,
    b'{"a":' * 50_000,
    b'\\xff\\xfe',
    b'',
  ],
)
def test_headers_that_lie(header, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  write_safetensors(tmp_path / 'model.safetensors', header)
  with pytest.raises(CLEAR, match='not a whole safetensors file') as error:
    hf.HFCheckpoint(tmp_path)
  assert str(tmp_path) in str(error.value)


def test_a_header_of_any_length_is_not_believed(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  for length in (2**20, 2**40, 2**64 - 1):
    (tmp_path / 'model.safetensors').write_bytes(struct.pack('<Q', length))
    with pytest.raises(CLEAR, match='not a whole safetensors file'):
      hf.HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
  'name', ['../outside.safetensors', '/etc/passwd', 'a/b.safetensors', 'x.bin']
)
def test_an_index_names_files_beside_it(name, tmp_path):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'config.json').write_text('{}')
  index = {'weight_map': {'a': name}}
  (tmp_path / 'in' / 'model.safetensors.index.json').write_text(
    json.dumps(index)
  )
  with pytest.raises(CLEAR, match=r'expected a \.safetensors file beside it'):
    hf.HFCheckpoint(tmp_path / 'in')


@pytest.mark.parametrize(
  'text',
  ['[' * 200_000, '{"a":' * 200_000, '{"a": ' + '9' * 10_000 + '}', '[]', ''],
)
def test_json_that_is_none(text, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(CLEAR, match=r'config\.json'):
    hf.HFCheckpoint(tmp_path)


def test_json_that_is_too_much(tmp_path, monkeypatch):
  monkeypatch.setattr(hf, '_MOST_JSON', 1000)
  (tmp_path / 'config.json').write_text('{"a": "' + 'x' * 1000 + '"}')
  with pytest.raises(CLEAR, match='1,009 bytes; expected at most 1,000'):
    hf.HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
  'changes',
  [
    {'num_hidden_layers': 10**12},
    {'num_hidden_layers': -1},
    {'head_dim': 10**12},
    {'hidden_size': 10**18},
    {'num_attention_heads': 10**12},
    {'rms_norm_eps': float('nan')},
    {'rope_theta': float('inf')},
    {'rope_theta': 1e400},
    {'rope_theta': 0},
    {'rope_theta': -1.0},
    {'vocab_size': True},
    {'vocab_size': [256]},
    {'tie_word_embeddings': 'yes'},
    {'rope_scaling': [1]},
    {'rope_scaling': {'rope_type': {}}},
    {'rope_scaling': {'rope_type': 'yarn', 'factor': 0}},
    {'rope_scaling': {'rope_type': 'linear', 'factor': float('nan')}},
    {'model_type': ['llama']},
    {'rope_theta': 10**400},
    {'vocab_size': 10**30},
  ],
)
def test_absurd_settings(changes):
  config, _ = families.make('llama2')
  with pytest.raises(ValueError, match='here'):
    model_config({**config, **changes}, 'here')


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'alpha_pattern': {'((': 2.0}}, r'alpha_pattern=.*\{regular expression'),
    ({'alpha_pattern': {'q_proj': 'two'}}, 'alpha_pattern=.*number'),
    ({'alpha_pattern': 3.0}, 'alpha_pattern=3.0: expected'),
    ({'alpha_pattern': {'q_proj': -1}}, 'alpha_pattern'),
    ({'modules_to_save': 'norm'}, "modules_to_save='norm': expected a list"),
    ({'modules_to_save': [1]}, 'expected a list of names'),
    ({'use_dora': 'yes'}, "use_dora='yes': expected true or false"),
    ({'lora_alpha': True}, 'lora_alpha=True: expected a number'),
    ({'lora_alpha': -1}, 'alpha=-1'),
    ({'lora_alpha': float('nan')}, 'alpha=nan'),
    ({'lora_dropout': 1.0}, 'dropout=1.0: expected'),
  ],
)
def test_adapter_options_that_cannot_be(changes, words, good, tmp_path):
  root, base = good
  folder = tmp_path / 'it'
  shutil.copytree(root / 'peft', folder)
  file = folder / 'adapter_config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(ValueError, match=words) as error:
    load_adapter(folder, base)
  assert str(folder) in str(error.value)


def test_a_tokenizer_that_is_none(tmp_path):
  folder = tiny.write(tmp_path)
  for text in ('{', '{"model": null}', '[]', '{"model": {"type": "BPE"}}'):
    (folder / 'tokenizer.json').write_text(text)
    with pytest.raises(CLEAR, match=str(folder)):
      hf.HFCheckpoint(folder).tokenizer()


LOOP = (
  '{% for a in range(99999) %}{% for b in range(99999) %}'
  '{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}'
)
DOUBLED = (
  "{% set ns = namespace(x='x') %}{% for a in range(LENGTH) %}"
  '{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}'
)


def with_template(folder, source):
  """A checkpoint's tokenizer with this chat template."""
  tiny.write(folder)
  file = folder / 'tokenizer_config.json'
  config = json.loads(file.read_text()) | {'chat_template': source}
  file.write_text(json.dumps(config))
  return hf.HFCheckpoint(folder).tokenizer()


def processes():
  """How many wait for the next chat."""
  return len(template._idle)


@pytest.mark.parametrize(
  'source, most',
  [
    (LOOP, '1 seconds'),
    ('{% if bos_token %}' + LOOP + '{% endif %}', '1 seconds'),
    (
      "{% if messages[0]['content'] != 'Hello' %}" + LOOP + '{% endif %}',
      '1 seconds',
    ),
    ('{% if messages|length > 2 %}' + LOOP + '{% endif %}Hi', '1 seconds'),
    ([{'name': 'default', 'template': LOOP}], '1 seconds'),
    ('{{ 9 ** (9 ** 9) }}', '1 seconds'),
    ("{{ 'x' * 10000000000 }}", '500,000,000 bytes'),
    ("{{ '%5000000000d' % 1 }}", '500,000,000 bytes'),
    (DOUBLED.replace('LENGTH', '40'), '500,000,000 bytes'),
    (DOUBLED.replace('LENGTH', '22'), r'1,[\d,]+ characters'),
  ],
)
def test_a_template_that_does_not_end(source, most, tmp_path, monkeypatch):
  """With whatever chat, and whichever of its names it asks for."""
  if 'seconds' in most:
    monkeypatch.setattr(template, '_SECONDS', 1)
  else:
    # Less to fill, in as long as a slow machine takes.
    monkeypatch.setattr(template, '_SECONDS', 60)
    monkeypatch.setattr(template, '_BYTES', 500_000_000)
  tokenizer = with_template(tmp_path, source)
  turn = {'role': 'user', 'content': 'Goodbye'}
  answer = {'role': 'assistant', 'content': 'Hi'}
  words = f'{tmp_path}.*tokenizer_config.* takes more than {most} for one chat'
  template.close()
  with pytest.raises(ValueError, match=words):
    chat.encode(tokenizer, {'messages': [turn, answer, turn, answer]})
  # Nothing goes on.
  assert processes() == 0


def test_one_process_renders_one_chat_after_another(tmp_path):
  good = with_template(tmp_path / 'good', tiny.TEMPLATE)
  bad = with_template(tmp_path / 'bad', "{{ 'x' * 10000000000 }}")
  row = {'prompt': 'Hello', 'completion': 'Hi'}
  template.close()
  chat.encode(good, row)
  ((_, first),) = template._idle
  chat.encode(good, row)
  ((_, second),) = template._idle
  assert first is second and first.alive
  with pytest.raises(ValueError, match='bytes'):
    chat.encode(bad, row)
  assert not first.alive and processes() == 0
  chat.encode(good, row)
  ((_, third),) = template._idle
  template.close()
  assert not third.alive and processes() == 0


def test_a_template_has_no_python(tmp_path):
  """transformers' sandbox: what it refuses is an error, and nothing is run."""
  bad = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
  tokenizer = with_template(tmp_path, bad)
  with pytest.raises(ValueError, match='chat template refuses these turns'):
    chat.encode(tokenizer, {'prompt': 'Hello', 'completion': 'Hi'})
