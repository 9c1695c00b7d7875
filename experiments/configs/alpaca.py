"""Alpaca (Taori et al. 2023): instructions, with and without an input.

  qdora train --config experiments/configs/alpaca.py:llama-7b \
      --workdir runs/alpaca

Stanford's settings with an adapter: 52,002 instructions, 3 epochs of 128
examples, 512 tokens, a cosine after .03 of warming up. They trained LLaMA-7B in
full at 2e-5 (--config.adapter.method=none --config.quant.format=none and that
rate, on several GPUs); `alpaca.py:llama-7b`, QDoRA, takes 7 GB of one GPU by
`qdora plan`, and its work 1.7 h of an H100 at half its peak, all rows full.
They published no score; the QLoRA paper has 5-shot MMLU of its Alpaca runs,
which `qdora evaluate --harness mmlu --shots 5` measures. Not run here. It reads
tatsu-lab/alpaca from the hub.

With no more said, the same of SmolLM2-135M on the 999 instructions of
../shared/data. `alpaca.py:tiny` takes 4 steps of a small part of them: 50 s and
1.2 GB on two CPU cores beside other work, and nothing learned worth a figure.
"""

import runpy
from pathlib import Path

import ml_collections

DATA = '../shared/data/alpaca_small/alpaca_en_demo.json'


def get_config(form: str = '') -> ml_collections.ConfigDict:
  base = runpy.run_path(str(Path(__file__).with_name('base.py')))
  config = base['get_config']()
  config.data.path = f'alpaca:{DATA}'
  config.data.template = 'alpaca'
  config.data.too_long = 'truncate'
  config.data.eval_size = 50
  config.train.seq_len = 512
  config.train.batch_size = 128
  config.train.microbatches = 32
  config.train.steps = 3 * 950 // 128
  config.train.save_every = 50
  config.optim.lr = 2e-4
  config.optim.schedule = 'cosine'
  # Nobody follows an open instruction word for word.
  config.eval.exact_match = False
  config.eval.max_new_tokens = 256
  if form == 'tiny':
    config.data.train_size = 50
    config.data.eval_size = 4
    config.train.seq_len = 256
    config.train.batch_size = 2
    config.train.microbatches = 1
    config.train.steps = 4
    config.optim.lr = 1e-3
  elif form == 'llama-7b':
    config.model.name = 'huggyllama/llama-7b'
    config.data.path = 'alpaca:hub:tatsu-lab/alpaca'
    config.data.eval_size = 200
    config.train.steps = 3 * 51_802 // 128
    # .03 of the steps.
    config.optim.warmup_steps = 36
  elif form:
    raise ValueError(f'no form {form!r}; forms: tiny, llama-7b')
  return config
