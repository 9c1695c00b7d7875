"""The benchmarks' common ground; that each of them runs, and what it says."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import result


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
