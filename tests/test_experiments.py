"""Every shipped experiment runs, small, on real data and real weights."""

from pathlib import Path

import pytest

from qdora_jax import cli, folder

ROOT = Path(__file__).parents[1]
TINY = [
  path.relative_to(ROOT)
  for path in sorted((ROOT / 'experiments' / 'configs').glob('*.py'))
  if "'tiny'" in path.read_text()
]


@pytest.mark.slow
@pytest.mark.skipif(
  not (ROOT.parent / 'shared' / 'data').exists(),
  reason='the shared data is not here',
)
@pytest.mark.parametrize('config', TINY, ids=lambda path: path.stem)
def test_an_experiment_at_tiny_size(config, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  pytest.importorskip('sacrebleu')
  words = ['train', '--config', f'{config}:tiny', '--config.mesh.fsdp=1']
  assert cli.main([*words, '--workdir', str(tmp_path / 'run')]) == 0
  capsys.readouterr()
  found = folder.load_scores(tmp_path / 'run' / 'scores.json')
  assert found['fine-tuned'].loss < found['zero-shot'].loss
  assert folder.benchmarks(tmp_path / 'run')


def test_there_are_experiments_at_tiny_size():
  assert [path.stem for path in TINY] == ['e2e']
