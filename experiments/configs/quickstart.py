"""QDoRA of SmolLM2-135M-Instruct on reversing lists of words.

  qdora train --config experiments/configs/quickstart.py \
      --workdir runs/quickstart

Two CPU cores, float32: seven minutes, 1.9 GB at the highest. Exact match on 200
held-out problems: 0.0% zero-shot, 0.0% with three solved examples, 83.5% after
80 steps (95% interval 77.7 to 88.0; one seed). LOG.md says why this task.
"""

import runpy
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  base = runpy.run_path(str(Path(__file__).with_name('base.py')))
  config = base['get_config']()
  # Reverse a list of three to eight words; no answer occurs twice.
  config.data.name = 'reasoning_gym/word_sequence_reversal'
  # The question states the answer's form; short prompts train faster.
  config.data.system = 'Be brief.'
  config.data.answer_pattern = r'[^,\s]+(, [^,\s]+)+'
  # Problems that no setting below was chosen on.
  config.data.seed = 20261123
  config.data.train_size = 640
  config.data.eval_size = 200
  # Short examples: keeping the products costs .5 GB and saves a forward pass.
  config.model.remat = 'dots'
  config.train.steps = 80
  config.train.batch_size = 8
  # Drops the longest one or two in a hundred.
  config.train.seq_len = 88
  config.train.save_every = 20
  config.optim.lr = 1e-3
  config.optim.schedule = 'linear'
  config.optim.warmup_steps = 5
  config.optim.clip = 1.0
  config.eval.max_new_tokens = 24
  return config
