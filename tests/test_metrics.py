"""The log of a run: whole rows, steps without gaps or doubles."""

import json

import pytest

from qdora_jax import metrics
from qdora_jax.metrics import Log, Progress, peak_memory, read_log

ROW = {'loss': 0.5, 'lr': 1e-3, 'tokens_per_second': 12.0, 'memory_bytes': 2e9}
ROW |= {'skipped': 0}


def test_what_is_written_is_read_and_on_disk_at_once(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  rows = [{'step': n, 'loss': 1 / n} for n in range(1, 4)]
  with Log(path) as log:
    for n, row in enumerate(rows, 1):
      log.write(row)
      assert read_log(path) == rows[:n]
  lines = path.read_text().splitlines()
  assert [json.loads(line) for line in lines] == rows


def test_what_was_written_after_a_position_is_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with Log(path) as log:
    positions = [log.position()]
    for n in range(1, 4):
      log.write({'step': n})
      positions.append(log.position())
  assert positions[-1] == path.stat().st_size
  path.write_bytes(path.read_bytes() + b'{"st')
  for steps in (3, 1, 0):
    with Log(path, positions[steps]) as log:
      assert log.position() == positions[steps]
    assert [r['step'] for r in read_log(path)] == [1, 2, 3][:steps]
  with Log(path, 999) as log:
    assert log.position() == 0


def test_a_line_cut_short_is_left_out(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
  assert read_log(path) == [{'step': 1}, {'step': 2}]


def test_what_is_no_json_is_not_written(tmp_path):
  """Other programs read the log: NaN is none of JSON's words."""
  with Log(tmp_path / 'metrics.jsonl') as log, pytest.raises(ValueError):
    log.write({'loss': float('nan')})


def test_no_file_no_log():
  with Log(None) as log:
    log.write({'step': 1})
    assert log.position() == 0


def test_memory_is_in_bytes():
  """An interpreter with JAX takes some 100 MB and less than 1 TB."""
  assert 5e7 < peak_memory() < 1e12


def test_memory_is_the_devices_where_it_counts(monkeypatch):
  class Device:
    def memory_stats(self):
      return {'peak_bytes_in_use': 1234}

  monkeypatch.setattr(metrics.jax, 'local_devices', lambda: [Device()])
  assert peak_memory() == 1234
  # Of two runs in a process that took as much the first alone is known.
  monkeypatch.setattr(metrics, '_told', 0)
  assert [metrics.own_peak(), metrics.own_peak()] == [1234, None]


def test_a_pipe_gets_a_line_now_and_then(capsys):
  with Progress(9, 13) as progress:
    for step in range(10, 14):
      row = ROW if step != 12 else ROW | {'loss': None, 'skipped': 1}
      progress.show(step, row)
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition(':')[0] for line in lines] == [
    'step 10/13',
    'step 12/13',
    'step 13/13',
  ]
  assert 'loss 0.5000, lr 1.0e-03, 12 tok/s, 2.0 GB' in lines[0]
  assert 'loss not finite, skipped' in lines[1]
  assert '1 skipped' in lines[1]
