"""Beam search finds what that of transformers finds."""

import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

import tiny
import torch
import transformers
from test_generate import PROMPTS
from tiny import quick_compiles  # noqa: F401

from qdora_jax.beam import beam_search
from qdora_jax.generate import generate

COUNT = 8


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  folder = tiny.write_model(tmp_path_factory.mktemp('beam'), tied=False)
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()


@pytest.mark.parametrize('length_penalty', [0.0, 1.0, -1.0])
@pytest.mark.parametrize('beams', [2, 4])
@pytest.mark.parametrize('stops', [0, 1, 3])
def test_beams_of_transformers(theirs, beams, stops, length_penalty):
  """Prompts of any lengths; stop tokens that are often among the likeliest."""
  model, params, _ = tiny.loaded(tied=False)
  batch = [p for some in PROMPTS.values() for p in some]
  greedy = np.array(generate(model, params, batch, COUNT))
  words, often = np.unique(greedy[:, 1:], return_counts=True)
  stop = words[np.argsort(-often, kind='stable')[:stops]].tolist()
  got = beam_search(
    model,
    params,
    batch,
    COUNT,
    beams=beams,
    stop=stop,
    length_penalty=length_penalty,
  )
  width = max(map(len, batch))
  ids = [[0] * (width - len(p)) + p for p in batch]
  seen = [[0] * (width - len(p)) + [1] * len(p) for p in batch]
  said = theirs.generate(
    torch.tensor(ids),
    attention_mask=torch.tensor(seen),
    max_new_tokens=COUNT,
    num_beams=beams,
    do_sample=False,
    early_stopping=False,
    length_penalty=length_penalty,
    eos_token_id=stop or None,
    pad_token_id=0,
  )
  want = []
  for row in said[:, width:].tolist():
    ends = [n for n, word in enumerate(row) if word in stop]
    want.append(row[: ends[0]] if ends else row)
  assert got == want
  if stops:
    assert min(map(len, got)) < max(map(len, got))
