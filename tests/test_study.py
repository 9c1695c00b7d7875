"""Studies of runs and of weights: what they write is what was measured."""

import csv
import json
import re
import statistics

import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import analysis, attach, cli, study
from qdora_jax.analysis import Format
from qdora_jax.finetune import fine_tune
from qdora_jax.run import load_run, untrained


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A folder of runs, two seeds of DoRA over NF4 and one that is full."""
  folder = tmp_path_factory.mktemp('runs')
  with pytest.MonkeyPatch.context() as patch:
    tiny.use_sums(patch)
    model = tiny.write(folder / 'model', tied=False)
    usual = {'eval.before': False, 'data.eval_size': 0, 'train.save_every': 1}
    usual |= {'train.steps': 3, 'train.keep_last': 3, 'quant.block_size': 32}
    for name, more in {
      'dora-0': {'adapter.init': 'pissa'},
      'dora-1': {'seed': 1},
      'more': {'adapter.path': str(folder / 'runs' / 'dora-1' / 'adapter')},
      'full': {'adapter.method': 'none', 'quant.format': 'none'},
    }.items():
      config = tiny.run_config(model, **usual, **more)
      fine_tune(config, folder / 'runs' / name)
  return folder / 'runs'


@pytest.mark.slow
def test_of_runs(trained, tmp_path, capsys):
  out = tmp_path / 'out'
  assert cli.main(['analyze', str(trained), '--out', str(out)]) == 0
  assert f'tables and pictures: {out}' in capsys.readouterr().out
  with (out / 'changes.csv').open() as file:
    rows = list(csv.DictReader(file))
  # Runs, steps, matrices of each of three layers.
  assert len(rows) == 4 * 3 * 7 * 3
  assert {row['method'] for row in rows} == {'dora over nf4', 'full'}
  # A row by hand, of a run whose base is not the model's weights.
  run = load_run(trained / 'dora-0', 2)
  start, after = (
    attach(run.base, adapter) for adapter in (run.initial, run.trained)
  )
  name = 'layers/1/mlp/down/kernel'
  (want,) = analysis.changes(start, after, name)
  (row,) = (
    row
    for row in rows
    if (row['run'], row['step'], row['name'])
    == (str(trained / 'dora-0'), '2', name)
  )
  # A run that went on from an adapter began there, not at its base.
  more = untrained(trained / 'more')
  begun = attach(more.base, more.trained)
  more.restore(1)
  (first,) = analysis.changes(begun, attach(more.base, more.trained), name)
  (whole,) = analysis.changes(more.base, begun, name)
  (one,) = (
    row
    for row in rows
    if (row['run'], row['step'], row['name'])
    == (str(trained / 'more'), '1', name)
  )
  assert float(one['direction']) == pytest.approx(first.direction, rel=1e-3)
  assert first.direction < whole.direction / 2
  assert float(row['magnitude']) == pytest.approx(want.magnitude, rel=1e-5)
  assert float(row['direction']) == pytest.approx(want.direction, rel=1e-4)
  assert want.direction > 1e-6
  # Ranks are of the last checkpoint.
  assert all(bool(row['rank']) == (row['step'] == '3') for row in rows)
  text = (out / 'changes.md').read_text()
  rs = []
  for run in ('dora-0', 'dora-1', 'more'):
    own = [r for r in rows if r['run'].endswith(run)]
    moved = [
      analysis.Change('', float(r['magnitude']), float(r['direction']), 0)
      for r in own
    ]
    rs.append(analysis.correlation(moved))
  (first,) = re.findall(r'\| dora over nf4 \| 3 \| ([-.\d]+) ±', text)[:1]
  assert float(first) == pytest.approx(statistics.fmean(rs), abs=1e-3)
  for picture in ('decomposition.png', 'maps.png'):
    assert (out / picture).stat().st_size > 20_000


def test_runs_without_checkpoints_are_named(tmp_path, monkeypatch, capsys):
  out = str(tmp_path / 'out')
  assert cli.main(['analyze', str(tmp_path), '--out', out]) == 1
  assert 'no run folder' in capsys.readouterr().err
  with pytest.raises(FileNotFoundError, match=r'train\.keep_last'):
    study.trace(tmp_path)
  with pytest.raises(SystemExit):
    cli.main(['analyze', '--out', out])
  assert 'expected run folders, or --model' in capsys.readouterr().err
  with pytest.raises(SystemExit):
    cli.main(['analyze', str(tmp_path), '--text', 'a.txt', '--out', out])
  assert 'are of --model' in capsys.readouterr().err
  for more, words in (
    (['--own', '-3'], '--own=-3: at least 0'),
    (['--own', '3', '--limit', '9'], '--limit is of --text'),
  ):
    with pytest.raises(SystemExit):
      cli.main(['analyze', '--model', 'some', *more, '--out', out])
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_of_weights(tmp_path, capsys):
  model = tiny.write(tmp_path / 'model')
  text = tmp_path / 'text.txt'
  text.write_text('three and four is seven; ' * 60)
  out = tmp_path / 'out'
  words = ['analyze', '--model', str(model), '--text', str(text)]
  words += [
    '--out',
    str(out),
    '--limit',
    '1200',
    '--targets',
    '.*/(q|up)/kernel',
  ]
  assert cli.main(words) == 0
  written = (out / 'formats.md').read_text()
  assert (out / 'formats.png').stat().st_size > 10_000
  _, params, _ = tiny.loaded()
  for form in study.FORMATS:
    _, error = form.tree(params, '.*/(q|up)/kernel')
    (row,) = re.findall(rf'\| {re.escape(str(form))} \|.*', written)
    assert f'{error:.2%}' in row
    perplexity, least, most, ratio, low, high = map(
      float, re.findall(r'[\d.]+', row.split('%')[1])
    )
    assert least <= perplexity <= most and low <= ratio <= high
    # The same windows are drawn again for both.
    assert high - low < (most - least) / perplexity
    (whole,) = re.findall(r'\| float32 \| 32 \| 0 \| ([\d.]+)', written)
    assert perplexity / float(whole) == pytest.approx(ratio, rel=2e-3)
  assert 'layers/mlp/up/kernel' in written
  assert 'stays' not in written
  # What cannot be is said before anything is loaded or written.
  gone = [*words[:4], 'gone.txt', '--out', str(tmp_path / 'none')]
  assert cli.main(gone) == 1
  assert 'gone.txt' in capsys.readouterr().err
  assert not (tmp_path / 'none').exists()


@pytest.mark.slow
def test_a_text_of_its_own(tmp_path):
  """Each is what it was when it was written, and no format reads it better."""
  model = tiny.write(tmp_path / 'model', tied=False)
  written = study.of_weights(
    str(model), tmp_path, own=40, length=32, targets='.*/(q|up|down)/kernel'
  )
  ratios = re.findall(r'\| ([\d.]+) \([\d.]+ to [\d.]+\) \|$', written, re.M)
  assert len(ratios) == 4 and min(map(float, ratios)) > 1
  decoder, params, tokenizer = tiny.loaded(tied=False)
  said = study.own_texts(decoder, params, 1, 40, 32)
  assert {len(ids) for ids in said} == {32}
  assert len(set(map(tuple, said))) == 40
  texts = '\n\n'.join(map(tokenizer.decode, said))
  assert (tmp_path / 'own.txt').read_text() == texts
  (model / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='has no tokenizer, which a text needs'):
    study.of_weights(str(model), tmp_path, own=2, targets='.*/q/kernel')
  assert 'NF4' in study.of_weights(str(model), tmp_path, targets='.*/q/kernel')
  with pytest.raises(ValueError, match="text='a' and own=2: expected one"):
    study.of_weights(str(model), tmp_path, 'a', own=2, targets='.*')


def test_what_a_format_leaves_is_named(tmp_path):
  model = tiny.write(tmp_path / 'model')
  text = study.of_weights(
    str(model),
    tmp_path,
    targets='.*/(q|down)/kernel',
    formats=[Format('int4'), Format('int4', 128)],
  )
  (left,) = re.findall('.*stays.*', text)
  assert left.startswith('Int4, blocks of 128: layers/attn/q/kernel stays: ')


def test_a_format_that_fits_nothing(tmp_path):
  model = tiny.write(tmp_path / 'model')
  with pytest.raises(ValueError, match=r'nothing that .*block_size=4096'):
    study.of_weights(
      str(model),
      tmp_path,
      targets='.*/q/kernel',
      formats=[Format('nf4', 4096)],
    )
  assert json.loads((model / 'config.json').read_text())
