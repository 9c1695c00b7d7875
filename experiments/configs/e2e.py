"""E2E data to text (LoRA paper, section 5.4), on SmolLM2-135M.

  qdora train --config experiments/configs/e2e.py --workdir runs/e2e \
      --config.data.path=e2e:DATA/train.txt \
      --config.data.eval_path=e2e:DATA/valid.txt \
      --config.eval.benchmarks='{"e2e:DATA/test.txt": 0}'

DATA holds the files of github.com/microsoft/LoRA, examples/NLG/data/e2e, in the
form `name : Blue Spice | area : riverside||A sentence .`; this project's own
tests and figures take them from ../shared/data/e2e_nlg. The paper trains GPT-2
medium for 5 epochs (BLEU 70.4 with LoRA); this is a smaller model, and 2,000
steps of 16 x 512 tokens, for which two CPU cores would take about a day: not
run whole. It takes 2 GB of a GPU by `qdora plan`. What 60 steps of 256 tokens
reach is in experiments/RESULTS.md. Texts are compared by the packages of the
extra `eval`.

`e2e.py:tiny` takes 4 steps of a small part of the data: 55 s and 1.1 GB on two
CPU cores beside other work, and nothing learned worth a figure.
"""

import runpy
from pathlib import Path

import ml_collections

DATA = '../shared/data/e2e_nlg'


def get_config(form: str = '') -> ml_collections.ConfigDict:
  base = runpy.run_path(str(Path(__file__).with_name('base.py')))
  config = base['get_config']()
  config.data.path = f'e2e:{DATA}/train.txt'
  config.data.eval_path = f'e2e:{DATA}/valid.txt'
  config.data.template = 'plain'
  config.data.instruction = 'In words:\n'
  config.data.eval_size = 200
  config.data.packing = True
  config.train.seq_len = 512
  config.train.batch_size = 16
  config.train.steps = 2000
  config.train.save_every = 500
  config.optim.lr = 2e-4
  config.optim.schedule = 'linear'
  config.optim.warmup_steps = 100
  config.optim.clip = 1.0
  config.eval.exact_match = False
  config.eval.before = True
  config.eval.benchmarks = {f'e2e:{DATA}/test.txt': 0}
  config.eval.batch_size = 32
  if form == 'tiny':
    config.data.train_size = 400
    config.data.eval_size = 4
    config.train.seq_len = 256
    config.train.batch_size = 1
    config.train.steps = 4
    config.eval.benchmarks = {f'e2e:{DATA}/test.txt': 2}
  elif form:
    raise ValueError(f'no form {form!r}; forms: tiny')
  return config
