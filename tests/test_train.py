"""The training step by all methods, and `fit`, which repeats it."""

import os
import signal

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
  chat,
  init_adapter,
  nf4,
  norms,
  paths,
  sharding,
  train,
  transforms,
)
from qdora_jax.data import Batches
from qdora_jax.loss import summed_loss

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
  return sums(count)[0]


def sums(count=8, **options):
  """Batches of them."""
  tokenizer = tiny.loaded()[2]
  made = tiny.Sums(100, 0)
  rows = [
    {'prompt': made[i]['question'], 'completion': made[i]['answer']}
    for i in range(45, 45 + count)
  ]
  examples = [chat.encode(tokenizer, row) for row in rows]
  assert len({int(e.learned.sum()) for e in examples}) == 2
  return Batches(examples, options.pop('batch_size', count), **options)


def test_the_loss_is_the_sum_over_learned_tokens():
  model, params, _ = tiny.loaded()
  batch = batch_of()
  total = batch['weights'].sum()
  got = jax.jit(lambda p, b: summed_loss(model, p, b))(params, batch)
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
  np.testing.assert_allclose(got, np.sum(each), rtol=1e-5)


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


@pytest.mark.slow
@pytest.mark.parametrize(
  'quant, method',
  [
    ('none', 'none'),
    ('nf4', 'dora'),
    pytest.param('nf4', 'lora', marks=pytest.mark.exhaustive),
    ('none', 'magnitude'),
  ],
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


@pytest.mark.parametrize(
  'quant, method, microbatches',
  [
    pytest.param('none', 'none', 1, marks=pytest.mark.slow),
    ('nf4', 'dora', 2),
    pytest.param('none', 'none', 2, marks=tiny.AGAIN),
    pytest.param('nf4', 'dora', 1, marks=pytest.mark.slow),
  ],
)
def test_eight_devices_are_one(quant, method, microbatches):
  """Loss, gradient norm and update, of examples of unequal length."""
  model, base, start = parts(quant, method, perturb=True)
  count = 8 * microbatches
  results = []
  for mesh in (None, sharding.make_mesh(fsdp=4, data=2)):
    trained = jax.tree.map(lambda a: jnp.array(a, copy=True), start)
    batch, here = batch_of(count), base
    optimizer = optax.sgd(1.0)
    state = train.initial_state(trained, optimizer, 0, mesh)
    placed = jax.tree.map(lambda a: a.sharding, state['trained'])
    if mesh is not None:
      here = sharding.shard(base, mesh)
      batch = sharding.shard_batch(batch, mesh)
    like = (state['trained'], state['optimizer']) if mesh else None
    step = train.make_step(model, optimizer, microbatches, like)
    rest = (here, jax.jit(norms)(here, state['trained']), batch)
    moved, after, seen = step(
      state['trained'], state['optimizer'], *rest, jax.random.key(0)
    )
    # What is trained lies where it lay, and the next step is the same program.
    assert jax.tree.all(
      jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b, a.ndim), moved, placed
      )
    )
    again = jax.tree.map(lambda a: jnp.array(a, copy=True), (moved, after))
    step(*again, *rest, jax.random.key(1))
    assert step._cache_size() == 1
    change = jax.tree.map(lambda a, b: np.asarray(b) - a, moved, start)
    results.append((change, seen))
  (one, seen), (eight, others) = results
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(others[name], seen[name], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
    assert tiny.relative(a, b) <= 1e-4


def test_microbatches_share_doras_norms(monkeypatch):
  """Once per step, and what they are is the norm of the adapted weight."""
  model, base, trained = parts('nf4', 'dora', perturb=True)
  calls = []

  def spy(*args):
    calls.append(args)
    return adapted(*args)

  adapted = transforms.adapted_norms
  monkeypatch.setattr('qdora_jax.step.adapted_norms', spy)
  optimizer = optax.sgd(1.0)
  for microbatches, times in ((1, 0), (4, 1)):
    jax.eval_shape(
      train.make_step(model, optimizer, microbatches),
      *(trained, optimizer.init(trained), base, norms(base, trained)),
      *(batch_of(), jax.random.key(0)),
    )
    assert len(calls) == times


@pytest.mark.parametrize('method', ['none', 'dora'])
def test_a_step_that_is_not_finite_moves_nothing(method):
  model, base, start = parts('none', method, perturb=True)
  optimizer = optax.adamw(1e-2)
  step = train.make_step(model, optimizer)
  state = (start, optimizer.init(start))
  before = jax.tree.map(np.array, state)
  batch, fixed = batch_of(), norms(base, start)
  for bad in (np.nan, np.inf):
    weights = np.where(batch['weights'] > 0, np.float32(bad), np.float32(0))
    broken = batch | {'weights': weights}
    *state, seen = step(*state, base, fixed, broken, jax.random.key(0))
    assert not seen['finite']
    tiny.assert_same(tuple(state), before)
  *state, seen = step(*state, base, fixed, batch, jax.random.key(0))
  assert seen['finite']
  assert step._cache_size() == 1


def test_what_is_trained_beside_an_adapter_is_trained():
  """Norms and the head, in float32, and the base stays as it is."""
  model, base, _ = tiny.loaded(tied=False, quant=QuantSpec())
  spec = AdapterSpec(
    'lora', 4, targets=ONE, trainable='.*norm/scale|lm_head/kernel'
  )
  adapter = init_adapter(jax.random.key(0), base, spec)
  extra = {
    'layers/attn_norm/scale',
    'layers/mlp_norm/scale',
    'final_norm/scale',
    'lm_head/kernel',
  }
  assert extra < paths.flatten(adapter).keys()
  got, rows = train.fit(model, base, adapter, sums(), steps=4, lr=1e-2)
  assert rows[-1]['loss'] < rows[0]['loss']
  for path in extra:
    new, old = (paths.flatten(t)[path] for t in (got, base))
    assert new.dtype == jnp.float32
    assert not np.array_equal(new, old)


@pytest.mark.parametrize(
  'rule, words',
  [
    ('.*/q/kernel', 'which is adapted already'),
    ('.*/up/kernel', 'which is stored as nf4/64 double'),
    ('layers/0/.*norm/scale', 'chosen in some layers only'),
    ('.*/scaling', 'matches no parameter'),
  ],
)
def test_what_cannot_be_trained_beside_an_adapter_is_refused(rule, words):
  _, base, _ = tiny.loaded(quant=QuantSpec())
  spec = AdapterSpec('lora', 4, targets=ONE, trainable=rule)
  with pytest.raises(ValueError, match=words):
    init_adapter(jax.random.key(0), base, spec)


def fit(steps=4, data=None, quant='nf4', method='dora', **options):
  """fit of a small adapter with dropout, and what it started from."""
  model, base, _ = tiny.loaded(quant=QuantSpec() if quant == 'nf4' else None)
  spec = AdapterSpec(method, 4, 8.0, 0.1, targets=ONE)
  adapter = init_adapter(jax.random.key(0), base, spec)
  data = sums(batch_size=4) if data is None else data
  options = {'lr': 1e-2} | options
  return train.fit(model, base, adapter, data, steps=steps, **options)


@pytest.mark.slow
def test_fit_takes_plain_values_and_any_iterable():
  """A generator of batches, and a tree that is the caller's afterwards."""
  model, base, _ = tiny.loaded(quant=QuantSpec())
  spec = AdapterSpec('dora', 4, targets=ONE)
  adapter = init_adapter(jax.random.key(0), base, spec)
  before = jax.tree.map(np.array, adapter)
  batches = (sums(batch_size=4)[n] for n in range(100))
  got, rows = train.fit(model, base, adapter, batches, steps=3, lr=1e-2)
  tiny.assert_same(jax.tree.map(np.array, adapter), before)
  assert [row['step'] for row in rows] == [1, 2, 3]
  assert rows[-1]['loss'] < rows[0]['loss']
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), got, before)
  assert all(jax.tree.leaves(changed))
  batch = sums(batch_size=4)[0]
  assert rows[0]['tokens'] == (batch['segments'] > 0).sum()
  assert len(list(batches)) == 97


def test_fit_takes_optax_as_it_is():
  rate = optax.linear_schedule(1.0, 0.0, 4)
  _, rows = fit(lr=rate, optimizer=optax.sgd)
  assert [row['lr'] for row in rows] == [1.0, 0.75, 0.5, 0.25]


def events_of(monkeypatch, **options):
  """What the loop does, in order, with a step that does nothing."""
  events, get = [], jax.device_get
  batch = {'segments': np.ones((1, 2), np.int32)}

  def batches():
    for n in range(1, 6):
      events.append(f'batch {n}')
      yield batch

  def step(trained, state, *rest):
    events.append(f'step {sum("step" in e for e in events) + 1}')
    seen = {'loss': jnp.float32(1), 'grad_norm': jnp.float32(1)}
    return trained, state, seen | {'finite': jnp.bool_(True)}

  def fetch(tree):
    if 'loss' in tree:
      events.append(f'wait {sum("wait" in e for e in events) + 1}')
    return get(tree)

  monkeypatch.setattr(train, 'make_step', lambda *_: step)
  monkeypatch.setattr(jax, 'device_get', fetch)
  model, base, _ = tiny.loaded()
  adapter = init_adapter(jax.random.key(0), base, AdapterSpec(targets=ONE))
  options = {'steps': 4, 'lr': optax.linear_schedule(1.0, 0.0, 4)} | options
  train.fit(model, base, adapter, batches(), **options)
  return events


def called(step, row, trained):
  pass


@pytest.mark.parametrize(
  'options, together',
  [
    # Of four steps, those that are waited for before the next begins.
    ({}, {4}),
    ({'callbacks': [called]}, {1, 2, 3, 4}),
    ({'callbacks': [called], 'call_every': 3}, {3, 4}),
    ({'save_every': 2, 'workdir': True}, {2, 4}),
    ({'call_every': 1, 'save_every': 1}, {4}),
  ],
)
def test_a_step_is_waited_for_when_the_next_has_begun(
  monkeypatch, tmp_path, options, together
):
  if 'workdir' in options:
    options = options | {'workdir': tmp_path}
  expected, late = [], []
  for n in range(1, 5):
    expected += [f'batch {n}', f'step {n}']
    late.append(f'wait {n}')
    while len(late) > (n not in together):
      expected.append(late.pop(0))
  assert events_of(monkeypatch, **options) == expected


def test_data_that_ends_early_ends_the_training(capsys):
  batches = [sums(batch_size=4)[n] for n in range(2)]
  _, rows = fit(data=batches)
  assert len(rows) == 2
  assert 'the data ended after 2 of 4 steps' in capsys.readouterr().out


def test_callbacks_see_every_step_and_may_log_and_stop(capsys):
  seen = []

  def note(step, row, trained):
    seen.append((step, row['loss'], paths.flatten(trained).keys()))
    return {'twice': 2 * row['loss']}

  def stop(step, row, trained):
    assert row['twice'] == 2 * row['loss']
    if step == 3:
      raise StopIteration

  _, rows = fit(callbacks=[note, stop], steps=9)
  assert [step for step, *_ in seen] == [1, 2, 3]
  assert [row['twice'] for row in rows] == [2 * loss for _, loss, _ in seen]
  assert seen[0][2] == {'layers/attn/q/kernel'}
  assert 'ended the training after step 3' in capsys.readouterr().out


def test_what_a_callback_copies_stays():
  """And what it only holds is gone after the next step, as is documented."""
  held, copied = [], []

  def keep(step, row, trained):
    held.append(trained)
    copied.append(jax.tree.map(jnp.copy, trained))

  last_one, _ = fit(callbacks=[keep], steps=3)
  tiny.assert_same(copied[2], last_one)
  first, second, last = map(jax.tree.leaves, copied)
  for a, b, c in zip(first, second, last, strict=True):
    assert np.isfinite(a).all() and (a != b).any() and (b != c).any()
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(held[:2]))
  assert 'valid until the next step' in train.fit.__doc__


@pytest.mark.exhaustive
@pytest.mark.slow
def test_it_runs_without_jit():
  """Under a debugger every number can be looked at; the result is the same."""
  options = {'steps': 1, 'data': sums(2), 'optimizer': optax.sgd}
  jitted, rows = fit(**options)
  with jax.disable_jit():
    looked_at = []

    def look(step, row, trained):
      looked_at.append(float(jax.tree.leaves(trained)[0].sum()))

    eager, others = fit(**options, callbacks=[look])
  assert len(looked_at) == 1
  for a, b in zip(rows, others, strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-4)
  for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
    assert tiny.relative(a, b) <= 1e-3


def poisoned(steps):
  """Batches of which the given ones have a loss that is no number."""
  batches = sums(batch_size=4)
  for n in range(100):
    batch = dict(batches[n])
    if n + 1 in steps:
      batch['weights'] = batch['weights'] * np.float32(np.nan)
    yield batch


def test_steps_that_are_not_finite_are_skipped_and_counted(capsys):
  rate = optax.linear_schedule(8e-3, 0.0, 8)
  _, rows = fit(6, poisoned({2, 3, 5}), lr=rate, max_skipped=3)
  assert [row['loss'] is None for row in rows] == [
    n in {2, 3, 5} for n in range(1, 7)
  ]
  assert [row['skipped'] for row in rows] == [0, 1, 2, 2, 3, 3]
  # The schedule stands still with the optimizer.
  np.testing.assert_allclose(
    [row['lr'] for row in rows], [8e-3, 7e-3, 7e-3, 7e-3, 6e-3, 6e-3], rtol=1e-6
  )
  assert 'loss not finite, skipped' in capsys.readouterr().out


def test_persistent_ones_stop_the_run_and_name_the_last_good_checkpoint(
  tmp_path,
):
  with pytest.raises(train.NotFiniteError) as error:
    fit(
      9,
      poisoned({4, 5, 6, 7}),
      max_skipped=3,
      workdir=tmp_path / 'run',
      save_every=2,
    )
  words = str(error.value)
  assert 'not finite in 3 steps in a row, up to step 6' in words
  assert f'the last good checkpoint is {tmp_path}/run/checkpoints/4' in words
  with pytest.raises(train.NotFiniteError, match='no checkpoint'):
    fit(9, poisoned(range(9)), max_skipped=2)


@pytest.mark.parametrize('told', [True, False])
def test_who_is_told_to_end_ends_though_nothing_can_be_saved(tmp_path, told):
  """SIGTERM, and the disk is full: no other run is begun, and both are said."""

  def end(step, row, trained):
    if told:
      os.kill(os.getpid(), signal.SIGTERM)
    raise OSError('No space left on device')

  want, words = OSError, '^No space left on device$'
  if told:
    want, words = KeyboardInterrupt, '^SIGTERM: not saved: No space left on'
  with pytest.raises(want, match=words) as error:
    fit(workdir=tmp_path, callbacks=[end], save_every=1)
  if told:
    assert error.value.signal == signal.SIGTERM


def test_the_trained_tree_is_float32_whatever_the_products_are():
  """Compute dtype is the model's; masters and moments stay as they are."""
  model, base, _ = tiny.loaded()
  half = model.clone(dtype=jnp.bfloat16)
  base = jax.tree.map(lambda a: a.astype(jnp.bfloat16), base)
  base['layers']['attn']['q']['kernel'] = nf4.quantize(
    base['layers']['attn']['q']['kernel']
  )
  adapter = init_adapter(jax.random.key(0), base, AdapterSpec(targets=ONE))
  step = train.make_step(half, optax.adamw(1e-3))
  state = train.initial_state(adapter, optax.adamw(1e-3), 0)
  trained, moments, seen = jax.eval_shape(
    step,
    *(state['trained'], state['optimizer'], base, norms(base, adapter)),
    *(batch_of(), jax.random.key(0)),
  )
  floats = [a.dtype for a in jax.tree.leaves((trained, moments)) if a.ndim]
  assert set(floats) == {jnp.dtype('float32')}
  assert seen['loss'].dtype == jnp.float32
  hidden = jax.eval_shape(
    lambda p: half.apply({'params': p}, jnp.ones((1, 4), int), method='hidden'),
    base,
  )[0]
  assert hidden.dtype == jnp.bfloat16
