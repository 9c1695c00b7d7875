"""The training step by all methods, and runs that stop and go on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import quick_compiles  # noqa: F401

from qdora_jax import (
  AdapterSpec,
  QuantSpec,
  attach,
  init_adapter,
  load_adapter,
  norms,
  train,
)
from qdora_jax.data import Batches, Problem, encode, load_task
from qdora_jax.evaluate import Score
from qdora_jax.metrics import Progress, read_log

# Two kernels keep compiling short: a square one and a wide one.
TARGETS = r'.*/(q|down)/kernel'
ONE = r'.*/q/kernel'
METHODS = ('none', 'lora', 'dora', 'magnitude')
BATTERY = [
  (quant, method)
  for quant in ('none', 'nf4')
  for method in METHODS
  if (quant, method) != ('nf4', 'none')
]
battery = pytest.mark.parametrize('quant, method', BATTERY)


def parts(quant, method, perturb=False):
  """(model, base, trained), copied: a step takes its arguments' memory."""
  model, base, _ = tiny.loaded(quant=None if quant == 'none' else QuantSpec())
  base = jax.tree.map(lambda a: jnp.array(a, copy=True), base)
  if method == 'none':
    return model, {}, base
  spec = AdapterSpec(method, 4, 8.0, targets=TARGETS)
  adapter = init_adapter(jax.random.key(0), base, spec)
  return model, base, tiny.perturbed(adapter) if perturb else adapter


def batch_of(count=8):
  """Sums with one and two digits: completions of unequal lengths."""
  tokenizer = tiny.loaded()[2]
  section = tiny.run_config('none').data
  sums = tiny.Sums(100, 0)
  problems = [
    Problem(sums[i]['question'], sums[i]['answer'], sums[i])
    for i in range(45, 45 + count)
  ]
  examples = [encode(tokenizer, section, p) for p in problems]
  assert len({len(e.completion) for e in examples}) == 2
  return Batches.make(examples, count, 0, 0)(0)


def test_the_loss_is_the_mean_over_completion_tokens():
  model, params, _ = tiny.loaded()
  batch = batch_of()
  total = batch['weights'].sum()
  got = jax.jit(lambda p, b: train.loss(model, p, b, total))(params, batch)
  logits = jax.jit(lambda p, t: model.apply({'params': p}, t))(
    params, batch['tokens']
  )
  logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
  each = []
  for row in range(8):
    for c in np.flatnonzero(batch['weights'][row]):
      # The token that follows in the text, not the label handed over.
      at = batch['loss_at'][row, c]
      each.append(-logp[row, at, batch['tokens'][row, at + 1]])
  assert len(each) == total
  np.testing.assert_allclose(got, np.mean(each), rtol=1e-5)


@battery
def test_a_step_learns_moves_the_trained_tree_alone_and_traces_once(
  quant, method
):
  model, base, trained = parts(quant, method)
  before = jax.tree.map(np.array, (base, trained))
  optimizer = optax.adamw(2e-2 if method == 'magnitude' else 5e-3)
  step = train.make_step(model, optimizer)
  state = (trained, optimizer.init(trained))
  fixed = norms(base, trained)
  batch, losses = batch_of(), []
  for n in range(8):
    key = jax.random.key(n)
    *state, seen = step(*state, base, fixed, batch, key)
    losses.append(float(seen['loss']))
    assert np.isfinite(float(seen['grad_norm']))
  assert losses[-1] < 0.9 * losses[0]
  assert step._cache_size() == 1
  tiny.assert_same(base, before[0])
  after = state[0]
  assert jax.tree.structure(after) == jax.tree.structure(before[1])
  for new, old in zip(
    jax.tree.leaves(after), jax.tree.leaves(before[1]), strict=True
  ):
    assert new.dtype == old.dtype == jnp.float32
    assert not np.array_equal(new, old)
  # State for the trained tree alone.
  moments = [a for a in jax.tree.leaves(state[1]) if a.ndim]
  assert sum(a.size for a in moments) == 2 * sum(
    a.size for a in jax.tree.leaves(after)
  )


@pytest.mark.parametrize(
  'quant, method',
  [('none', 'none'), ('nf4', 'lora'), ('nf4', 'dora'), ('none', 'magnitude')],
)
def test_one_batch_of_eight_is_four_of_two(quant, method):
  """Loss, gradient norm and update, in spite of unequal lengths."""
  model, base, start = parts(quant, method, perturb=True)
  fixed = norms(base, start)
  results = []
  for microbatches in (1, 4):
    # The update is the gradient.
    optimizer = optax.sgd(1.0)
    step = train.make_step(model, optimizer, microbatches)
    trained = jax.tree.map(lambda a: jnp.array(a, copy=True), start)
    moved, _, seen = step(
      trained,
      optimizer.init(trained),
      base,
      fixed,
      batch_of(),
      jax.random.key(0),
    )
    change = jax.tree.map(lambda a, b: np.asarray(b) - a, moved, start)
    results.append((change, seen))
  (one, seen), (four, others) = results
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(others[name], seen[name], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
    assert tiny.relative(a, b) <= 1e-4


def test_microbatches_share_doras_norms(monkeypatch):
  """Once per step, and what they are is the norm of the adapted weight."""
  model, base, trained = parts('nf4', 'dora', perturb=True)
  calls = []

  def spy(*args):
    calls.append(args)
    return adapted(*args)

  adapted = train.adapted_norms
  monkeypatch.setattr(train, 'adapted_norms', spy)
  optimizer = optax.sgd(1.0)
  for microbatches, times in ((1, 0), (4, 1)):
    jax.eval_shape(
      train.make_step(model, optimizer, microbatches),
      *(trained, optimizer.init(trained), base, norms(base, trained)),
      *(batch_of(), jax.random.key(0)),
    )
    assert len(calls) == times


@pytest.fixture
def run(tmp_path, monkeypatch):
  """run(name, **overrides) trains; scores are made up, calls are counted."""
  tiny.use_sums(monkeypatch)
  model = tiny.write(tmp_path / 'model')
  evaluated = []

  def evaluate(self, params, shots=0, label=''):
    evaluated.append(label)
    return Score(len(evaluated), 2, 6)

  monkeypatch.setattr(train.Run, 'evaluate', evaluate)

  def call(name, **overrides):
    config = tiny.run_config(
      model,
      **{'adapter.targets': ONE, 'quant.targets': ONE, **overrides},
    )
    return train.train(config, tmp_path / name)

  call.evaluated = evaluated
  return call


def stop_at(monkeypatch, step):
  """Ctrl-C while the given step is shown, once."""
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
  return [
    {k: row[k] for k in ('step', 'loss', 'lr', 'grad_norm')} for row in rows
  ]


def test_an_interrupted_run_ends_as_if_it_had_not_been(
  run, tmp_path, monkeypatch, capsys
):
  options = {
    'train.steps': 6,
    'train.save_every': 2,
    'train.microbatches': 2,
    'adapter.dropout': 0.1,
    'optim.schedule': 'linear',
  }
  run('whole', **options)
  stop_at(monkeypatch, 5)
  with pytest.raises(KeyboardInterrupt):
    run('cut', **options)
  assert [row['step'] for row in steady(tmp_path / 'cut')] == [1, 2, 3, 4, 5]
  assert not (tmp_path / 'cut' / 'adapter').exists()
  capsys.readouterr()
  run.evaluated.clear()
  run('cut', **options)
  assert 'continuing after step 4' in capsys.readouterr().out
  # What was known before training is not asked again.
  assert run.evaluated == ['fine-tuned']
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  for file in ('adapter_model.safetensors', 'adapter_config.json'):
    mine = (cut / 'adapter' / file).read_bytes()
    assert mine == (whole / 'adapter' / file).read_bytes()
  assert steady(cut) == steady(whole)
  assert [row['step'] for row in steady(cut)] == [1, 2, 3, 4, 5, 6]
  # And a third call finds nothing to do.
  run('cut', **options)
  assert steady(cut) == steady(whole)
  # The PEFT files are the adapter of the last checkpoint.
  loaded = train.load_run(cut)
  trained, files = loaded.trained, load_adapter(whole / 'adapter', loaded.base)
  q, mine = (t['layers']['attn']['q']['kernel'] for t in (files, trained))
  np.testing.assert_array_equal(q.lora_b, mine.lora_b)
  np.testing.assert_array_equal(q.magnitude, mine.magnitude)


@pytest.mark.parametrize(
  'quant, method', [('none', 'none'), ('nf4', 'magnitude')]
)
def test_runs_without_peft_files_end_well(run, tmp_path, quant, method):
  options = {'quant.format': quant, 'adapter.method': method}
  scores = run('run', **options, **{'train.steps': 2})
  assert list(scores) == ['zero-shot', 'fine-tuned']
  assert (tmp_path / 'run' / 'curves.png').is_file()
  assert not (tmp_path / 'run' / 'adapter').exists()
  loaded = train.load_run(tmp_path / 'run')
  _, fresh, _ = tiny.loaded()
  if method == 'none':
    assert loaded.base == {}
    moved = loaded.trained['embed']['embedding']
    assert not np.array_equal(moved, fresh['embed']['embedding'])
  ids = jnp.arange(8)[None]
  assert np.isfinite(loaded.model.apply({'params': loaded.params()}, ids)).all()


def test_a_folder_of_another_config_is_refused_with_the_difference(
  run, tmp_path
):
  config = tiny.run_config('none')
  train._claim(config, tmp_path / 'run')
  train._claim(config, tmp_path / 'run')
  before = (tmp_path / 'run' / 'config.json').read_text()
  other = dataclasses.replace(
    config,
    optim=dataclasses.replace(config.optim, lr=0.5),
    adapter=dataclasses.replace(config.adapter, rank_pattern={'.*/q/.*': 2}),
  )
  with pytest.raises(ValueError) as error:
    train._claim(other, tmp_path / 'run')
  words = str(error.value)
  assert f'{tmp_path}/run holds a run of another config' in words
  assert 'config.optim.lr was 0.01, is 0.5' in words
  assert 'config.adapter.rank_pattern..*/q/.* was None, is 2' in words
  assert words.count(' was ') == 2
  assert (tmp_path / 'run' / 'config.json').read_text() == before


def test_a_base_that_changed_on_disk_is_refused(run, tmp_path):
  options = {'train.steps': 2}
  run('run', **options)
  path = tmp_path / 'model' / 'config.json'
  config = json.loads(path.read_text()) | {'rms_norm_eps': 1e-3}
  path.write_text(json.dumps(config))
  with pytest.raises(ValueError, match='belongs to another base'):
    run('run', **options)


def test_what_is_no_run_is_not_loaded(run, tmp_path):
  with pytest.raises(FileNotFoundError, match=r'none is no run folder'):
    train.load_run(tmp_path / 'none')
  config = tiny.run_config(tmp_path / 'model')
  train._claim(config, tmp_path / 'claimed')
  with pytest.raises(
    FileNotFoundError, match=r'no checkpoint in .*train first'
  ):
    train.load_run(tmp_path / 'claimed')
  assert not (tmp_path / 'none').exists()


def test_training_starts_from_the_base(run, tmp_path):
  """The tree before the first step is the base, bit for bit in its logits."""
  config = tiny.run_config(tmp_path / 'model', **{'quant.format': 'none'})
  opened = train.Run.open(config, tmp_path / 'run')
  assert load_task(config.data).train == opened.task.train
  ids = jnp.arange(8)[None]
  model, base, _ = tiny.loaded()
  apply = jax.jit(lambda p: model.apply({'params': p}, ids))
  got = apply(opened.params())
  assert tiny.relative(got, apply(base)) <= 1e-5
  same = apply(attach(opened.base, opened.trained))
  assert tiny.relative(same, apply(base)) <= 1e-5
