"""A sweep runs what is not done, and says what it found."""

import ast
import csv
import dataclasses
import json
import re
import signal

import jax
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import cli, config_file, findings, metrics, sweep
from qdora_jax.findings import Group
from qdora_jax.intervals import Mean, Measure, wilson
from qdora_jax.sweep import Sweep, grid, product, zipped

SWEEP = """
from qdora_jax.sweep import Sweep, grid, product

def get_sweep():
  return Sweep(
    question='Which rate?',
    config='tiny_config.py',
    points={points},
    x='optim.lr',
    over=['optim.lr'],
    chosen_by='exact match',
  )
"""


def test_points_are_made_by_grid_zip_and_product():
  methods = zipped({'label': ['a', 'b'], 'adapter.rank': [1, 2]})
  points = product(methods, grid('optim.lr', [0.1, 0.2]), grid('seed', [0]))
  assert points == [
    {'label': 'a', 'adapter.rank': 1, 'optim.lr': 0.1, 'seed': 0},
    {'label': 'a', 'adapter.rank': 1, 'optim.lr': 0.2, 'seed': 0},
    {'label': 'b', 'adapter.rank': 2, 'optim.lr': 0.1, 'seed': 0},
    {'label': 'b', 'adapter.rank': 2, 'optim.lr': 0.2, 'seed': 0},
  ]
  assert sweep.name_of(points[0]) == 'a,rank=1,lr=0.1,seed=0'
  assert sweep.name_of({'adapter.targets': '.*/(q|k)/kernel'}) == (
    'targets=.-q-k-kernel'
  )
  with pytest.raises(ValueError, match="'a': 1, 'b': 2"):
    zipped({'a': [1], 'b': [1, 2]})


def test_intervals_are_students():
  # t = 4.303 with two degrees of freedom; 1, 2, 3 have deviation 1.
  mean = Mean.of([1.0, 2.0, 3.0])
  assert (mean.value, mean.count) == (2.0, 3)
  assert mean.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
  assert str(mean) == '2 ± 2.5'
  assert str(Mean.of([0.12346])) == '0.1235'
  # A seed that diverged leaves no interval, and does not end the sweep.
  assert str(Mean.of([float('nan'), 1.0])) == 'nan'
  assert str(Mean.of([1.0, float('inf')])) == 'inf'
  assert str(Mean.of([4884480])) == '4,884,480'


def test_each_at_its_best_by_another_column():
  figures = [
    ({'label': 'a', 'optim.lr': 1}, 3.0),
    ({'label': 'a', 'optim.lr': 2}, 1.0),
    ({'label': 'b', 'optim.lr': 1}, 2.0),
    ({'label': 'b', 'optim.lr': 2}, float('nan')),
  ]
  one = Sweep('?', 'c.py', [], over=['optim.lr'])
  turned = dataclasses.replace(one, chosen_by='exact match')
  for some, want in ((one, [2, 1]), (turned, [1, 1])):
    found = [Group(p, {0: {some.chosen_by: value}}) for p, value in figures]
    chosen = findings.best(some, found)
    assert [g.point['optim.lr'] for g in chosen] == want


def test_differences_are_seed_by_seed():
  labels = {'label': ['a', 'b'], 'adapter.method': ['lora', 'dora']}
  points = product(
    zipped(labels),
    grid('adapter.rank', [1, 2]),
    grid('optim.lr', [0.1, 0.2]),
    grid('seed', [0, 1, 2]),
  )
  one = Sweep('?', 'c.py', points, over=['optim.lr'], pairs=[('b', 'a')])

  def group(label: str, rank: int, lr: float, *losses: float) -> Group:
    method = dict(zip(*labels.values(), strict=True))[label]
    rest = {'adapter.method': method, 'adapter.rank': rank, 'optim.lr': lr}
    rows = {seed: {'loss': loss} for seed, loss in enumerate(losses)}
    return Group({'label': label, **rest}, rows)

  # Each at its own rate; the third seed of one is not done.
  found = [
    group('a', 1, 0.1, 3.0, 5.0, 4.0),
    group('b', 1, 0.2, 2.0, 3.8),
    group('a', 2, 0.1, 3.0, 5.0, 4.0),
    group('b', 2, 0.1, 3.5, 5.5, 4.5),
  ]
  first, second = findings.paired(one, found)
  assert first.point == {'label': 'b - a', 'adapter.rank': 1}
  assert first.rows[0]['loss'] == -1.0
  assert first.rows[1]['loss'] == pytest.approx(-1.2)
  assert list(first.rows) == [0, 1]
  # Seeds differ by 2, these differences not at all.
  assert second.point == {'label': 'b - a', 'adapter.rank': 2}
  assert str(second.means['loss']) == '0.5 ± 0'


def test_every_seed_of_two_kinds_counts(tmp_path):
  """Orders of the data times rows drawn: nine runs of one thing."""
  seeds = [grid(key, range(3)) for key in ('seed', 'data.seed')]
  points = product(*seeds)
  lines = [f'"{sweep.name_of(p)}",{n}.0' for n, p in enumerate(points)]
  file = tmp_path / 'table.csv'
  file.write_text('\n'.join(['point,held-out loss', *lines]))
  (group,) = findings.read_table(Sweep('?', 'c.py', points), file)
  assert group.means['held-out loss'].count == 9
  one = Sweep('?', 'c.py', points, x='data.seed')
  with pytest.raises(
    ValueError, match=r"names 'data\.seed'; points .* averaged"
  ):
    sweep.build(one, {})


def test_rows_drawn_anew_are_repetitions_too(tmp_path):
  """What differs in its seeds alone is one thing, of the training and data."""
  file = tmp_path / 'table.csv'
  points = product(
    zipped({'seed': [0, 1], 'data.seed': [0, 1]}), grid('adapter.rank', [1, 2])
  )
  lines = [f'"{sweep.name_of(p)}",{n}.0' for n, p in enumerate(points)]
  file.write_text('\n'.join(['point,held-out loss', *lines]))
  found = findings.read_table(Sweep('?', 'c.py', points), file)
  assert [group.point for group in found] == [
    {'adapter.rank': 1},
    {'adapter.rank': 2},
  ]
  assert found[0].rows == {
    (0, 0): {'held-out loss': 0},
    (1, 1): {'held-out loss': 2},
  }


def test_what_is_tuned_is_plotted_at_its_best(tmp_path, monkeypatch):
  axes = []
  real = findings._lines
  monkeypatch.setattr(
    findings, '_lines', lambda a, *more: axes.append(a) or real(a, *more)
  )
  losses = {(1, 0.1): 3.0, (1, 0.2): 2.0, (2, 0.1): 1.0, (2, 0.2): 1.5}
  found = [
    Group({'adapter.rank': rank, 'optim.lr': lr}, {0: {'held-out loss': loss}})
    for (rank, lr), loss in losses.items()
  ]
  one = Sweep('?', 'c.py', [], x='adapter.rank', over=['optim.lr'])
  findings.plot(one, found, tmp_path / 'a.png')
  (line,) = (drawn.lines[0] for drawn in axes[0].containers)
  assert list(line.get_ydata()) == [2.0, 1.0]
  # On the x axis it is looked at itself.
  one = dataclasses.replace(one, x='optim.lr')
  findings.plot(one, found, tmp_path / 'a.png')
  assert len(axes[1].containers) == 2


def test_what_lies_far_outside_does_not_rule_the_plot(tmp_path, monkeypatch):
  axes = []
  real = findings._lines
  monkeypatch.setattr(
    findings, '_lines', lambda a, *more: axes.append(a) or real(a, *more)
  )
  losses = [1.5, 1.4, 1.45, 1.38, 90.0]
  found = [
    Group(
      {'optim.lr': 10.0**-n},
      {s: {'held-out loss': v + s / 100} for s in (0, 1)},
    )
    for n, v in enumerate(losses)
  ]
  findings.plot(Sweep('?', 'c.py', [], x='optim.lr'), found, tmp_path / 'a.png')
  low, high = axes[0].get_ylim()
  assert 1 < low < 1.38 and 1.5 < high < 2
  assert [text.get_text() for text in axes[0].texts] == ['90']
  found = found[:4]
  findings.plot(Sweep('?', 'c.py', [], x='optim.lr'), found, tmp_path / 'a.png')
  assert not axes[1].texts
  alone = [Group({'optim.lr': 1.0}, {0: {'held-out loss': float('nan')}})]
  findings.plot(Sweep('?', 'c.py', [], x='optim.lr'), alone, tmp_path / 'a.png')


@pytest.fixture
def made(tmp_path, monkeypatch):
  """Writes a sweep file of some points; gives its path."""
  tiny.use_sums(monkeypatch)
  model = tiny.write(tmp_path / 'model')
  overrides = {'train.steps': 2, 'eval.before': False, 'data.eval_size': 4}
  tiny.config_file(tmp_path, model, **overrides)

  def make(points: str) -> str:
    path = tmp_path / 'sweep.py'
    path.write_text(SWEEP.format(points=points))
    return str(path)

  return make


def test_points_that_cannot_be_are_named_before_anything_runs(
  made, tmp_path, capsys
):
  out = tmp_path / 'out'
  for points, words in (
    (
      "grid('optim.lrr', [1.0]) + grid('optim.lr', [2.0])",
      ['point lrr=1.0', 'optim.lr?'],
    ),
    (
      "product(grid('adapter.rank', [4, 'x']), grid('optim.lr', [1.0]))",
      ['point rank=x', 'expected int'],
    ),
    (
      "grid('optimm.lr', [1.0]) + grid('optim.lr', [2.0])",
      ['point lr=1.0', 'optim'],
    ),
    ("grid('optim.lr', [1.0, 1.0])", ['two points', 'lr=1.0']),
    (
      "product(grid('data.path', ['gone.jsonl']), grid('optim.lr', [1.0]))",
      ['point path=gone.jsonl', 'no such'],
    ),
    (
      "product(grid('adapter.targets', ['x/kernel']), grid('optim.lr', [1.0]))",
      ['point targets=x-kernel', "'x/kernel'", 'layers/'],
    ),
    (
      "product(grid('optim.name', ['adamv']), grid('optim.lr', [1.0]))",
      ['point name=adamv', 'adamw'],
    ),
    (
      "product(grid('mesh.fsdp', [1, 3]), grid('optim.lr', [1.0]))",
      ['point fsdp=3', 'split over 3'],
    ),
    (
      "product(grid('model.name', ['gone']), grid('optim.lr', [1.0]))",
      ['point name=gone', "'gone'"],
    ),
    (
      "product(grid('adapter.path', ['swep.py']), grid('optim.lr', [1.0]))",
      ['point path=swep.py', "config.adapter.path='swep.py': no such"],
    ),
    ('[]', ['no points']),
    ("grid('adapter.rank', [4])", ["'optim.lr', which no point has"]),
    (
      "grid('optim.lr', [1.0]),\n    pairs=[('a', 'b')]",
      ["'a', which no point is called", 'labels are none'],
    ),
    ('1 / 0', ['sweep.py:8', 'division']),
  ):
    assert cli.main(['sweep', made(points), '--out', str(out)]) == 1
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
  assert not out.exists()
  words = ['sweep', made("grid('optim.lr', [1.0])"), '--out', str(out)]
  assert cli.main([*words, '--only', 'lr=2.0']) == 1
  assert 'the points are lr=1.0' in capsys.readouterr().err
  assert cli.main(['sweep', 'gone.py', '--out', str(out)]) == 1
  assert 'gone.py: no such file' in capsys.readouterr().err


def test_an_adapter_that_a_point_makes_is_not_looked_for(made, tmp_path):
  out = tmp_path / 'out'
  first = out / 'points' / 'lr=0.1' / 'adapter'
  words = "[{'optim.lr': 0.1}, {'optim.lr': 0.2, 'adapter.path': '%s'}]"
  path = made(words % first)
  one = config_file.returned(path, 'get_sweep', Sweep)
  values = config_file.read_values(str(tmp_path / one.config), [])
  built = sweep.build(one, values)
  sweep.check(built, out)
  backward = dict(reversed(built.items()))
  with pytest.raises(FileNotFoundError, match=r'point lr=0.2'):
    sweep.check(backward, out)
  with pytest.raises(
    FileNotFoundError, match=r'point lr=0.2.*no such directory'
  ):
    sweep.check(built, tmp_path / 'other')


@pytest.mark.slow
def test_a_sweep_goes_on_after_what_failed_and_skips_what_is_done(
  made, tmp_path, capsys, monkeypatch
):
  out = tmp_path / 'out'
  points = (
    "product(grid('optim.lr', [1e-2, 1e-3]), grid('seed', [0, 1])) + "
    "grid('adapter.path', ['nothing'])"
  )
  # A directory, but no adapter.
  (tmp_path / 'nothing').mkdir()
  monkeypatch.chdir(tmp_path)
  words = ['sweep', made(points), '--out', str(out)]
  missed = []

  def note(event: str, **_) -> None:
    if event == '/jax/compilation_cache/cache_misses':
      missed.append(event)

  jax.monitoring.register_event_listener(note)
  real, calls, write = sweep.fine_tune, [], metrics.Log.write

  def write_and_interrupt(log, row):
    write(log, row)
    monkeypatch.setattr(metrics.Log, 'write', write)
    signal.raise_signal(signal.SIGINT)

  def fine_tune(config, workdir):
    missed.clear()
    calls.append(workdir.name)
    if len(calls) == 3:
      # Ctrl-C in the middle of a point.
      monkeypatch.setattr(metrics.Log, 'write', write_and_interrupt)
    real(config, workdir)
    calls.append(len(missed))

  monkeypatch.setattr(sweep, 'fine_tune', fine_tune)
  assert cli.main(words) == 130
  assert calls[0] == 'lr=0.01,seed=0' and calls[2] == 'lr=0.01,seed=1'
  # An interrupted sweep has its table.
  assert (out / 'table.csv').exists()
  calls[:] = [None, None, None]
  assert cli.main(words) == 1
  said, err = capsys.readouterr()
  assert 'continuing after step' in said
  assert '1 of 5 points failed: path=nothing' in err
  # Rates and seeds are arguments: nothing is compiled again.
  # (But for what reads a checkpoint.)
  resumed, _, *others = calls[3:]
  assert resumed == 'lr=0.01,seed=1'
  assert others == [
    *('lr=0.001,seed=0', 0, 'lr=0.001,seed=1', 0),
    'path=nothing',
  ]
  with (out / 'table.csv').open() as file:
    table = list(csv.DictReader(file))
  assert [row['point'] for row in table][-1] == 'path=nothing'
  assert 'FileNotFoundError' in table[-1]['error']
  done = table[:4]
  scores = [
    json.loads((out / 'points' / row['point'] / 'scores.json').read_text())
    for row in done
  ]
  for row, score in zip(done, scores, strict=True):
    want = score['fine-tuned']['loss']
    assert float(row['held-out loss']) == pytest.approx(want)
  text = (out / 'table.md').read_text()
  assert '# Which rate?' in text and '4 of 5 points are done' in text
  assert 'Each at its best optim.lr, by exact match' in text
  losses = [score['fine-tuned']['loss'] for score in scores]
  assert str(Mean.of(losses[:2])) in text and str(Mean.of(losses[2:])) in text
  assert (out / 'plot.png').stat().st_size > 5000
  # The table alone says the same.
  shipped = config_file.returned(words[1], 'get_sweep', Sweep)
  again = findings.read_table(shipped, out / 'table.csv')
  assert again == findings.groups(shipped, out)
  assert [len(group.rows) for group in again] == [2, 2]
  with pytest.raises(ValueError, match='no finished point of this sweep'):
    findings.read_table(Sweep('?', 'c', grid('seed', [9])), out / 'table.csv')
  # Nothing is left to run but what failed; its own table needs no run.
  calls.clear()
  assert cli.main(words) == 1
  assert calls == ['path=nothing']
  (out / 'table.md').unlink()
  assert cli.main([*words, '--table']) == 0
  assert (out / 'table.md').read_text() == text
  wrong = dataclasses.replace(shipped, chosen_by='exact watch')
  assert "column 'exact watch'" in findings.report(wrong, out)
  assert 'near: exact match' in (out / 'table.md').read_text()
  assert len(calls) == 1

  # The folders are runs like others.
  capsys.readouterr()
  assert cli.main(['runs', str(out)]) == 0
  listed = capsys.readouterr().out
  assert listed.count(' done ') == 4
  for score in scores:
    right, total = (score['fine-tuned'][k] for k in ('right', 'total'))
    assert str(Measure(right / total, *wilson(right, total))) in listed
  words = ['runs', str(out), '--compare', '--out', str(tmp_path / 'c.png')]
  assert cli.main(words) == 0
  head, *_ = capsys.readouterr().out.splitlines()[-6:]
  assert 'optim.lr' in head and 'seed' in head and 'adapter.rank' not in head
  assert (tmp_path / 'c.png').stat().st_size > 5000


def test_a_folder_without_runs_is_named(tmp_path, capsys):
  assert cli.main(['runs', str(tmp_path)]) == 1
  assert f'no run folder in {tmp_path}' in capsys.readouterr().err


SHIPPED = [
  path
  for path in sorted((tiny.EXPERIMENTS / 'sweeps').glob('*.py'))
  if 'def get_sweep' in path.read_text()
]


@pytest.mark.slow
@pytest.mark.parametrize('file', SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_sweep_can_be_built(file, tmp_path):
  """But for its data, which is not here; its docstring counts its runs."""
  one = config_file.returned(str(file), 'get_sweep', Sweep)
  overrides = ['path=', 'eval_path=', 'eval_size=0']
  words = [f'--config.data.{word}' for word in overrides]
  values = config_file.read_values(str(file.parent / one.config), words)
  values['eval']['benchmarks'] = {}
  built = sweep.build(one, values)
  sweep.check(built, tmp_path)
  words = ast.get_docstring(ast.parse(file.read_text()))
  assert re.search(rf'(?m)^{len(built)} runs of', words), len(built)
  assert f'qdora sweep experiments/sweeps/{file.name} --out' in words
  assert one.question.endswith('?')


def test_who_starts_processes_leaves_the_devices_to_them(
  made, tmp_path, monkeypatch
):
  """And who makes a table asks for neither devices nor data."""
  platforms, told = jax.config.jax_platforms, []
  monkeypatch.setattr(sweep.processes, 'call', lambda words: told.append(words))
  monkeypatch.setattr(
    sweep, 'mesh_of', lambda config: pytest.fail('asks for devices')
  )
  points = "grid('optim.lr', [1e-2, 1e-3])"
  words = ['sweep', made(points), '--out', str(tmp_path / 'out')]
  jax.config.update('jax_platforms', '')
  try:
    assert cli.main([*words, '--isolate']) == 1
    assert jax.config.jax_platforms == 'cpu'
  finally:
    jax.config.update('jax_platforms', platforms)
  assert [line[-2:] for line in told] == [
    ['--only', 'lr=0.01'],
    ['--only', 'lr=0.001'],
  ]
  monkeypatch.setattr(
    sweep, 'check', lambda *points, **options: pytest.fail('tries points')
  )
  assert cli.main([*words, '--table']) == 0


@pytest.mark.slow
def test_each_point_in_a_process_of_its_own(tmp_path, monkeypatch):
  """Its peak memory is its own, and stands in the table then."""
  monkeypatch.setenv('XLA_FLAGS', '')
  rows = [{'prompt': f'{n}+1=', 'completion': f'{n + 1}'} for n in range(30)]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  overrides = {'train.steps': 2, 'eval.before': False, 'data.eval_size': 4}
  overrides['data.path'] = str(tmp_path / 'rows.jsonl')
  tiny.config_file(tmp_path, tiny.write(tmp_path / 'model'), **overrides)
  file = tmp_path / 'sweep.py'
  file.write_text(SWEEP.format(points="grid('optim.lr', [1e-2, 1e-3])"))
  out = tmp_path / 'out'
  words = ['sweep', str(file), '--out', str(out)]
  assert cli.main([*words, '--isolate', '--config.seed=7']) == 0
  with (out / 'table.csv').open() as table:
    found = list(csv.DictReader(table))
  assert len(found) == 2 and all(float(row['peak GB']) > 0.1 for row in found)
  config = json.loads((out / 'points' / 'lr=0.001' / 'config.json').read_text())
  assert (config['optim']['lr'], config['seed']) == (1e-3, 7)
