"""Commonsense reasoning (DoRA paper, table 1): one model for eight data sets.

  qdora train --config experiments/configs/commonsense.py \
      --workdir runs/commonsense

With no more said: QDoRA of SmolLM2-135M on the seven data sets of which the
train split is in ../shared/data (107,675 rows; HellaSwag is tested on and not
trained), in the paper's settings. Three epochs are 20,189 steps, which two CPU
cores would take weeks for; not run whole. `commonsense.py:tiny` takes 4 steps
of a small part and two questions of two tests: some 80 s and 1.3 GB on two CPU
cores beside other work, and nothing learned worth a figure.

The paper's own runs, on a GPU; --config.adapter.method=lora with lr=3e-4, and
rank=16 with alpha=32 for its half rank:

  form         base         lr    LoRA  half DoRA  DoRA   time   memory
  :llama-7b    LLaMA-7B     2e-4  74.7  77.5       78.4   2.4 h  22 GB
  :llama-13b   LLaMA-13B    2e-4  80.5  80.8       81.5   4.6 h  38 GB
  :llama2-7b   Llama-2-7B   2e-4  77.6  80.5       79.7   2.4 h  22 GB
  :llama3-8b   Llama-3-8B   1e-4  80.8  85.0       85.2   2.6 h  25 GB

  qdora train --config experiments/configs/commonsense.py:llama3-8b \
      --config.data.mix='{"commonsense:commonsense_170k.json": 1}' \
      --config.train.steps=31875 --workdir runs/cs

with the file of github.com/AGI-Edgerunners/LLM-Adapters (ft-training_set), some
170,000 rows thrice; the score is the mean of eight accuracies (of answers
searched for with four beams, as in the paper's code). They were not run here:
scores are unmeasured, memory is what `qdora plan` says of one GPU, time what
its work takes an H100 at half its peak, all rows full (training alone). They
read their tests, and without that file their training data, from the hub:
147,580 rows then, which are fewer. `quant.format` is 'none' as in the paper;
'nf4' makes QLoRA and QDoRA of them. The paper's code learns the tokens of
prompts, too, and so do these.
"""

import runpy
from pathlib import Path

import ml_collections

DATA = '../shared/data/commonsense'
# Rows of each train split are its weight: an epoch has each row once.
TRAIN = {
  f'boolq:{DATA}/boolq/train.jsonl.gz': 9_427,
  f'piqa:{DATA}/piqa/train.jsonl.gz': 16_113,
  f'siqa:{DATA}/siqa/train.jsonl.gz': 33_410,
  f'winogrande:{DATA}/winogrande/train_xl.jsonl.gz': 40_398,
  f'arc_easy:{DATA}/arc_easy/train.jsonl.gz': 2_251,
  f'arc_challenge:{DATA}/arc_challenge/train.jsonl.gz': 1_119,
  f'openbookqa:{DATA}/openbookqa/train.jsonl.gz': 4_957,
}
TEST = [
  f'boolq:{DATA}/boolq/val.jsonl.gz',
  f'piqa:{DATA}/piqa/val.jsonl.gz',
  f'siqa:{DATA}/siqa/val.jsonl.gz',
  f'hellaswag:{DATA}/hellaswag/val.jsonl.gz',
  f'winogrande:{DATA}/winogrande/val.jsonl.gz',
  f'arc_easy:{DATA}/arc_easy/test.jsonl.gz',
  f'arc_challenge:{DATA}/arc_challenge/test.jsonl.gz',
  f'openbookqa:{DATA}/openbookqa/test.jsonl.gz',
]
# On the hub: rows to train on, and the split to test on.
_PARQUET = 'revision=refs/convert/parquet'
HUB = {
  'boolq:hub:google/boolq?': (9_427, 'validation'),
  f'piqa:hub:ybisk/piqa?{_PARQUET}&': (16_113, 'validation'),
  f'siqa:hub:allenai/social_i_qa?{_PARQUET}&': (33_410, 'validation'),
  'hellaswag:hub:Rowan/hellaswag?': (39_905, 'validation'),
  'winogrande:hub:allenai/winogrande?name=winogrande_xl&': (
    40_398,
    'validation',
  ),
  'arc_easy:hub:allenai/ai2_arc?name=ARC-Easy&': (2_251, 'test'),
  'arc_challenge:hub:allenai/ai2_arc?name=ARC-Challenge&': (1_119, 'test'),
  'openbookqa:hub:allenai/openbookqa?name=main&': (4_957, 'test'),
}
MODELS = {
  'llama-7b': ('huggyllama/llama-7b', 2e-4),
  'llama-13b': ('huggyllama/llama-13b', 2e-4),
  'llama2-7b': ('meta-llama/Llama-2-7b-hf', 2e-4),
  'llama3-8b': ('meta-llama/Meta-Llama-3-8B', 1e-4),
}


def get_config(form: str = '') -> ml_collections.ConfigDict:
  base = runpy.run_path(str(Path(__file__).with_name('base.py')))
  config = base['get_config']()
  config.data.mix = TRAIN
  config.data.template = 'llm_adapters'
  config.data.learn_prompts = True
  config.data.too_long = 'truncate'
  config.data.answer_pattern = (
    r'.*(true|false|(solution|option|answer|ending)[1-5])'
  )
  # The paper's validation rows.
  config.data.eval_size = 120
  config.adapter.rank = 32
  config.adapter.alpha = 64.0
  config.adapter.dropout = 0.05
  config.adapter.targets = r'.*/(q|k|v|up|down)/kernel'
  config.train.seq_len = 256
  config.train.batch_size = 16
  config.train.steps = 3 * 107_675 // 16
  config.train.save_every = 1000
  config.optim.lr = 2e-4
  config.optim.schedule = 'linear'
  config.optim.warmup_steps = 100
  config.eval.before = False
  config.eval.benchmarks = dict.fromkeys(TEST, 0)
  config.eval.batch_size = 8
  config.eval.beams = 4
  if form == 'tiny':
    config.data.train_size = 100
    config.data.eval_size = 7
    config.train.batch_size = 1
    config.train.steps = 4
    config.eval.before = True
    config.eval.exact_match = False
    config.eval.benchmarks = dict.fromkeys(TEST[:2], 2)
  elif form in MODELS:
    config.model.name, config.optim.lr = MODELS[form]
    config.quant.format = 'none'
    config.data.mix = {
      f'{source}split=train': rows for source, (rows, _) in HUB.items()
    }
    config.train.steps = 3 * sum(config.data.mix.values()) // 16
    config.eval.benchmarks = {
      f'{source}split={split}': 0 for source, (_, split) in HUB.items()
    }
  elif form:
    raise ValueError(f'no form {form!r}; forms: tiny, {", ".join(MODELS)}')
  return config
