"""The table before training tells the truth; the picture is a picture."""

import re

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.image
import pytest
import tiny

from qdora_jax import AdapterSpec, QuantSpec, init_adapter, paths, report
from qdora_jax.evaluate import Score
from qdora_jax.report import by_kind, describe, duration, nbytes, plot, short

# Layers x (q, k, v, o, gate, up, down) of the tied tiny model.
KERNELS = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
REST = 256 * 64 + 3 * 2 * 64 + 64


def rows(text):
  """{path: cells} of describe's table."""
  lines = [re.split(r'\s{2,}', line) for line in text.splitlines()]
  assert lines[0] == ['parameter', 'shape', 'stored as', 'bytes', 'trained']
  return {line[0]: line[1:] for line in lines[1:] if len(line) > 3}


def test_bytes_are_what_arrays_take():
  tree = {'a': jnp.zeros((3, 5), jnp.bfloat16), 'b': jnp.zeros(7, jnp.uint8)}
  assert nbytes(tree) == 37


def test_a_table_of_qdora():
  _, base, _ = tiny.loaded(quant=QuantSpec(double_quant=False))
  spec = AdapterSpec(
    rank=4, targets=r'.*/(q|up)/kernel', rank_pattern={r'layers/2/.*': 2}
  )
  adapter = init_adapter(jax.random.key(0), base, spec)
  text = describe(base, adapter, QuantSpec(double_quant=False))
  table = rows(text)
  assert table.keys() == paths.flatten(base).keys()
  q = table['layers/attn/q/kernel']
  # Half a byte a weight and four bytes a block of 64.
  size = 3 * 64 * 64 // 2 + 3 * 64 * 4
  assert q[0] == '3 x 64 x 64'
  assert q[2:] == [f'{size:,}', 'dora r=2/4']
  assert 'nf4' in q[1]
  embed = table['embed/embedding']
  assert embed[0] == '256 x 64'
  assert embed[2:] == [f'{256 * 64 * 4:,}']
  # A, B and magnitude of q and up, padded to rank 4.
  trained = 3 * (4 * (64 + 64) + 64 + 4 * (64 + 128) + 128)
  total = KERNELS + REST
  packed = KERNELS // 2 + KERNELS // 64 * 4
  assert text.splitlines()[-2:] == [
    f'bytes: float32 {REST * 4 / 1e6:.1f} MB, nf4/64 {packed / 1e6:.1f} MB, '
    f'trained {trained * 4 / 1e6:.1f} MB',
    f'trained: {trained:,} parameters, {trained / total:.2%} of the {total:,} '
    'of the model',
  ]
  assert by_kind(base, adapter) == {
    'nf4/64': packed,
    'float32': REST * 4,
    'trained': trained * 4,
  }


def test_a_table_of_some_layers_and_kernels_left_as_they_are():
  _, base, _ = tiny.loaded(quant=QuantSpec(block_size=128))
  spec = AdapterSpec('lora', 4, targets=r'layers/[12]/mlp/up/kernel')
  adapter = init_adapter(jax.random.key(0), base, spec)
  text = describe(base, adapter, QuantSpec(block_size=128))
  table = rows(text)
  assert table['layers/mlp/up/kernel'][3] == 'lora r=4 (2 layers)'
  left = re.findall(
    r'left in full precision: (\S+): block_size=128 .*I=64', text
  )
  # Only down has an in axis of 128.
  kernels = {p for p in table if p.endswith('kernel')}
  assert set(left) == kernels - {'layers/mlp/down/kernel'}
  assert 'nf4' in table['layers/mlp/down/kernel'][1]
  assert 'nf4' not in table['layers/mlp/up/kernel'][1]


def test_a_table_of_full_fine_tuning():
  _, params, _ = tiny.loaded()
  text = describe({}, params)
  total = KERNELS + REST
  assert {cells[3] for cells in rows(text).values()} == {'all of it'}
  assert f'trained: {total:,} parameters, 100.00% of the {total:,}' in text
  assert by_kind({}, params) == {'trained': total * 4}


@pytest.mark.parametrize('steps', [1, 2, 40])
def test_curves_are_a_picture(tmp_path, steps):
  path = tmp_path / 'curves.png'
  log = [{'step': n + 1, 'loss': 2 / (n + 1)} for n in range(steps)]
  scores = {'zero-shot': Score(0, 5, 10), 'fine-tuned': Score(10, 10, 10)}
  log[0]['loss'] = None if steps > 1 else 2.0
  log[-1]['held_out_loss'] = 1.5
  plot(path, log, scores, 'title')
  picture = matplotlib.image.imread(path)
  assert picture.shape == (432, 1080, 4)
  assert picture[..., :3].std() > 0.01


@pytest.mark.parametrize('before', [True, False])
def test_held_out_losses_stand_where_they_were_taken(
  tmp_path, monkeypatch, before
):
  drawn = []
  monkeypatch.setattr(
    matplotlib.figure.Figure,
    'savefig',
    lambda figure, path, **_: (
      drawn.extend(line.get_xydata() for line in figure.axes[0].lines),
      path.touch(),
    ),
  )
  scores = {'zero-shot': Score(0, 0, 0, loss=3.0)} if before else {}
  scores['fine-tuned'] = Score(0, 0, 0, loss=1.0)
  log = [{'step': n, 'loss': 2.0} for n in (1, 2, 3, 4)]
  log[1]['held_out_loss'] = 2.5
  plot(tmp_path / 'curves.png', log, scores, 'title')
  want = [[2, 2.5], [4, 1.0]]
  assert drawn[-1].tolist() == ([[0, 3.0], *want] if before else want)


def test_curves_without_questions_are_a_picture(tmp_path):
  scores = {
    'zero-shot': Score(0, 0, 0, loss=2.0),
    'fine-tuned': Score(0, 0, 0, loss=1.0),
  }
  log = [{'step': n + 1, 'loss': 2 / (n + 1)} for n in range(5)]
  plot(tmp_path / 'curves.png', log, scores, 'title')
  picture = matplotlib.image.imread(tmp_path / 'curves.png')
  assert picture.shape == (432, 1080, 4)
  assert not list(tmp_path.glob('*.part'))


@pytest.mark.parametrize(
  'seconds, words',
  [(0.2, '0 s'), (59, '59 s'), (200, '3 min 20 s'), (18600, '5 h 10 min')],
)
def test_durations(seconds, words):
  assert duration(seconds) == words


def test_long_texts_lose_their_middle():
  assert short('a\n b') == 'a b'
  cut = short('x' * 300 + 'y' * 300, 41)
  assert cut == 'x' * 18 + ' ... ' + 'y' * 18


def test_the_estimate_counts_products_with_kernels(monkeypatch):
  """Twice the tokens take twice as long; so does what is trained and redone."""
  clock = iter(range(1000))
  monkeypatch.setattr(report.time, 'perf_counter', lambda: next(clock))
  _, base, _ = tiny.loaded(quant=QuantSpec())
  adapter = init_adapter(jax.random.key(0), base, AdapterSpec(rank=4))
  # One product of 32 x 64 with 64 x 128 takes a second of this clock.
  one = 2 * 32 * 64 * 128
  seconds = report.estimate(base, adapter, 32, 'none')
  assert seconds == 2 * 32 * 2 * KERNELS / one
  assert report.estimate(base, adapter, 32, 'block') == 1.5 * seconds
  assert report.estimate({}, tiny.loaded()[1], 32, 'none') == 1.5 * seconds


def test_a_bar_in_a_cell_does_not_end_it():
  text = report.markdown_table([['targets', 'loss'], ['.*/(q|v)/kernel', '1']])
  assert text.splitlines()[2] == r'| .*/(q\|v)/kernel | 1 |'
