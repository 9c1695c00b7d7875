"""Guanaco (QLoRA paper, sections 5 and B): conversations of OpenAssistant.

  qdora train --config experiments/configs/guanaco.py:7b --workdir runs/guanaco
  qdora generate --workdir runs/guanaco --questions FILE --out answers.jsonl

FILE holds Vicuna's 80 questions in FastChat's form, as the answers are then, to
be judged elsewhere. The paper's settings: rank 64, alpha 16 on all linear
layers, batches of 16, 1,875 steps, gradients clipped at .3. Its scores are
relative to ChatGPT's, judged by GPT-4, of QLoRA: --config.adapter.method=lora.

  form   base        lr    dropout  score   memory there  time   memory (plan)
  :7b    LLaMA-7B    2e-4  .1       87.0%   5 GB          0.3 h  7 GB
  :13b   LLaMA-13B   2e-4  .1       90.4%   10 GB         0.6 h  12 GB
  :33b   LLaMA-33B   1e-4  .05      97.8%   21 GB         1.6 h  27 GB
  :65b   LLaMA-65B   1e-4  .05      99.3%   41 GB         3.2 h  49 GB

What `qdora plan` says is of one GPU and 16 microbatches, the optimizer's state
paged to the host; the paper counts the model alone. Time is what its work takes
an H100 at half its peak, all rows full. None was run here: scores are
unmeasured. Theirs learn every token of a conversation, and so do these; they
read timdettmers/openassistant-guanaco from the hub.

With no more said, the same of SmolLM2-135M on the 953 conversations of
../shared/data. `guanaco.py:tiny` takes 4 steps of a small part of them: 60 s
and 1.5 GB on two CPU cores beside other work, and nothing learned worth a
figure.
"""

import runpy
from pathlib import Path

import ml_collections

DATA = '../shared/data/oasst1_guanaco_subset'
HUB = 'guanaco:hub:timdettmers/openassistant-guanaco?split='
# Base, learning rate, dropout: table 9 and section B.2 of the paper.
MODELS = {
  '7b': ('huggyllama/llama-7b', 2e-4, 0.1),
  '13b': ('huggyllama/llama-13b', 2e-4, 0.1),
  '33b': ('huggyllama/llama-30b', 1e-4, 0.05),
  '65b': ('huggyllama/llama-65b', 1e-4, 0.05),
}


def get_config(form: str = '') -> ml_collections.ConfigDict:
  base = runpy.run_path(str(Path(__file__).with_name('base.py')))
  config = base['get_config']()
  config.data.path = f'guanaco:{DATA}/oa_questions.jsonl'
  config.data.template = 'guanaco'
  config.data.learn_prompts = True
  config.data.too_long = 'truncate'
  config.data.eval_size = 50
  config.adapter.rank = 64
  config.adapter.alpha = 16.0
  config.adapter.dropout = 0.1
  config.train.seq_len = 512
  config.train.batch_size = 16
  config.train.microbatches = 16
  config.train.steps = 1875
  config.train.save_every = 250
  config.optim.lr = 2e-4
  # .03 of the steps; then constant.
  config.optim.warmup_steps = 56
  config.optim.clip = 0.3
  # Nobody answers an open question word for word.
  config.eval.exact_match = False
  config.eval.max_new_tokens = 256
  if form == 'tiny':
    config.data.train_size = 50
    config.data.eval_size = 2
    config.train.seq_len = 256
    config.train.batch_size = 1
    config.train.microbatches = 1
    config.train.steps = 4
    config.optim.lr = 1e-3
    config.optim.warmup_steps = 0
  elif form in MODELS:
    config.model.name, config.optim.lr, config.adapter.dropout = MODELS[form]
    config.data.path = f'{HUB}train'
    config.data.eval_path = f'{HUB}test'
    config.optim.paged = 'host'
  elif form:
    raise ValueError(f'no form {form!r}; forms: tiny, {", ".join(MODELS)}')
  return config
