"""The benchmarks' common ground; that each of them runs, and what it says."""

import argparse
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import report
import result
import tiny


def arguments(folder: Path, **more) -> argparse.Namespace:
  flags = result.parser('').parse_args(['--out', str(folder)])
  return argparse.Namespace(**vars(flags), **more)


def test_a_ratio_is_the_median_of_pairs_not_of_medians():
  ours, theirs = [1.0, 2.0, 9.0], [2.0, 8.0, 9.0]
  assert result.ratio(ours, theirs)['median'] == 0.5
  assert result.spread(ours)['median'] / result.spread(theirs)['median'] == 0.25


def test_a_spread_has_quartiles_and_units():
  got = result.spread([0.005, 0.001, 0.004, 0.002, 0.003], 1e3)
  assert got == {'median': 3.0, 'low': 2.0, 'high': 4.0, 'rounds': 5}
  assert result.spread([2.0])['low'] == result.spread([2.0])['high'] == 2.0
  with pytest.raises(ValueError, match='longer'):
    result.ratio([1.0], [1.0, 2.0])


def test_turns_alternate_and_the_first_call_does_not_count():
  said = []
  ways = {name: lambda name=name: said.append(name) for name in 'abc'}
  seconds = result.interleave(ways, 3)
  assert ''.join(said) == 'abc' + 'abc' + 'cba' + 'abc'
  assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(
    'abc', 3
  )
  with pytest.raises(ValueError, match='rounds=0'):
    result.interleave(ways, 0)


def test_a_short_function_fills_its_turn(monkeypatch):
  clock = []  # A call takes a second.
  monkeypatch.setattr(result.time, 'perf_counter', lambda: len(clock))
  got = result.interleave({'short': lambda: clock.append(1)}, 2, 10)
  assert len(clock) == 1 + 1 + 2 * 10
  assert got == {'short': [1.0, 1.0]}


def test_a_result_says_on_what_it_was_measured(tmp_path, monkeypatch):
  script = result.ROOT / 'experiments/benchmarks/some.py'
  words = [str(script), '--model=/home/me/llama', '--out', str(tmp_path)]
  monkeypatch.setattr(sys, 'argv', words)
  args = arguments(tmp_path, model='/home/me/llama', rank=16)
  rows = [{'method': 'LoRA', 'ms': result.spread([1.0, 2.0])}]
  result.write('some', 'What it measures.', rows, args, plot='ms')
  text = (tmp_path / 'some.json').read_text()
  held = json.loads(text)
  assert held['rows'] == rows
  assert held['command'].startswith('python experiments/benchmarks/some.py ')
  assert held['arguments'] == {
    'rounds': 7,
    'seed': 0,
    'model': '.../llama',
    'rank': 16,
  }
  assert held['seeds'] == [0]
  assert held['hardware']['cores'] >= 1
  assert held['hardware']['gpu'] is None
  assert {'python', 'jax', 'jaxlib', 'flax'} <= set(held['versions'])
  assert held['commit'] is None or len(held['commit']) in (40, 41)
  for private in ('/home', str(tmp_path), str(result.ROOT)):
    assert private not in text, private


def held(tmp_path, name='some', **changes):
  """A result of three columns of labels, on disk and as it was written."""
  spread = result.spread([1.0, 2.0, 4.0])
  rows = [
    {'batch': n, 'method': m, 'by': by, 'ms': spread, 'of LoRA': None}
    for n in (1, 8)
    for m in ('LoRA', 'DoRA')
    for by in ('PEFT', 'ours')
  ]
  rows[-1]['of LoRA'] = result.spread([1.25])
  args = arguments(tmp_path)
  made = result.write(name, 'One thing.', rows, args, 'ms', ['A note.'])
  made |= changes
  (tmp_path / f'{name}.json').write_text(json.dumps(made))
  return made


def test_a_table_shows_medians_and_quartiles_and_no_empty_column(tmp_path):
  made = held(tmp_path)
  lines = report.markdown(made).splitlines()
  assert lines[0] == 'One thing.'
  assert lines[2] == '| batch | method | by | ms | of LoRA |'
  assert lines[4] == '| 1 | LoRA | PEFT | 2.00 (1.50 to 3.00) |  |'
  assert lines[11] == '| 8 | DoRA | ours | 2.00 (1.50 to 3.00) | 1.25 |'
  assert '* A note.' in lines
  assert 'of LoRA' not in report.table(made['rows'][:-1])


@pytest.mark.parametrize(
  ('value', 'said'),
  [
    (12345.6, '12,346'),
    (34.56, '34.6'),
    (-3.456, '-3.46'),
    (0.5, '0.50'),
    (0.0123, '0.012'),
    (2.5e-5, '2.5e-05'),
    (0.0, '0'),
  ],
)
def test_numbers_have_few_digits(value, said):
  assert report.number(value) == said


def test_different_grounds_are_not_mixed_in_silence(tmp_path):
  made = held(tmp_path, 'one')
  held(tmp_path, 'two')
  assert 'different' not in report.report(report.read(tmp_path))
  held(tmp_path, 'three', commit='0' * 40)
  said = report.report(report.read(tmp_path))
  assert said.startswith('**These results are of 2 different machines')
  assert '### three (ground 2)' in said and '### two (ground 1)' in said
  held(tmp_path, 'four', hardware=made['hardware'] | {'gpu': 'H100'})
  assert 'of 3 different' in report.report(report.read(tmp_path))


def test_what_is_no_result_is_named(tmp_path):
  with pytest.raises(ValueError, match='no results'):
    report.read(tmp_path)
  (tmp_path / 'other.json').write_text('{"rows": []}')
  with pytest.raises(ValueError, match=r'other\.json: no result'):
    report.read(tmp_path)


def test_a_report_draws(tmp_path, monkeypatch, capsys):
  held(tmp_path)
  tables = tmp_path / 'report.md'
  words = ['report.py', str(tmp_path), '--tables', str(tables)]
  monkeypatch.setattr(sys, 'argv', words)
  report.main()
  assert tables.read_text() == capsys.readouterr().out
  picture = (tmp_path / 'some.png').read_bytes()
  assert picture.startswith(b'\x89PNG') and len(picture) > 5000


def test_a_gpu_is_busy_for_what_its_streams_say(monkeypatch, tmp_path):
  def planes(*names):
    event = types.SimpleNamespace(duration_ns=2e6)
    lines = [
      types.SimpleNamespace(name=name, events=[event, event])
      for name in ('Stream #1(Compute)', 'XLA Ops')
    ]
    made = [types.SimpleNamespace(name=name, lines=lines) for name in names]
    data = types.SimpleNamespace(planes=made)
    monkeypatch.setattr(
      result.jax.profiler.ProfileData, 'from_file', lambda path: data
    )

  calls = []
  planes('/host:CPU', '/device:GPU:0')
  assert result.busy(lambda: calls.append(1)) == 4e-3
  assert len(calls) == 2  # The first compiles.
  planes('/host:CPU')
  assert result.busy(lambda: None) is None


def test_what_decides_on_a_kernel():
  def row(shape, work, by, of_copy):
    of_copy = result.spread([of_copy])
    return {'I x O': shape, 'work': work, 'by': by, 'of copy': of_copy}

  rows = [
    row('64 x 64', 'dequantize', 'ours', 0.1),
    row('128 x 128', 'dequantize', 'ours', 0.85),
    row('128 x 128', 'dequantize', 'bitsandbytes', 0.2),
    row('128 x 128', 'product, M = 1', 'ours', 0.55),
  ]
  enough, kernel = tiny.script('benchmarks/nf4.py').verdict(rows)
  assert enough.startswith('dequantize, 128 x 128: 0.85 of copy bandwidth')
  assert enough.endswith('XLA is enough.')
  assert '0.55' in kernel and kernel.endswith('a kernel may pay.')
  # Where a GPU's time is known, that.
  nf4 = tiny.script('benchmarks/nf4.py')
  rows[1] |= {nf4.OF: result.spread([0.7])}
  assert '0.70' in nf4.verdict(rows)[0]


def run(script: str, *flags: str, **environment: str):
  """A benchmark as a user starts it, on CPU."""
  script = str(result.ROOT / 'experiments' / 'benchmarks' / script)
  program = [script] if script.endswith('.sh') else [sys.executable, script]
  path = {'PYTHONPATH': str(result.ROOT), 'JAX_PLATFORMS': 'cpu'}
  clean = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return subprocess.run(
    [*program, *flags],
    env=clean | path | environment,
    capture_output=True,
    text=True,
    timeout=1800,
  )


@pytest.mark.slow
def test_the_script_for_a_gpu_works_at_a_size_for_this_machine(tmp_path):
  done = run('gpu.sh', TINY='1', OUT=str(tmp_path), PYTHON=sys.executable)
  failed = re.findall(r'^  (\w+) \(', done.stderr, re.MULTILINE)
  assert not failed, done.stdout + done.stderr
  assert done.returncode == 0
  for name in ('nf4', 'step', 'decode', 'large-tiny'):
    assert json.loads((tmp_path / f'{name}.json').read_text())['rows'], name
  for name in ('nf4', 'decode'):
    assert (tmp_path / f'{name}.png').is_file()
  said = (tmp_path / 'report.md').read_text()
  assert '### nf4' in said and '### decode' in said and '| QDoRA |' in said


def test_a_part_that_fails_is_named_and_stops_no_other(tmp_path):
  fake = tmp_path / 'python'
  fake.write_text(
    '#!/bin/sh\ncase "$*" in *nf4.py*) exit 3;; *large.py*) kill -9 $$;; esac\n'
  )
  fake.chmod(0o755)
  done = run('gpu.sh', TINY='1', OUT=str(tmp_path), PYTHON=str(fake))
  assert done.returncode == 1
  assert 'FAILED: 2 of 6 parts:' in done.stderr
  assert '  nf4 (exit code 3)' in done.stderr
  assert '  large (' in done.stderr
  assert '== report' in done.stdout


def test_without_a_gpu_the_script_says_so(tmp_path):
  done = run('gpu.sh', OUT=str(tmp_path), PATH='/usr/bin:/bin', PYTHON='false')
  assert done.returncode == 2
  assert 'no GPU' in done.stderr and 'TINY=1' in done.stderr


@pytest.mark.slow
def test_loading(tmp_path):
  flags = ('--directory', 'tiny', '--rounds', '1', '--out', str(tmp_path))
  done = run('load.py', *flags)
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / 'load.json').read_text())['rows']
  assert [row['loaded'] for row in rows] == ['safetensors', 'as it is', 'NF4']


@pytest.mark.slow
def test_both_sides_say_the_same_tokens(tmp_path):
  for package in ('torch', 'peft', 'bitsandbytes'):
    pytest.importorskip(package)
  model = tiny.write(tmp_path / 'model')
  flags = ('--tokens', '3', '--rounds', '1', '--batches', '2')
  out = ('--out', str(tmp_path))
  done = run('decode.py', '--model', str(model), *flags, *out)
  assert done.returncode == 0, done.stderr
  assert 'the same 3 tokens on both sides' in done.stderr
  text = (tmp_path / 'decode.json').read_text()
  assert str(tmp_path) not in text
  by = [row['by'] for row in json.loads(text)['rows']]
  assert (by.count('ours'), by.count('PEFT')) == (8, 6)
