"""Adapter files both ways: PEFT writes and we read, we write and PEFT reads."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('bitsandbytes')
pytest.importorskip('peft')
pytest.importorskip('transformers')

import peft
from golden import cases, ours, strangers, weights

from qdora_jax import attach, load_adapter, load_pretrained, save_adapter

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
