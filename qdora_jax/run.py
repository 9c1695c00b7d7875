"""A run: a config with the model, the data and the adapter it names.

What every command needs: `fine_tune` trains one, `load_run` finds it again.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from qdora_jax import chat, data, evaluate, folder, optim, paths, train
from qdora_jax.adapter import init_adapter
from qdora_jax.checkpoint import Checkpoints
from qdora_jax.config import RunConfig
from qdora_jax.data import Batch, Batches
from qdora_jax.evaluate import Score
from qdora_jax.export import export_base, export_folded, export_merged
from qdora_jax.generate import generate_text
from qdora_jax.interop.peft import save_adapter
from qdora_jax.linear import kind
from qdora_jax.model import Decoder
from qdora_jax.opening import loaded_adapter, mesh_of, settled, shrunk
from qdora_jax.pretrained import (
  dequantized,
  load_pretrained,
  open_checkpoint,
)
from qdora_jax.rows import Row
from qdora_jax.sharding import gather, shard_batch, unsharded
from qdora_jax.specs import TAKEN
from qdora_jax.transforms import freeze

Tree = dict[str, Any]
FORMATS = ('peft', 'merged', 'folded', 'base')


@dataclasses.dataclass
class Run:
  """A run folder with its config and model: what every command needs."""

  config: RunConfig
  workdir: Path
  model: Decoder
  tokenizer: Any
  base: Tree
  trained: Tree
  mesh: jax.sharding.Mesh | None
  fingerprint: str
  # What a reader of the plan should know of how the base was read.
  notes: list[str]
  # The adapter as it started, if it was taken out of the base.
  initial: Tree | None

  @classmethod
  def open(cls, config: RunConfig, workdir: Path) -> 'Run':
    """Loads the base, and makes a fresh adapter or loads one."""
    config = settled(config, Path(workdir))
    checkpoint = open_checkpoint(config.model.name)
    quant, spec = config.quant.spec(), config.adapter.spec()
    mesh = mesh_of(config)
    taken = spec is not None and spec.init in TAKEN
    if taken and config.adapter.path:
      raise ValueError(
        f'config.adapter.init={spec.init!r} is how a new adapter starts, and '
        f'config.adapter.path={config.adapter.path!r} goes on from an old one: '
        "set one of them (init='kaiming' is the default)"
      )
    model, base, tokenizer, *made = load_pretrained(
      config.model.name,
      quant,
      spec if taken else None,
      dtype=jnp.dtype(config.model.dtype),
      mesh=mesh,
      remat=config.model.remat,
      key=jax.random.key(config.seed),
    )
    model = model.clone(attention=config.model.attention)
    if tokenizer is None or tokenizer.eos_token_id is None:
      raise ValueError(
        f'{config.model.name} has no tokenizer with an end-of-text token; '
        "expected the model's own tokenizer.json and tokenizer_config.json "
        'beside it'
      )
    if spec is None and _quantized(base):
      raise ValueError(
        f'{config.model.name} is stored in 4 bits, which no gradient step can '
        "move: full fine-tuning (adapter.method='none') needs its unquantized "
        "checkpoint; or set adapter.method to 'lora' or 'dora'"
      )
    if spec is None:
      # An update may be less than bfloat16's last bit: masters are float32.
      trained = jax.tree.map(lambda a: a.astype(jnp.float32), base)
      base = {}
    elif taken:
      (trained,) = made
    else:
      trained = init_adapter(jax.random.key(config.seed), base, spec)
      if config.adapter.path:
        trained = loaded_adapter(config.adapter.path, base, trained, spec)
    notes = [
      f'stored in 4 bits, read in full precision: {path}: {reason}'
      for path, reason in dequantized(checkpoint, base or trained).items()
    ]
    if mesh is not None:
      notes += [
        f'not sharded as it could be: {path}: {reason}'
        for path, reason in unsharded(base or trained, mesh).items()
      ]
    return cls(
      config,
      Path(workdir),
      model,
      tokenizer,
      base,
      trained,
      mesh,
      f'{checkpoint.fingerprint()} {quant}',
      notes,
      # On the host: training gives away the memory of what it trains.
      gather(trained) if taken else None,
    )

  @property
  def identity(self) -> dict[str, str]:
    """What its checkpoints belong to."""
    # On other devices than it began on it is the same run.
    began = self.config
    if (self.workdir / 'config.json').exists():
      began = folder.config_of(self.workdir)
    text = json.dumps(began.settings(), sort_keys=True)
    config = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {'base': self.fingerprint, 'config': config}

  @functools.cached_property
  def data(self) -> data.Data:
    """The rows; read when they are first asked for."""
    return data.load_data(self.config.data)

  def batches(self) -> Batches:
    """What is trained on."""
    config = self.config
    examples = {
      source: self._encoded(rows, f'reading {source}')
      for source, rows in self.data.train.items()
    }
    if config.data.learn_prompts:
      examples = {
        source: [example.all_learned() for example in some]
        for source, some in examples.items()
      }
    return Batches(
      examples,
      config.train.batch_size,
      config.train.seq_len,
      seed=config.seed,
      packing=config.data.packing,
      too_long=config.data.too_long,
      weights=self.data.weights,
    )

  @functools.cached_property
  def held_out(self) -> Batches | None:
    """The held-out rows, laid out for their loss: use its `once()`."""
    config = self.config
    if not self.data.held_out:
      return None
    examples = self._encoded(self.data.held_out, 'reading held-out rows')
    return Batches(
      {'the held-out rows': examples},
      config.train.batch_size // config.train.microbatches,
      config.train.seq_len,
      packing=config.data.packing,
      too_long='truncate',
    )

  def _encoded(self, rows: Sequence[Row], label: str) -> list[chat.Example]:
    """Token ids of rows; all of them must have an embedding."""
    examples = data.encode_all(
      self.tokenizer,
      rows,
      self.config.data.format(),
      lambda rows: _bar(rows, label),
    )
    vocab = self.model.config.vocab
    for row, some in zip(rows, examples, strict=True):
      largest = max(example.tokens.max() for example in some)
      if largest >= vocab:
        raise ValueError(
          f'{row.place}: the tokenizer makes token {largest} of it, and '
          f'{self.config.model.name} knows {vocab}; is its '
          "tokenizer.json another model's?"
        )
    return [example for some in examples for example in some]

  def restore(self, checkpoint: str | int = 'last') -> None:
    """Takes what was trained out of a checkpoint; see `load_run`."""
    config = self.config
    state = train.initial_state(
      self.trained,
      optim.from_config(
        config.optim, optim.schedule(config.optim, config.train.steps)
      ),
      config.seed,
      self.mesh,
      config.optim.paged,
      dtype=self.model.dtype,
    )
    checkpoints = Checkpoints(self.workdir / 'checkpoints')
    try:
      restored = checkpoints.restore(state, self.identity, which=checkpoint)
    finally:
      checkpoints.close()
    self.trained = restored.state['trained']

  def params(self, trained: Tree | None = None) -> Tree:
    """The tree for inference, DoRA's norms computed once."""
    return freeze(self.base, self.trained if trained is None else trained)

  def evaluate(
    self,
    params: Tree | None = None,
    shots: int = 0,
    label: str = '',
    rows: Sequence[Row] | None = None,
  ) -> Score:
    """Held-out loss, and exact match where rows have answers.

    Args:
      params: the tree to evaluate; the run's own if None.
      shots: solved examples in each prompt; the loss is taken without any.
      label: of the progress bar.
      rows: instead of all held-out rows, and without their loss.
    """
    params = self.params() if params is None else params
    config = self.config
    measured: dict[str, Any] = {}
    if not shots and rows is None:
      loss = evaluate.held_out_measure(
        self.model, params, self._held_out_batches()
      )
      measured['loss'] = loss.value
      if loss.low is not None:
        measured['loss_interval'] = (loss.low, loss.high)
    rows = self.data.held_out if rows is None else rows
    rows = [row for row in rows if row.answer is not None]
    if not rows or not config.eval.exact_match:
      return Score(0, 0, 0, **measured)
    score = evaluate.exact_match(
      self.model,
      params,
      self.tokenizer,
      rows,
      config.data.format(),
      answer_pattern=config.data.answer_pattern,
      shots=self.shots(shots),
      batch_size=config.eval.batch_size,
      max_new_tokens=config.eval.max_new_tokens,
      beams=config.eval.beams,
      progress=lambda parts: _bar(parts, label),
    )
    return dataclasses.replace(score, **measured)

  def shots(self, count: int) -> list[Row]:
    """So many training rows with answers."""
    rows = (row for some in self.data.train.values() for row in some)
    solved = (row for row in rows if row.answer is not None)
    return [row for _, row in zip(range(count), solved, strict=False)]

  def held_out_loss(self, params: Tree) -> float:
    """In nats per learned token; see `evaluate.held_out_loss`."""
    batches = self._held_out_batches()
    return evaluate.held_out_loss(self.model, params, batches)

  def _held_out_batches(self) -> Iterator[Batch]:
    if self.held_out is None:
      raise ValueError(
        f'{self.workdir} holds no rows out (config.data.eval_size=0): there is '
        'nothing to evaluate on'
      )
    batches = self.held_out.once()
    if self.mesh is not None:
      batches = (shard_batch(batch, self.mesh) for batch in batches)
    return batches

  def generate(
    self,
    prompt: str,
    max_new_tokens: int = 100,
    *,
    seed: int = 0,
    raw: bool = False,
    **options: Any,
  ) -> str:
    """Answers a prompt.

    Args:
      prompt: in the run's own template.
      max_new_tokens: at most.
      seed: of what is drawn.
      raw: continues the prompt, with no template around it.
      options: of `generate_text`: temperature, top_k, top_p, stop_strings.
    """
    form = self.config.data.format()
    if raw:
      ids = self.tokenizer.encode(prompt)
    else:
      # In place of the answer to come.
      row = Row({'prompt': prompt, 'completion': '?'})
      ids = chat.question_ids(
        self.tokenizer, row, dataclasses.replace(form, instruction='')
      )
    (answer,) = generate_text(
      self.model,
      self.params(),
      self.tokenizer,
      [ids],
      max_new_tokens,
      key=jax.random.key(seed),
      **options,
    )
    return answer.strip()

  def export(
    self, directory: Path, form: str = 'peft', dtype: str | None = None
  ) -> None:
    """Writes the result for others to load.

    Args:
      directory: to be made.
      form: 'peft' (the adapter), 'merged' (one full-precision model), 'folded'
        (4-bit base and plain LoRA) or 'base' (what the adapter belongs to).
      dtype: of what is not in 4 bits; the config's model.dtype if None.

    Raises:
      ValueError: if the run has nothing of that form.
    """
    if not self.base and form != 'merged':
      raise ValueError(
        f'{self.workdir} is a full fine-tuning: there is no adapter to export; '
        "expected format 'merged'"
      )
    name, dtype = self.config.model.name, dtype or self.config.model.dtype
    if form == 'peft':
      tied = self.model.config.tied
      if self.initial is not None and _quantized(self.base):
        raise ValueError(
          f'{self.workdir} began with adapter.init='
          f'{self.config.adapter.init!r}, which changed its 4-bit base: the '
          'adapter alone is of no model that others have. Expected format '
          "'folded' (base and adapter) or 'merged'"
        )
      save_adapter(
        directory, self.trained, name, tied=tied, initial=self.initial
      )
    elif form == 'merged':
      export_merged(directory, self.base, self.trained, name, dtype)
    elif form == 'folded':
      export_folded(directory, self.base, self.trained, name, dtype)
    elif form == 'base':
      export_base(directory, self.base, name, dtype)
    else:
      raise ValueError(f'format {form!r}: expected one of {", ".join(FORMATS)}')


def _quantized(base: Tree) -> bool:
  leaves = paths.flatten(base).values()
  return any(kind(leaf).startswith('nf4') for leaf in leaves)


def _bar(parts: Any, label: str) -> Any:
  return tqdm.tqdm(parts, label, leave=False, disable=None)


def load_run(workdir: str | Path, checkpoint: str | int = 'last') -> Run:
  """A trained run, on the devices there are.

  Args:
    workdir: its folder.
    checkpoint: 'last' (the newest that is whole), 'best' (of the lowest
      held-out loss; see config.train.keep_best) or a step.

  Raises:
    FileNotFoundError: if workdir is no run folder or has no such checkpoint.
    ValueError: if the base is not the one that was trained on.
  """
  run = untrained(workdir)
  run.restore(checkpoint)
  return run


def untrained(workdir: str | Path) -> Run:
  """A run as it was before its first step; `Run.restore` takes a checkpoint.

  Raises:
    FileNotFoundError: if workdir is no run folder or has no checkpoints.
  """
  workdir = Path(workdir)
  if not (workdir / 'config.json').is_file():
    raise FileNotFoundError(
      f'{workdir} is no run folder (no config.json); expected what '
      '`qdora train --workdir` made'
    )
  config = folder.config_of(workdir)
  if not (workdir / 'checkpoints').is_dir():
    raise FileNotFoundError(
      f'no checkpoint in {workdir / "checkpoints"}; train first'
    )
  return Run.open(shrunk(config), workdir)
