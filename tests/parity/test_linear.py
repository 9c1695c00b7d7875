"""`linear` against PEFT's layers, plain and over bitsandbytes' Linear4bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('bitsandbytes')
pytest.importorskip('peft')
pytest.importorskip('transformers')

from golden import strangers, weights

from qdora_jax import DoraWeight, LoraWeight, linear, nf4

SHAPES = [(64, 32, 2), (192, 96, 8), (512, 64, 16), (128, 384, 5)]


def ours(case, base, method, scale, **kwargs):
  """Output and gradients of sum(y * dy), named as `strangers.linear` does."""
  trained = {'lora_a': case.lora_a, 'lora_b': case.lora_b}
  leaf = LoraWeight
  if method == 'dora':
    trained['magnitude'] = case.magnitude
    leaf = DoraWeight

  @jax.jit
  def run(x, trained, bias, dy):
    def forward(x, trained):
      w = leaf(base=base, scale=scale, **trained, **kwargs)
      return linear(x, w, bias)

    y, back = jax.vjp(forward, x, trained)
    dx, grads = back(dy)
    return {'y': y, 'x': dx, **grads}

  return run(case.x, trained, case.bias, case.dy)


def check(got, theirs):
  """1e-5 of the largest, in every value."""
  assert set(got) == set(theirs)
  for key, value in theirs.items():
    apart = np.abs(got[key] - value).max() / np.abs(value).max()
    assert apart <= 1e-5, (key, apart)


@pytest.mark.parametrize('nf4_base', [False, True], ids=['none', 'nf4'])
@pytest.mark.parametrize('method', ['lora', 'dora'])
@pytest.mark.parametrize(('i', 'o', 'r'), SHAPES)
def test_output_and_gradients(i, o, r, method, nf4_base):
  case = weights.linear_case(i + o, i, o, r, bias=r != 8)
  rslora = r == 16
  base = jnp.asarray(case.weight.T)
  base = nf4.quantize(base) if nf4_base else base
  scale = 6.0 / (r**0.5 if rslora else r)
  check(
    ours(case, base, method, scale),
    strangers.linear(
      case, method=method, alpha=6.0, nf4=nf4_base, rslora=rslora
    ),
  )


@pytest.mark.parametrize('nf4_base', [False, True], ids=['none', 'nf4'])
@pytest.mark.parametrize('method', ['lora', 'dora'])
def test_training_dropout_with_the_same_mask(method, nf4_base):
  """PEFT's rule: DoRA's base product keeps its input undropped."""
  rate, key = 0.3, jax.random.key(3)
  case = weights.linear_case(9, 128, 48, 4)
  mask = np.asarray(jax.random.bernoulli(key, 1 - rate, case.x.shape))
  assert 0.6 < mask.mean() < 0.8
  base = jnp.asarray(case.weight.T)
  base = nf4.quantize(base) if nf4_base else base
  got = ours(case, base, method, 2.0, dropout_key=key, dropout=rate)
  options = {'method': method, 'alpha': 8.0, 'nf4': nf4_base}
  check(got, strangers.linear(case, mask=mask, rate=rate, **options))
  undropped = strangers.linear(case, **options)['y']
  assert np.abs(got['y'] - undropped).max() > 0.01 * np.abs(undropped).max()
