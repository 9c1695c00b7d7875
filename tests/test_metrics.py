"""The log of a run: whole rows, steps without gaps or doubles."""

import json

import pytest

from qdora_jax import metrics
from qdora_jax.metrics import Log, Progress, peak_memory, read_log

ROW = {'loss': 0.5, 'lr': 1e-3, 'tokens_per_second': 12.0, 'memory_bytes': 2e9}


def test_what_is_written_is_read(tmp_path):
  log = Log(tmp_path / 'metrics.jsonl')
  rows = [{'step': n, 'loss': 1 / n} for n in range(1, 4)]
  for row in rows:
    log.write(**row)
  assert read_log(log.path) == rows
  lines = log.path.read_text().splitlines()
  assert [json.loads(line) for line in lines] == rows


def test_every_row_is_on_disk_at_once(tmp_path):
  log = Log(tmp_path / 'metrics.jsonl')
  log.write(step=1)
  assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
  'resume, steps', [(0, []), (2, [1, 2]), (9, [1, 2, 3])]
)
def test_steps_that_are_run_again_are_dropped(tmp_path, resume, steps):
  path = tmp_path / 'metrics.jsonl'
  log = Log(path)
  log.write(note='no step')
  for n in range(1, 4):
    log.write(step=n)
  log = Log(path, resume)
  assert [r['step'] for r in read_log(path) if 'step' in r] == steps
  assert read_log(path)[0] == {'note': 'no step'}
  log.write(step=resume + 1)
  assert read_log(path)[-1] == {'step': resume + 1}


def test_a_line_cut_short_is_left_out_and_written_over(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
  assert read_log(path) == [{'step': 1}, {'step': 2}]
  Log(path, 2).write(step=3)
  assert [row['step'] for row in read_log(path)] == [1, 2, 3]


def test_memory_is_in_bytes():
  """An interpreter with JAX takes some 100 MB and less than 1 TB."""
  assert 5e7 < peak_memory() < 1e12


def test_memory_is_the_devices_where_it_counts(monkeypatch):
  class Device:
    def memory_stats(self):
      return {'peak_bytes_in_use': 1234}

  monkeypatch.setattr(metrics.jax, 'local_devices', lambda: [Device()])
  assert peak_memory() == 1234


def test_a_pipe_gets_a_line_now_and_then(capsys):
  progress = Progress(9, 13)
  for step in range(10, 14):
    progress.show(step, ROW)
  progress.close()
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition(':')[0] for line in lines] == [
    'step 10/13',
    'step 13/13',
  ]
  assert 'loss 0.5000, lr 1.0e-03, 12 tok/s, 2.0 GB' in lines[0]
