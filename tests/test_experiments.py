"""Every shipped experiment: its forms, its stated memory, its tiny run."""

import ast
import re
from pathlib import Path

import pytest
import tiny

from qdora_jax import cli, devices, folder, published
from qdora_jax.config_file import read_config
from qdora_jax.plan import GB, of_run, plan

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'experiments' / 'configs'
NAMES = ['alpaca', 'commonsense', 'e2e', 'gsm8k', 'guanaco', 'orca_math']
AGAIN = ['alpaca', 'commonsense', 'e2e', 'guanaco', 'orca_math']
# Forms whose memory the file states, and their architectures.
STATED = {
  'alpaca': {'llama-7b': 'llama-7b'},
  'commonsense': {
    'llama-7b': 'llama-7b',
    'llama-13b': 'llama-13b',
    'llama2-7b': 'llama-2-7b',
    'llama3-8b': 'llama-3-8b',
  },
  'gsm8k': {'llama3-8b': 'llama-3-8b'},
  'guanaco': {
    '7b': 'llama-7b',
    '13b': 'llama-13b',
    '33b': 'llama-33b',
    '65b': 'llama-65b',
  },
  'orca_math': {
    'llama2-7b': 'llama-2-7b',
    'llama3-8b': 'llama-3-8b',
    'llama3-70b': 'llama-3-70b',
  },
}


def test_the_names_are_all_there_are():
  found = {path.stem for path in CONFIGS.glob('*.py')}
  assert found == {*NAMES, 'base', 'quickstart'}


@pytest.mark.parametrize('name', NAMES)
def test_forms(name):
  file = str(CONFIGS / f'{name}.py')
  for form in ('', ':tiny'):
    config = read_config(file + form, [])
    assert config.model.name.startswith('pypi:')
  with pytest.raises(ValueError, match="no form 'huge'; forms: tiny") as error:
    read_config(f'{file}:huge', [])
  assert f'{name}.py' in str(error.value)


@pytest.mark.parametrize(
  ('name', 'form'), [(name, form) for name in STATED for form in STATED[name]]
)
def test_the_stated_memory_and_time_are_planned(name, form):
  config = read_config(str(CONFIGS / f'{name}.py:{form}'), [])
  job = of_run(config, published.model_config(STATED[name][form]))
  words = ast.get_docstring(ast.parse((CONFIGS / f'{name}.py').read_text()))
  # Of a table's row, or of a sentence.
  text = re.search(rf'(?m)^ +:{form} .*$', words)
  text = text[0] if text else ' '.join(words[words.index(f':{form}') :].split())
  row, made = text.startswith(' '), plan(job)
  figures = re.findall(r'(\d+) GB', text)
  assert int(figures[-1 if row else 0]) == round(made.total / GB)
  # At half the peak of an H100, every row of full length.
  hours = made.flops * config.train.steps / (devices.find('h100').flops / 2)
  (figure, *_) = re.findall(r'([\d.]+) h\b', text)
  assert float(figure) == round(hours / 3600, 1)


@pytest.mark.slow
@tiny.needs_data
@pytest.mark.parametrize(
  'name',
  [
    # Their rows are read, asked and judged in test_tasks.py.
    pytest.param(n, marks=[pytest.mark.exhaustive] * (n in AGAIN))
    for n in NAMES
  ],
)
def test_an_experiment_at_tiny_size(name, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  if name == 'e2e':
    pytest.importorskip('sacrebleu')
  file = f'experiments/configs/{name}.py:tiny'
  words = ['train', '--config', file, '--config.mesh.fsdp=1']
  assert cli.main([*words, '--workdir', str(tmp_path / 'run')]) == 0
  capsys.readouterr()
  found = folder.load_scores(tmp_path / 'run' / 'scores.json')
  assert found['fine-tuned'].loss < found['zero-shot'].loss
  asked = read_config(file, []).eval.benchmarks
  assert len(folder.benchmarks(tmp_path / 'run')) == len(asked)
