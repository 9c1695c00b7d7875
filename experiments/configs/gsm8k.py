"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): arithmetic in words.

  qdora train --config experiments/configs/gsm8k.py --workdir runs/gsm8k

QDoRA on the train split's 7,473 solutions, three epochs; scored is the last
number of a greedy answer on the 1,319 questions of the test split. The settings
are this project's: a rank of 16 on all linear layers. With no more said, of
SmolLM2-135M, which two CPU cores would take days for; not run whole.
`gsm8k.py:tiny` takes 4 steps of a small part: some 85 s and 1.1 GB on two CPU
cores beside other work, and nothing learned worth a figure.

`gsm8k.py:llama3-8b`, of Llama-3-8B and the data of the hub (openai/gsm8k),
takes 15 GB of one GPU by `qdora plan`, and its work 0.1 h of an H100 at half
its peak, all rows full. Not run here: the score is unmeasured.
"""

import runpy
from pathlib import Path

import ml_collections

DATA = '../shared/data/gsm8k'
HUB = 'gsm8k:hub:openai/gsm8k?name=main&split='


def get_config(form: str = '') -> ml_collections.ConfigDict:
  base = runpy.run_path(str(Path(__file__).with_name('base.py')))
  config = base['get_config']()
  config.data.path = f'gsm8k:{DATA}/train.jsonl'
  config.data.answer_pattern = r'(?s).*####\s*-?[\d.,]+\s*'
  config.data.eval_size = 100
  config.data.packing = True
  config.train.seq_len = 512
  config.train.batch_size = 16
  # 7,373 examples are some 2,900 rows of 512 tokens.
  config.train.steps = 550
  config.train.save_every = 100
  config.optim.lr = 2e-4
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 20
  config.optim.clip = 1.0
  config.eval.max_new_tokens = 256
  config.eval.batch_size = 32
  config.eval.benchmarks = {f'gsm8k:{DATA}/test.jsonl': 0}
  if form == 'tiny':
    config.data.train_size = 200
    config.data.eval_size = 2
    config.train.seq_len = 256
    config.train.batch_size = 1
    config.train.steps = 4
    config.optim.lr = 1e-3
    config.eval.exact_match = False
    config.eval.max_new_tokens = 16
    config.eval.benchmarks = {f'gsm8k:{DATA}/test.jsonl': 2}
  elif form == 'llama3-8b':
    config.model.name = 'meta-llama/Meta-Llama-3-8B'
    # A base model knows no chat template.
    config.data.template = 'alpaca'
    config.data.path = f'{HUB}train'
    config.eval.benchmarks = {f'{HUB}test': 0}
  elif form:
    raise ValueError(f'no form {form!r}; forms: tiny, llama3-8b')
  return config
