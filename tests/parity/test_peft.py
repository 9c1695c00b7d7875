"""Adapter files both ways: PEFT writes and we read, we write and PEFT reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('bitsandbytes')
pytest.importorskip('peft')
pytest.importorskip('transformers')

import peft
import tiny
from golden import cases, ours, strangers, weights

from qdora_jax import (
  AdapterSpec,
  attach,
  init_adapter,
  load_adapter,
  load_pretrained,
  paths,
  save_adapter,
)

EXTRA = r'.*norm/scale|embed/embedding|lm_head/kernel'

METHODS = pytest.mark.parametrize('method', ['lora', 'dora'])


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  folder = tmp_path_factory.mktemp('llama')
  return weights.write_hf(folder, *weights.tiny_llama(cases.SEED))


def theirs(llama, method):
  """PEFT's model with an adapter away from its initialization."""
  model = strangers.adapted(strangers.load(llama), method, 4, 8.0)
  return strangers.perturb(model, 3).eval()


@METHODS
def test_we_read_what_peft_writes(llama, method, tmp_path):
  model = theirs(llama, method)
  with strangers.quiet():
    model.save_pretrained(tmp_path)
  decoder, base, *_ = load_pretrained(llama)
  params = attach(base, load_adapter(tmp_path, base))
  got = ours.logits(decoder, params, cases.prompt())
  golden = strangers.logits(model, cases.prompt())
  assert ours.relative(got, golden) <= 1e-5
  plain = ours.logits(decoder, base, cases.prompt())
  assert ours.relative(plain, golden) > 1e-2


@METHODS
def test_we_go_on_training_what_peft_trained(llama, method, tmp_path):
  model = theirs(llama, method)
  with strangers.quiet():
    model.save_pretrained(tmp_path)
  decoder, base, *_ = load_pretrained(llama)
  trained = load_adapter(tmp_path, base)
  tokens = cases.tokens()[:6]
  got = ours.losses_of(decoder, base, trained, tokens, cases.LR)
  golden = strangers.losses_of(model, tokens, cases.LR)
  assert golden[-1] < 0.95 * golden[0]
  assert ours.apart(got, golden) <= 1e-4


@METHODS
def test_peft_reads_what_we_write(llama, method, tmp_path):
  decoder, base, *_ = load_pretrained(llama)
  adapter = ours.adapter(base, method, 4, 8.0)
  for n, linear in enumerate(weights.LINEARS):
    node = ours.kernel(adapter, linear)
    b = weights.matrix(n, node.lora_b.shape, 0.05)
    node = node.replace(lora_b=jnp.asarray(b))
    if method == 'dora':
      m = weights.matrix(n, node.magnitude.shape, 0.05)
      node = node.replace(magnitude=node.magnitude + m)
    adapter = ours.with_kernel(adapter, linear, node)
  save_adapter(tmp_path, adapter, str(llama))
  with strangers.quiet():
    model = peft.PeftModel.from_pretrained(strangers.load(llama), tmp_path)
  golden = strangers.logits(model.eval(), cases.prompt())
  got = ours.logits(decoder, attach(base, adapter), cases.prompt())
  assert np.abs(golden).max() > 0
  assert ours.relative(got, golden) <= 1e-5
  plain = ours.logits(decoder, base, cases.prompt())
  assert ours.relative(plain, golden) > 1e-2


@pytest.mark.parametrize('tied', [True, False])
def test_what_is_trained_beside_an_adapter_is_peft_modules_to_save(
  tied, tmp_path
):
  """Norms, embedding and head, both ways."""
  llama = weights.write_hf(tmp_path / 'llama', *weights.tiny_llama(5, tied))
  decoder, base, *_ = load_pretrained(llama)
  spec = AdapterSpec(
    'lora',
    4,
    8.0,
    targets='.*/(q|down)/kernel',
    trainable=EXTRA if not tied else EXTRA.rpartition('|')[0],
  )
  adapter = init_adapter(jax.random.key(0), base, spec)
  adapter = tiny.perturbed(
    {'layers': {k: adapter['layers'][k] for k in ('attn', 'mlp')}}
  ) | {
    'final_norm': {'scale': adapter['final_norm']['scale'] * 1.5},
    'embed': {'embedding': adapter['embed']['embedding'] * 1.25},
    **(
      {} if tied else {'lm_head': {'kernel': adapter['lm_head']['kernel'] * 2}}
    ),
  }
  for norm in ('attn_norm', 'mlp_norm'):
    adapter['layers'][norm] = {'scale': base['layers'][norm]['scale'] * 0.75}
  save_adapter(tmp_path / 'out', adapter, str(llama), tied=tied)
  with strangers.quiet():
    model = peft.PeftModel.from_pretrained(
      strangers.load(llama), tmp_path / 'out'
    )
  golden = strangers.logits(model.eval(), cases.prompt())
  got = ours.logits(decoder, attach(base, adapter), cases.prompt())
  assert ours.relative(got, golden) <= 1e-5
  loaded = load_adapter(tmp_path / 'out', base)
  mine, again = paths.flatten(adapter), paths.flatten(loaded)
  assert mine.keys() == again.keys()
  for path in mine:
    for a, b in zip(
      jax.tree.leaves(mine[path]), jax.tree.leaves(again[path]), strict=True
    ):
      np.testing.assert_array_equal(a, b)
  with strangers.quiet():
    model.save_pretrained(tmp_path / 'theirs')
  theirs = load_adapter(tmp_path / 'theirs', base)
  got = ours.logits(decoder, attach(base, theirs), cases.prompt())
  assert ours.relative(got, golden) <= 1e-5
