"""Runs from a config: by all methods, stopped and gone on with, and read."""

import json
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  devices,
  finetune,
  folder,
  load_adapter,
  metrics,
  opening,
  paths,
  processes,
  run,
)
from qdora_jax.evaluate import Score
from qdora_jax.intervals import Measure
from qdora_jax.metrics import Progress, read_log

ONE = r'.*/q/kernel'


@pytest.fixture
def train(tmp_path, monkeypatch):
  """train(name, **overrides) runs; answers are made up, calls are counted."""
  tiny.use_sums(monkeypatch)
  model = tiny.write(tmp_path / 'model')
  asked = []

  def exact_match(model, params, tokenizer, rows, form, **options):
    asked.append((len(rows), len(options['shots'])))
    samples = tuple((row.question, '7', row.answer) for row in rows[:3])
    return Score(len(asked), 2, len(rows), samples)

  monkeypatch.setattr(run.evaluate, 'exact_match', exact_match)

  def call(name, **overrides):
    every = {'adapter.targets': ONE, 'quant.targets': ONE, **overrides}
    config = tiny.run_config(model, **every)
    return finetune.fine_tune(config, tmp_path / name)

  call.asked = asked
  return call


def stop_at(monkeypatch, step):
  """A kill while the given step is shown, once."""
  show = Progress.show

  def interrupted(self, n, row):
    show(self, n, row)
    if n == step:
      monkeypatch.setattr(Progress, 'show', show)
      raise KeyboardInterrupt

  monkeypatch.setattr(Progress, 'show', interrupted)


def steady(folder):
  """The log without what time and memory say."""
  rows = read_log(folder / 'metrics.jsonl')
  timed = ('seconds', 'tokens_per_second', 'memory_bytes')
  return [{k: row[k] for k in row if k not in timed} for row in rows]


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(
  train, tmp_path, monkeypatch, capsys
):
  options = {
    'train.steps': 6,
    'train.save_every': 2,
    'train.microbatches': 2,
    'adapter.dropout': 0.1,
    'optim.schedule': 'linear',
    'eval.every': 3,
  }
  train('whole', **options)
  stop_at(monkeypatch, 5)
  with pytest.raises(KeyboardInterrupt):
    train('cut', **options)
  assert [row['step'] for row in steady(tmp_path / 'cut')] == [1, 2, 3, 4, 5]
  assert not (tmp_path / 'cut' / 'adapter').exists()
  capsys.readouterr()
  train.asked.clear()
  train('cut', **options)
  assert 'continuing after step 4' in capsys.readouterr().out
  # What was known before training is not asked again.
  assert train.asked == [(6, 0)]
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  for file in ('adapter_model.safetensors', 'adapter_config.json'):
    mine = (cut / 'adapter' / file).read_bytes()
    assert mine == (whole / 'adapter' / file).read_bytes()
  assert steady(cut) == steady(whole)
  assert [row['step'] for row in steady(cut)] == [1, 2, 3, 4, 5, 6]
  # And a third call finds nothing to do.
  train('cut', **options)
  assert steady(cut) == steady(whole)
  # The PEFT files are the adapter of the last checkpoint.
  loaded = run.load_run(cut)
  trained, files = loaded.trained, load_adapter(whole / 'adapter', loaded.base)
  q, mine = (t['layers']['attn']['q']['kernel'] for t in (files, trained))
  np.testing.assert_array_equal(q.lora_b, mine.lora_b)
  np.testing.assert_array_equal(q.magnitude, mine.magnitude)


METHODS = [
  pytest.param('none', 'none', marks=pytest.mark.slow),
  pytest.param('none', 'lora', marks=tiny.AGAIN),
  pytest.param('none', 'dora', marks=tiny.AGAIN),
  pytest.param('nf4', 'lora', marks=tiny.AGAIN),
  ('nf4', 'dora'),
  pytest.param('nf4', 'magnitude', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('quant, method', METHODS)
def test_every_method_by_config_alone(train, tmp_path, capsys, quant, method):
  options = {'quant.format': quant, 'adapter.method': method}
  scores = train('run', **options, **{'train.steps': 3})
  assert list(scores) == ['zero-shot', 'fine-tuned']
  assert scores['fine-tuned'].loss < scores['zero-shot'].loss
  folder = tmp_path / 'run'
  assert (folder / 'curves.png').is_file()
  assert (folder / 'adapter').exists() == (method in ('lora', 'dora'))
  assert ('no PEFT files' in capsys.readouterr().out) == (method == 'magnitude')
  loaded = run.load_run(folder)
  assert (loaded.base == {}) == (method == 'none')
  # What is loaded is what was evaluated.
  assert loaded.held_out_loss(loaded.params()) == scores['fine-tuned'].loss


@pytest.mark.slow
def test_a_run_in_float16(train, tmp_path, monkeypatch, capsys):
  """Its scale is said, kept and gone on with; and it can be read."""
  monkeypatch.setattr('qdora_jax.scaling.START', 2.0**26)
  options = {'model.dtype': 'float16', 'train.steps': 14}
  stop_at(monkeypatch, 13)
  with pytest.raises(KeyboardInterrupt):
    train('half', **options)
  scores = train('half', **options)
  rows = read_log(tmp_path / 'half' / 'metrics.jsonl')
  assert [row['step'] for row in rows] == list(range(1, 15))
  over = [row['grad_norm'] is None for row in rows]
  assert over[0] and not over[-1] and sum(over) == rows[-1]['overflowed']
  for n, row in enumerate(rows):
    assert row['loss_scale'] == 2.0 ** (26 - sum(over[:n]))
  summary = json.loads((tmp_path / 'half' / 'summary.json').read_text())
  assert summary['overflowed_steps'] == sum(over)
  assert summary['skipped_steps'] == 0
  out = capsys.readouterr().out
  words = "computes in float16: config.model.dtype='auto' would take float32"
  assert f'{words}: this is a CPU' in out
  assert re.search(f'14 steps, .* {sum(over)} only lowered the loss scale', out)
  loaded = run.load_run(tmp_path / 'half')
  assert loaded.model.dtype == jnp.float16
  assert loaded.held_out_loss(loaded.params()) == scores['fine-tuned'].loss


def test_a_run_goes_on_in_the_dtype_it_began_in(tmp_path):
  """What 'auto' meant stands in its folder; a new one asks the device."""
  config = tiny.run_config('model')
  assert config.model.dtype == 'auto'
  new = opening.settled(config, tmp_path)
  assert new.model.dtype == 'float32'
  began = tiny.run_config('model', **{'model.dtype': 'bfloat16'})
  with folder.claimed(began, tmp_path / 'run'):
    pass
  assert opening.settled(config, tmp_path / 'run') == began
  # It is the same run, as far as its folder is asked.
  folder.check(opening.settled(config, tmp_path / 'run'), tmp_path / 'run')
  told = tiny.run_config('model', **{'model.dtype': 'float16'})
  assert opening.settled(told, tmp_path / 'run') == told


def test_one_command_at_a_time_writes_into_a_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, 'GRACE', 0)
  config, other = tiny.run_config('model'), tiny.run_config('other')
  workdir = tmp_path / 'run'
  with folder.claimed(config, workdir):
    for who in (config, other):
      with (
        pytest.raises(RuntimeError, match=r'another .* into .*/run; .*/run-2$'),
        folder.claimed(who, workdir),
      ):
        pass
  # Free again, also after a failure, for who comes with the same config.
  with pytest.raises(KeyError), folder.claimed(config, workdir):
    raise KeyError
  with (
    pytest.raises(ValueError, match='holds a run of another config'),
    folder.claimed(other, workdir),
  ):
    pass
  with folder.claimed(config, workdir):
    assert folder.config_of(workdir) == config


@pytest.mark.parametrize(
  'name, capability, dtype, why',
  [
    (
      'Tesla T4',
      '7.5',
      'float16',
      r'\(compute capability 7.5\) has no bfl.*scaled',
    ),
    ('Tesla V100', '7.0', 'float16', 'the loss is scaled'),
    ('Tesla P40', '6.1', 'float32', 'and no fast float16'),
    ('NVIDIA A100', '8.0', 'bfloat16', 'NVIDIA A100 has it'),
    ('NVIDIA B200', '10.0', 'bfloat16', 'has it'),
    ('AMD Instinct', 'gfx942', 'bfloat16', 'has it'),
    ('TPU v4', None, 'bfloat16', 'has it'),
  ],
)
def test_devices_are_asked_what_to_compute_in(name, capability, dtype, why):
  device = types.SimpleNamespace(device_kind=name, platform='gpu')
  if capability is not None:
    device.compute_capability = capability
  got, reason = devices.best_dtype(device)
  assert got == dtype
  assert re.search(why, reason)


def test_a_run_shows_what_it_does(train, tmp_path, monkeypatch, capsys):
  # The first of its process, as far as its memory is asked.
  monkeypatch.setattr(metrics, '_told', 0)
  train(
    'run', **{'train.steps': 5, 'eval.every': 2, 'train.seq_len': 12, 'seed': 1}
  )
  out = capsys.readouterr().out
  for words in (
    r'computes in float32: this is a CPU',
    r'layers/attn/q/kernel +3 x 64 x 64 +nf4/64 double +6,360 +dora r=4',
    r'bytes: float32 .* MB, nf4/64 double .* MB, trained .* MB',
    r'trained: 1,728 parameters, 1\.36% of the 127,424 of the model',
    r'24 examples, \d+ tokens, \d+ of them learned; 24 rows of \d+ tokens',
    r'6 rows held out; 5 steps of 8 x \d+ = \d+ tokens, 1\.7 epochs',
    r'training takes about \d.* or more',
    r'before, zero-shot: .*right .*; held-out loss',
    r'step 2: held-out loss \d\.\d+\n +0\+0=\n +answered: 7\n +expected: 0',
    r'step 4: held-out loss',
    r'fine-tuned: .* held-out loss',
    r'gain beyond both intervals: -?\d',
    r'5 steps, \d+ tokens, \d+ tokens/s; \d.* in all, peak .* results in',
  ):
    assert re.search(words, out), words
  rows = read_log(tmp_path / 'run' / 'metrics.jsonl')
  assert [r['step'] for r in rows if 'held_out_loss' in r] == [2, 4]
  assert rows[1]['samples'][0] == ['0+0=', '7', '0']
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['steps'] == 5
  assert summary['tokens'] == sum(row['tokens'] for row in rows)
  assert summary['trained_parameters'] == 1728
  assert summary['data']['examples'] == 24
  data = summary['data']
  places = data['packed'] * data['length']
  assert data['filled'] == pytest.approx(data['tokens'] / places, abs=1e-4)
  assert summary['overflowed_steps'] is None
  assert summary['versions']['jax'] == jax.__version__
  names = {path.name for path in (tmp_path / 'run').iterdir()}
  assert names == {
    '.lock',
    'config.json',
    'metrics.jsonl',
    'scores.json',
    'summary.json',
    'curves.png',
    'checkpoints',
    'adapter',
  }


@pytest.mark.slow
def test_files_packed_and_mixed(train, tmp_path, capsys):
  """Chats and texts of two files; too long ones are counted out loud."""
  chats, texts = tmp_path / 'chats.jsonl', tmp_path / 'texts.json'
  chats.write_text(
    ''.join(
      json.dumps(
        {
          'messages': [
            {'role': 'user', 'content': f'{n}'},
            {'role': 'assistant', 'content': f'{n}' * (40 if n == 3 else 1)},
          ]
        }
      )
      + '\n'
      for n in range(12)
    )
  )
  texts.write_text(json.dumps([{'text': f'once {n}'} for n in range(12)]))
  scores = train(
    'run',
    **{
      'data.name': '',
      'data.mix': {str(chats): 1.0, str(texts): 1.0},
      'data.train_size': 0,
      'data.packing': True,
      'train.seq_len': 32,
    },
  )
  out = capsys.readouterr().out
  assert 'TOO LONG: 1 dropped' in out
  assert '17 examples' in out
  packed = re.search(r'(\d+) rows of 32 tokens', out)
  assert int(packed[1]) < 10
  assert scores['fine-tuned'].loss < scores['zero-shot'].loss
  # Texts have no answer to compare with.
  assert train.asked[0] == (3, 0)


def test_no_evaluation_if_nothing_is_held_out(train, tmp_path, capsys):
  assert train('run', **{'data.eval_size': 0}) == {}
  assert train.asked == []
  assert '0 rows held out' in capsys.readouterr().out
  assert (tmp_path / 'run' / 'curves.png').is_file()


@pytest.mark.slow
def test_only_the_loss_if_so_configured(train, capsys):
  scores = train('run', **{'eval.exact_match': False, 'eval.shots': 2})
  assert list(scores) == ['zero-shot', 'fine-tuned']
  assert scores['fine-tuned'].total == 0
  assert train.asked == []


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(train, tmp_path):
  train('first', **{'train.steps': 3})
  path = tmp_path / 'first' / 'adapter'
  train('second', **{'adapter.path': str(path), 'train.steps': 2})
  first, second = (
    read_log(tmp_path / n / 'metrics.jsonl') for n in ('first', 'second')
  )
  assert second[0]['loss'] < first[0]['loss']
  for key, value in (('rank', 8), ('alpha', 3.0), ('method', 'lora')):
    with pytest.raises(ValueError, match=rf'{path}.*config\.adapter\.{key}='):
      train('x', **{'adapter.path': str(path), f'adapter.{key}': value})


@pytest.mark.slow
def test_norms_and_head_train_beside_an_adapter(train, tmp_path):
  train('run', **{'adapter.trainable': '.*norm/scale'})
  loaded = run.load_run(tmp_path / 'run')
  flat = paths.flatten(loaded.trained)
  assert {'final_norm/scale', 'layers/attn_norm/scale'} < flat.keys()
  assert np.abs(flat['final_norm/scale'] - 1).max() > 0
  # It goes on from there; what is trained must be what was.
  more = {'adapter.path': str(tmp_path / 'run' / 'adapter')}
  with pytest.raises(ValueError, match=r'final_norm/scale.* trained in full'):
    train('without', **more)
  train('more', **more, **{'adapter.trainable': '.*norm/scale'})


@pytest.mark.slow
@pytest.mark.parametrize(
  'microbatches', [pytest.param(1, marks=pytest.mark.exhaustive), 2]
)
def test_a_run_on_eight_devices_is_one_on_one(train, tmp_path, microbatches):
  options = {
    'train.steps': 2,
    'train.batch_size': 16,
    'train.microbatches': microbatches,
  }
  train('one', **options)
  train('eight', **options, **{'mesh.fsdp': -1})
  for a, b in zip(
    steady(tmp_path / 'one'), steady(tmp_path / 'eight'), strict=True
  ):
    for key in ('loss', 'grad_norm'):
      np.testing.assert_allclose(a[key], b[key], rtol=1e-4)
  # It continues there, too, and is found where it was left.
  train('eight', **options, **{'mesh.fsdp': -1})
  loaded = run.load_run(tmp_path / 'eight')
  (leaf,) = {
    len(a.sharding.device_set) for a in jax.tree.leaves(loaded.trained)
  }
  assert leaf == 8
  scores = folder.load_scores(tmp_path / 'eight' / 'scores.json')
  np.testing.assert_allclose(
    loaded.held_out_loss(loaded.params()), scores['fine-tuned'].loss, rtol=1e-5
  )


def test_the_best_checkpoint_stays_and_can_be_taken(
  train, tmp_path, monkeypatch, capsys
):
  losses, seen = [9.0, 3.0, 1.0, 2.0, 4.0, 4.0], []

  def held_out_loss(model, params, batches):
    seen.append(jax.tree.map(np.asarray, params))
    return losses[len(seen) - 1]

  monkeypatch.setattr(run.evaluate, 'held_out_loss', held_out_loss)
  monkeypatch.setattr(
    run.evaluate,
    'held_out_measure',
    lambda *args: Measure(held_out_loss(*args), None, None),
  )
  options = {'train.steps': 4, 'train.save_every': 4, 'eval.every': 1}
  train('run', **options, **{'train.keep_last': 1, 'train.keep_best': 1})
  words = 'the best checkpoint is of step 2, held-out loss 1.0000; --checkpoint'
  assert words in capsys.readouterr().out
  folder = tmp_path / 'run'
  summary = json.loads((folder / 'summary.json').read_text())
  assert summary['best_checkpoint'] == {'step': 2, 'held_out_loss': 1.0}
  kept = {p.name for p in (folder / 'checkpoints').iterdir()}
  assert kept == {'2', '4'}
  for which, n in (('best', 2), ('last', 5), (2, 2)):
    got = run.load_run(folder, which).params()
    tiny.assert_same(jax.tree.map(np.asarray, got), seen[n])


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(train, tmp_path, monkeypatch, capsys):
  options = {'train.steps': 6, 'train.save_every': 2, 'optim.lr': 1e-3}
  train('whole', **options, **{'mesh.fsdp': 4})
  stop_at(monkeypatch, 3)
  with pytest.raises(KeyboardInterrupt):
    train('moved', **options, **{'mesh.fsdp': 4})
  capsys.readouterr()
  train('moved', **options, **{'mesh.fsdp': 2, 'mesh.data': 2})
  assert 'continuing after step 2\n' in capsys.readouterr().out
  pairs = zip(
    steady(tmp_path / 'moved'), steady(tmp_path / 'whole'), strict=True
  )
  for a, b in pairs:
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
  # And is read where there are fewer devices than it was trained on.
  path = tmp_path / 'moved' / 'config.json'
  path.write_text(path.read_text().replace('"fsdp": 4', '"fsdp": 16'))
  monkeypatch.setattr(run.Run, 'identity', {})
  loaded = run.load_run(tmp_path / 'moved')
  assert loaded.mesh.size == 8
  assert 'of the 8 devices here fsdp=8 is taken' in capsys.readouterr().out


def test_a_mesh_that_does_not_fit_is_refused(train):
  with pytest.raises(
    ValueError, match=r'data=3 x fsdp=4 x tensor=1 devices; there are 8'
  ):
    train('run', **{'mesh.data': 3, 'mesh.fsdp': 4})
  words = r'batch_size=8 in 2 microbatches .* over 8 devices; .* multiple of 16'
  with pytest.raises(ValueError, match=words):
    train('run', **{'mesh.fsdp': 8, 'train.microbatches': 2})


def test_a_few_lines_in_a_notebook(train, tmp_path, monkeypatch):
  """The README's, with nothing beside them."""
  readme = (Path(__file__).parents[1] / 'README.md').read_text()
  (program,) = re.findall(r'```\n([^`]*load_run[^`]*)```', readme)
  targets = {'adapter.targets': ONE, 'quant.targets': ONE}
  file = tiny.config_file(tmp_path, tmp_path / 'model', **targets)
  for shown, here in (
    ('experiments/configs/quickstart.py', str(file)),
    ('train.steps=80', 'train.steps=2'),
    ('runs/quickstart', 'run'),
  ):
    assert shown in program
    program = program.replace(shown, here)
  monkeypatch.chdir(tmp_path)
  space: dict = {}
  exec(compile(program, 'README.md', 'exec'), space)
  assert space['config'].train.steps == 2
  assert space['scores']['fine-tuned'].total == 6
  assert space['done'].workdir == Path('run')


def test_a_run_is_evaluated_asked_and_exported(train, tmp_path, monkeypatch):
  train('run')
  loaded = run.load_run(tmp_path / 'run')
  score = loaded.evaluate()
  assert score.total == 6
  assert isinstance(loaded.generate('1+1=', 4), str)
  loaded.export(tmp_path / 'out')
  for name in ('adapter_config.json', 'adapter_model.safetensors'):
    mine = (tmp_path / 'out' / name).read_bytes()
    assert mine == (tmp_path / 'run' / 'adapter' / name).read_bytes()
  # What needs no data reads none.
  monkeypatch.setattr(run.data, 'load_data', None)
  loaded = run.load_run(tmp_path / 'run')
  loaded.generate('1+1=', 4)
  loaded.export(tmp_path / 'again')
  with pytest.raises(TypeError):
    loaded.evaluate()


def test_a_folder_of_another_config_or_base_is_refused(train, tmp_path):
  """The one with the difference, the other with what it is."""
  options = {'train.steps': 2}
  train('run', **options)
  before = (tmp_path / 'run' / 'config.json').read_text()
  with pytest.raises(ValueError) as error:
    changes = {'optim.lr': 0.5, 'adapter.rank_pattern': {'.*/q/.*': 2}}
    train('run', **options, **changes)
  words = str(error.value)
  assert f'{tmp_path}/run holds a run of another config' in words
  assert 'config.optim.lr was 0.01, is 0.5' in words
  assert 'config.adapter.rank_pattern..*/q/.* was None, is 2' in words
  assert words.count(' was ') == 2
  assert f'such as {tmp_path}/run-2' in words
  assert (tmp_path / 'run' / 'config.json').read_text() == before
  path = tmp_path / 'model' / 'config.json'
  config = json.loads(path.read_text()) | {'rms_norm_eps': 1e-3}
  path.write_text(json.dumps(config))
  with pytest.raises(ValueError, match='belongs to another base'):
    train('run', **options)


def test_what_is_no_run_is_not_loaded(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'none is no run folder'):
    run.load_run(tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


def test_a_run_without_a_checkpoint_is_not_loaded(train, tmp_path, monkeypatch):
  stop_at(monkeypatch, 1)
  with pytest.raises(KeyboardInterrupt):
    train('run')
  words = r'no checkpoint in .*train first'
  with pytest.raises(FileNotFoundError, match=words):
    run.load_run(tmp_path / 'run')


def test_training_starts_from_the_base(train, tmp_path):
  """The tree before the first step is the base, bit for bit in its logits."""
  tiny.write(tmp_path / 'model')
  changes = {'quant.format': 'none', 'model.attention': 'plain'}
  config = tiny.run_config(tmp_path / 'model', **changes)
  opened = run.Run.open(config, tmp_path / 'run')
  assert opened.model.attention == 'plain'
  ids = jnp.arange(8)[None]
  model, base, _ = tiny.loaded()
  apply = jax.jit(lambda p: model.apply({'params': p}, ids))
  assert tiny.relative(apply(opened.params()), apply(base)) <= 1e-5
