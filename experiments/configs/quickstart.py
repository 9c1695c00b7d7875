"""QDoRA of SmolLM2-135M-Instruct on reversing lists of words.

  qdora train --config experiments/configs/quickstart.py \
      --workdir runs/quickstart
"""

import importlib.util
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = _base()
  config.data.name = 'reasoning_gym/word_sequence_reversal'
  config.data.system = ' '
  config.train.steps = 100
  config.model.remat = 'none'
  config.optim.lr = 1e-3
  config.optim.schedule = 'linear'
  config.optim.warmup_steps = 5
  config.eval.max_new_tokens = 40
  return config


def _base() -> ml_collections.ConfigDict:
  """base.py beside this file, from wherever it is run."""
  path = Path(__file__).with_name('base.py')
  spec = importlib.util.spec_from_file_location('base', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()
