"""The story: from a config to a fine-tuned model, and what it gained."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tqdm

from qdora_jax import evaluate, optim, report
from qdora_jax.checkpoint import Checkpoints
from qdora_jax.config import RunConfig
from qdora_jax.data import Batch, Batches, Task, encode, load_task
from qdora_jax.evaluate import Score
from qdora_jax.interop.peft import save_adapter
from qdora_jax.metrics import Log, Progress, peak_memory, read_log
from qdora_jax.model import Decoder
from qdora_jax.pretrained import load_pretrained, open_checkpoint
from qdora_jax.transforms import (
  adapted_norms,
  attach,
  freeze,
  init_adapter,
  norms,
)

Tree = dict[str, Any]


def loss(
  model: Decoder, params: Tree, batch: Batch, total: jax.Array | float
) -> jax.Array:
  """Cross-entropy of a batch's completion tokens, summed, over `total`.

  Logits are made where a completion token is predicted and nowhere else.
  """
  variables = {'params': params}
  hidden, _ = model.apply(variables, batch['tokens'], method='hidden')
  hidden = jnp.take_along_axis(hidden, batch['loss_at'][..., None], axis=1)
  logits = model.apply(variables, hidden, method='unembed')
  each = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['labels']
  )
  return jnp.sum(each * batch['weights']) / total


def make_step(
  model: Decoder,
  optimizer: optax.GradientTransformation,
  microbatches: int = 1,
) -> Callable[..., tuple[Tree, Any, dict[str, jax.Array]]]:
  """The jitted step: (trained, opt_state, base, norms, batch, key) -> moved on.

  The loss is the mean over the completion tokens of the whole batch, however
  many microbatches it is split into. `trained` and `opt_state` are donated.

  Args:
    model: the decoder.
    optimizer: any optax transformation.
    microbatches: gradients are accumulated over so many slices of the batch;
      DoRA's detached norms are then computed once for all of them.
  """

  def step(trained, opt_state, base, norms, batch, key):
    total = jnp.maximum(jnp.sum(batch['weights']), 1)
    if microbatches > 1 and _detached(trained):
      norms = adapted_norms(base, trained, norms)

    def gradient(part, key):
      def objective(trained):
        params = attach(base, trained, norms=norms, dropout_key=key)
        return loss(model, params, part, total)

      return jax.value_and_grad(objective)(trained)

    def accumulate(sums, part_and_key):
      return jax.tree.map(jnp.add, sums, gradient(*part_and_key)), None

    if microbatches == 1:
      value, grads = gradient(batch, key)
    else:
      parts = jax.tree.map(
        lambda a: a.reshape(microbatches, -1, *a.shape[1:]), batch
      )
      zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
      keys = jax.random.split(key, microbatches)
      (value, grads), _ = jax.lax.scan(accumulate, zero, (parts, keys))
    updates, opt_state = optimizer.update(grads, opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    seen = {'loss': value, 'grad_norm': optax.tree.norm(grads)}
    return trained, opt_state, seen

  return jax.jit(step, donate_argnums=(0, 1))


def _detached(trained: Tree) -> bool:
  """Whether every norm in the tree is a constant of differentiation."""
  nodes = jax.tree.leaves(trained, is_leaf=lambda x: hasattr(x, 'spec'))
  return all(node.spec.detach for node in nodes if hasattr(node, 'spec'))


@dataclasses.dataclass
class Run:
  """A run folder with its config, model and data: what every command needs."""

  config: RunConfig
  workdir: Path
  model: Decoder
  tokenizer: Any
  base: Tree
  trained: Tree
  task: Task
  fingerprint: str

  @classmethod
  def open(cls, config: RunConfig, workdir: Path) -> 'Run':
    """Loads the data and the base, and makes a fresh adapter."""
    task = load_task(config.data)
    checkpoint = open_checkpoint(config.model.name)
    quant, spec = config.quant.spec(), config.adapter.spec()
    model, base, tokenizer = load_pretrained(
      config.model.name,
      quant,
      dtype=jnp.dtype(config.model.dtype),
      remat=config.model.remat,
    )
    if tokenizer is None:
      raise ValueError(
        f'{config.model.name} has no tokenizer (tokenizer.json); expected one '
        'with a chat template'
      )
    if spec is None:
      # An update may be less than bfloat16's last bit: masters are float32.
      trained = jax.tree.map(lambda a: a.astype(jnp.float32), base)
      base = {}
    else:
      trained = init_adapter(jax.random.key(config.seed), base, spec)
    fingerprint = f'{checkpoint.fingerprint()} {quant}'
    return cls(
      config, workdir, model, tokenizer, base, trained, task, fingerprint
    )

  def checkpoints(self) -> Checkpoints:
    return Checkpoints(self.workdir / 'checkpoints')

  def params(self) -> Tree:
    """The tree for inference, DoRA's norms computed once."""
    return freeze(self.base, self.trained)

  def evaluate(self, params: Tree, shots: int = 0, label: str = '') -> Score:
    """Exact match on the held-out problems."""
    c = self.config.eval
    return evaluate.exact_match(
      self.model,
      params,
      self.tokenizer,
      self.task,
      self.config.data,
      shots=self.task.train[:shots],
      batch_size=c.batch_size,
      max_new_tokens=c.max_new_tokens,
      progress=lambda parts: tqdm.tqdm(parts, label, leave=False, disable=None),
    )


def train(config: RunConfig, workdir: Path) -> dict[str, Score]:
  """Fine-tunes as configured; the same call again continues where it stopped.

  Args:
    config: everything the run depends on.
    workdir: gets config.json, metrics.jsonl, checkpoints/, scores.json,
      curves.png and adapter/ (PEFT files).

  Returns:
    {'zero-shot': ..., '3-shot': ..., 'fine-tuned': ...}.

  Raises:
    ValueError: if workdir holds a run of another config.
  """
  workdir = Path(workdir)
  _claim(config, workdir)
  began = time.perf_counter()
  run = Run.open(config, workdir)
  examples = [encode(run.tokenizer, config.data, p) for p in run.task.train]
  batches = Batches.make(
    examples, config.train.batch_size, config.train.seq_len, config.seed
  )
  print(report.describe(run.base, run.trained, config.quant.spec()))
  print(
    f'{len(batches.examples):,} examples to train on ({batches.dropped} longer '
    f'than {config.train.seq_len} dropped), {len(run.task.held_out)} held out; '
    f'{batches.batch_size} x {batches.length} tokens a step'
  )

  scores = _before(run)
  _fit(run, batches)
  label = 'fine-tuned'
  scores[label] = run.evaluate(run.params(), label=label)
  _save_scores(workdir, scores)

  # PEFT has no form for magnitudes alone.
  if run.base and config.adapter.method != 'magnitude':
    save_adapter(workdir / 'adapter', run.trained, config.model.name)
  title = (
    f'{config.data.name}, adapter {config.adapter.method}, '
    f'quantization {config.quant.format}'
  )
  rows = read_log(workdir / 'metrics.jsonl')
  report.plot(workdir / 'curves.png', rows, scores, title)
  for name, score in scores.items():
    print(f'{name:>10}: {score}')
  best = max(s.interval[1] for n, s in scores.items() if n != label)
  gain = scores[label].interval[0] - best
  print(
    f'gain beyond both intervals: {100 * gain:.1f} points; '
    f'{time.perf_counter() - began:.0f} s, peak {peak_memory() / 1e9:.2f} GB; '
    f'results in {workdir}'
  )
  return scores


def _before(run: Run) -> dict[str, Score]:
  """The untrained model's scores, bare and with solved examples."""
  path = run.workdir / 'scores.json'
  if path.exists():
    scores = load_scores(path)
    scores.pop('fine-tuned', None)
    return scores
  scores = {}
  for shots in dict.fromkeys((0, run.config.eval.shots)):
    label = f'{shots}-shot' if shots else 'zero-shot'
    # A fresh adapter changes nothing: this is the base.
    scores[label] = run.evaluate(run.params(), shots, label)
    print(f'before, {label}: {scores[label]}', flush=True)
  _save_scores(run.workdir, scores)
  return scores


def _fit(run: Run, batches: Batches) -> None:
  """Trains run.trained from the last checkpoint to the last step."""
  config = run.config
  optimizer = optim.make_optimizer(config.optim, config.train.steps)
  rate = optim.schedule(config.optim, config.train.steps)
  state = (run.trained, optimizer.init(run.trained))
  checkpoints = run.checkpoints()
  start = checkpoints.latest() or 0
  if start:
    state = checkpoints.restore(state, run.fingerprint)
    print(f'continuing after step {start}')
  log = Log(run.workdir / 'metrics.jsonl', start)
  step = make_step(run.model, optimizer, config.train.microbatches)
  fixed = jax.jit(norms)(run.base, run.trained)
  progress = Progress(start, config.train.steps)
  try:
    for n in range(start, config.train.steps):
      began = time.perf_counter()
      batch = batches(n)
      key = jax.random.fold_in(jax.random.key(config.seed + 1), n)
      *state, seen = step(*state, run.base, fixed, batch, key)
      seen = jax.device_get(seen)
      seconds = time.perf_counter() - began
      row = {
        'step': n + 1,
        'loss': float(seen['loss']),
        'lr': float(rate(n)),
        'grad_norm': float(seen['grad_norm']),
        'tokens_per_second': batch['tokens'].size / seconds,
        'memory_bytes': peak_memory(),
      }
      log.write(**row)
      progress.show(n + 1, row)
      if (n + 1) % config.train.save_every == 0 or n + 1 == config.train.steps:
        checkpoints.save(n + 1, tuple(state), run.fingerprint)
  finally:
    progress.close()
    checkpoints.close()
  run.trained = state[0]


def _claim(config: RunConfig, workdir: Path) -> None:
  """Writes config.json, or checks that the folder's is the same."""
  path = workdir / 'config.json'
  mine = dataclasses.asdict(config)
  if path.exists():
    theirs = json.loads(path.read_text())
    changed = _difference(theirs, json.loads(json.dumps(mine)), 'config')
    if changed:
      raise ValueError(
        f'{workdir} holds a run of another config: {"; ".join(changed)}. '
        f'Choose another --workdir, such as {workdir}-2'
      )
    return
  workdir.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix('.part')
  part.write_text(json.dumps(mine, indent=2) + '\n')
  part.replace(path)


def _difference(old: Any, new: Any, where: str) -> list[str]:
  """'config.a.b was 1, is 2' for every key that differs."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return [] if old == new else [f'{where} was {old!r}, is {new!r}']
  return [
    line
    for key in {**old, **new}
    for line in _difference(
      old[key] if key in old else None,
      new[key] if key in new else None,
      f'{where}.{key}',
    )
  ]


def load_run(workdir: Path) -> Run:
  """A trained run, at its newest checkpoint.

  Raises:
    FileNotFoundError: if workdir is no run folder or has no checkpoint yet.
  """
  workdir = Path(workdir)
  path = workdir / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
      f'{workdir} is no run folder (no config.json); expected what '
      '`qdora train --workdir` made'
    )
  config = RunConfig.make(json.loads(path.read_text()))
  run = Run.open(config, workdir)
  optimizer = optim.make_optimizer(config.optim, config.train.steps)
  abstract = jax.eval_shape(lambda t: (t, optimizer.init(t)), run.trained)
  checkpoints = run.checkpoints()
  run.trained, _ = checkpoints.restore(abstract, run.fingerprint)
  checkpoints.close()
  return run


def load_scores(path: Path) -> dict[str, Score]:
  """scores.json: what `train` found before and after."""
  return {k: Score(**v) for k, v in json.loads(path.read_text()).items()}


def _save_scores(workdir: Path, scores: dict[str, Score]) -> None:
  text = {name: dataclasses.asdict(score) for name, score in scores.items()}
  part = workdir / 'scores.part'
  part.write_text(json.dumps(text, indent=2) + '\n')
  part.replace(workdir / 'scores.json')
