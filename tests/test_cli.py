"""The commands: exit codes, one message on stderr, and the files they leave."""

import importlib
import json

import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import load_adapter
from qdora_jax.cli import main
from qdora_jax.config_file import read_config
from qdora_jax.folder import load_scores

TARGETS = r'.*/(q|down)/kernel'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A folder with model/, tiny_config.py and run/, trained by the command."""
  folder = tmp_path_factory.mktemp('cli')
  model = tiny.write(folder / 'model')
  file = tiny.config_file(
    folder, model, **{'adapter.targets': TARGETS, 'quant.targets': TARGETS}
  )
  with pytest.MonkeyPatch.context() as patch:
    tiny.use_sums(patch)
    args = ['--config', str(file), '--workdir', str(folder / 'run')]
    code = main(['train', *args, '--config.eval.shots=1'])
  assert code == 0
  return folder


@pytest.fixture
def sums(monkeypatch):
  tiny.use_sums(monkeypatch)


@pytest.fixture
def file(tmp_path):
  return tiny.config_file(tmp_path, tmp_path / 'none')


def error(capsys, code, want):
  """What stands on stderr: one message without a traceback."""
  out, err = capsys.readouterr()
  assert code == want
  assert out == ''
  assert 'Traceback' not in err
  return err


def test_train_leaves_its_files(trained):
  run = trained / 'run'
  config = json.loads((run / 'config.json').read_text())
  assert config['eval']['shots'] == 1
  assert config['adapter']['targets'] == TARGETS
  rows = [
    json.loads(x) for x in (run / 'metrics.jsonl').read_text().split('\n') if x
  ]
  assert [row['step'] for row in rows] == [1, 2, 3, 4]
  keys = {'step', 'loss', 'lr', 'grad_norm', 'tokens', 'skipped'}
  keys |= {'seconds', 'tokens_per_second', 'memory_bytes'}
  assert all(row.keys() == keys for row in rows)
  assert rows[-1]['loss'] < rows[0]['loss']
  scores = load_scores(run / 'scores.json')
  assert list(scores) == ['zero-shot', '1-shot', 'fine-tuned']
  assert all(score.total == 6 for score in scores.values())
  picture = (run / 'curves.png').read_bytes()
  assert picture.startswith(b'\x89PNG\r\n\x1a\n')
  assert picture.endswith(b'IEND\xaeB`\x82')
  assert {p.name for p in (run / 'adapter').iterdir()} == {
    'adapter_config.json',
    'adapter_model.safetensors',
  }
  assert {'2', '4'} <= {p.name for p in (run / 'checkpoints').iterdir()}
  assert not list(run.rglob('*.part'))


def test_evaluate_finds_what_train_found(trained, sums, capsys):
  assert main(['evaluate', '--workdir', str(trained / 'run')]) == 0
  out = capsys.readouterr().out
  score = load_scores(trained / 'run' / 'scores.json')['fine-tuned']
  assert out.splitlines()[0] == str(score)
  question, given, expected = score.samples[0]
  assert f'{question}\n  answered: {given}\n  expected: {expected}' in out


def test_generate_says_something(trained, sums, capsys):
  args = [
    'generate',
    '--workdir',
    str(trained / 'run'),
    '--max-new-tokens',
    '4',
  ]
  said = []
  for more in (['--raw'], ['--raw', '--temperature', '50', '--seed', '3']):
    assert main([*args, '--prompt', '1+1=', *more]) == 0
    said.append(capsys.readouterr().out)
  assert said[0] != said[1]
  assert all(s.endswith('\n') and len(s.strip()) <= 4 for s in said)


def test_the_chat_template_stands_around_a_prompt(
  trained, sums, monkeypatch, capsys
):
  seen = []

  def generate(model, params, prompts, count, *, stop, **_):
    seen.extend(prompts)
    return [tiny.loaded()[2].encode(' 7 ', add_special_tokens=False)]

  monkeypatch.setattr(
    importlib.import_module('qdora_jax.generate'), 'generate', generate
  )
  args = ['--workdir', str(trained / 'run'), '--prompt', '3+4=']
  assert main(['generate', *args]) == 0
  assert capsys.readouterr().out == '7\n'
  assert tiny.loaded()[2].decode(seen[0]) == 'u:3+4=\na:'


def test_export_writes_the_adapter(trained, sums, tmp_path, capsys):
  out = tmp_path / 'out'
  args = ['--workdir', str(trained / 'run'), '--out', str(out)]
  assert main(['export', *args, '--format', 'peft']) == 0
  assert f'wrote {out}' in capsys.readouterr().out
  for name in ('adapter_config.json', 'adapter_model.safetensors'):
    mine = (out / name).read_bytes()
    assert mine == (trained / 'run' / 'adapter' / name).read_bytes()
  adapter = load_adapter(out, tiny.loaded()[1])
  assert adapter['layers']['attn']['q']['kernel'].spec.method == 'dora'


@pytest.mark.parametrize(
  'form, files',
  [
    ('merged', ['config.json', 'model.safetensors', 'tokenizer.json']),
    ('base', ['config.json', 'model.safetensors', 'tokenizer.json']),
    ('folded', ['adapter/adapter_config.json', 'model/config.json']),
  ],
)
def test_export_writes_models(trained, sums, tmp_path, capsys, form, files):
  out = tmp_path / 'out'
  args = ['--workdir', str(trained / 'run'), '--out', str(out)]
  assert main(['export', *args, '--format', form, '--dtype', 'bfloat16']) == 0
  said = capsys.readouterr().out
  assert f'wrote {out}: ' in said
  for name in files:
    assert name in said
    assert (out / name).is_file()
  # Again, it would write over what it wrote.
  assert main(['export', *args, '--format', form]) != 0
  assert f'{out} exists and is not empty' in capsys.readouterr().err


def test_export_to_another_dtype_is_refused(trained, sums, tmp_path, capsys):
  args = ['--workdir', str(trained / 'run'), '--out', str(tmp_path / 'out')]
  args += ['--format', 'merged', '--dtype']
  assert main(['export', *args, 'int8']) != 0
  assert "dtype='int8': expected one of float32" in capsys.readouterr().err
  assert main(['export', *args, 'nf4']) != 0
  assert "format 'folded'" in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('args', [[], ['-h'], ['--help']])
def test_help(args, capsys):
  assert main(args) == 0
  assert 'qdora train    --config FILE' in capsys.readouterr().out


def test_an_unknown_command_lists_the_known(capsys):
  err = error(capsys, main(['trian']), 2)
  assert "no command 'trian'; commands: train, evaluate, generate, exp" in err


@pytest.mark.parametrize(
  'args', [['train'], ['generate', '--workdir', 'x'], ['export', '--nonsense']]
)
def test_a_missing_option_is_argparses_error(args, capsys):
  with pytest.raises(SystemExit) as exit:
    main(args)
  assert 'required' in error(capsys, exit.value.code, 2)


@pytest.mark.parametrize('command', ['evaluate', 'generate', 'export'])
def test_a_folder_that_is_no_run(command, tmp_path, capsys):
  more = {
    'evaluate': [],
    'generate': ['--prompt', 'x'],
    'export': ['--format', 'peft', '--out', str(tmp_path / 'out')],
  }[command]
  code = main([command, '--workdir', str(tmp_path / 'run'), *more])
  err = error(capsys, code, 1)
  assert err.startswith(f'qdora {command}: {tmp_path}/run is no run folder')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'override, words',
  [
    ('--config.adapter.rnak=4', ['rnak', 'rank']),
    ('--config.trian.steps=4', ['trian', 'train']),
    ('--config.adapter.rank=four', ['config.adapter.rank', 'four']),
    ('--config.adapter.method=olora', ["method='olora'", "'dora'"]),
    ('--config.train.microbatches=3', ['microbatches=3', 'batch_size=8']),
    ('--adapter.rank=4', ["'--adapter.rank=4' is no option"]),
    ('rank', ["'rank' is no option", '--config.section.key=value']),
  ],
)
def test_an_override_that_cannot_be(file, tmp_path, capsys, override, words):
  args = ['--config', str(file), '--workdir', str(tmp_path / 'run')]
  err = error(capsys, main(['train', *args, override]), 1)
  assert err.startswith('qdora train: ')
  assert all(word in err for word in words), err
  assert not (tmp_path / 'run').exists()


def test_overrides_are_on_top_of_the_file(file):
  got = read_config(
    str(file),
    [
      '--config.adapter.rank=2',
      '--config.optim.lr=5e-4',
      '--config.quant.double_quant=false',
      '--config.data.system=Add.',
    ],
  )
  assert (got.adapter.rank, got.optim.lr) == (2, 5e-4)
  assert (got.quant.double_quant, got.data.system) == (False, 'Add.')
  assert got.train.steps == 4


def test_every_config_of_the_repository_is_accepted():
  files = sorted(tiny.BASE.parent.glob('*.py'))
  assert len(files) >= 2
  for path in files:
    read_config(str(path), [])


def test_a_config_that_is_not_there(tmp_path, capsys):
  args = ['--config', str(tmp_path / 'no.py'), '--workdir', str(tmp_path / 'r')]
  assert 'no.py: no such file' in error(capsys, main(['train', *args]), 1)


def train(tmp_path, file):
  return main(
    ['train', '--config', str(file), '--workdir', str(tmp_path / 'r')]
  )


def test_a_model_that_is_not_there(file, tmp_path, sums, capsys):
  err = error(capsys, train(tmp_path, file), 1)
  assert f'qdora train: {tmp_path}/none: no such directory' in err


def test_a_model_without_a_tokenizer(tmp_path, sums, capsys):
  model = tiny.write_model(tmp_path / 'model')
  code = train(tmp_path, tiny.config_file(tmp_path, model))
  err = error(capsys, code, 1)
  assert 'tokenizer' in err
  assert str(model) in err


@pytest.mark.parametrize(
  'kind, words',
  [
    (ModuleNotFoundError, 'the task needs sympy, not installed here'),
    (RuntimeError, 'reasoning-gym is not installed and cannot be fetched'),
  ],
)
def test_a_task_that_cannot_be_had(
  file, tmp_path, monkeypatch, capsys, kind, words
):
  def load(*_):
    raise kind(words)

  monkeypatch.setattr('qdora_jax.rows.reasoning_gym.load', load)
  assert words in error(capsys, train(tmp_path, file), 1)


def test_an_interrupted_command_says_how_to_go_on(
  file, tmp_path, monkeypatch, capsys
):
  def load(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr('qdora_jax.rows.reasoning_gym.load', load)
  err = error(capsys, train(tmp_path, file), 130)
  assert 'interrupted; the same command continues' in err
