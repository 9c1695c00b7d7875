"""Will it fit? A step's memory, traffic and work, before anything is loaded.

`plan(job)` is arithmetic over shapes (`footprint.py`, `traffic.py`): a model of
65 billion weights takes seconds, and no device. On CPU in float32 its total is
within 10% of what the compiler says of the real step's program, for every
method and remat policy; XLA's CPU programs hold transposed copies that a GPU's
need not, and for bfloat16 they say nothing (CPU computes it in float32).
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax

from qdora_jax import footprint, optim, published, traffic
from qdora_jax.config import RunConfig
from qdora_jax.devices import Device
from qdora_jax.job import Job
from qdora_jax.model import ModelConfig
from qdora_jax.specs import AdapterSpec, QuantSpec

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step takes; bytes are one device's.

  Attributes:
    job: what was planned.
    memory: {kind: bytes} on the device; workspace and logits take turns.
    host: {kind: bytes} that wait in the host's memory.
    moved: {collective: bytes received} per optimizer step.
    flops: of one device per optimizer step.
  """

  job: Job
  memory: Mapping[str, int]
  host: Mapping[str, int]
  moved: Mapping[str, int]
  flops: float

  @property
  def total(self) -> int:
    """Bytes on the device at the worst moment."""
    turns = self.memory['workspace'], self.memory['logits']
    return sum(self.memory.values()) - min(turns)

  @property
  def parts(self) -> dict[str, int]:
    """The total in few kinds, as a picture has them."""
    turns = ('workspace', 'logits')
    waits = min(turns, key=self.memory.__getitem__)
    return {
      part: sum(self.memory.get(kind, 0) for kind in kinds if kind != waits)
      for part, kinds in {
        'weights in 4 bits': ('base codes', 'absmax'),
        'other weights': ('full precision', 'parameters'),
        'adapter': ('adapter',),
        'gradients': ('gradients',),
        'optimizer': ('optimizer',),
        'activations': ('activations',),
        'at work': ('norms and batch', *turns),
      }.items()
    }

  def __str__(self) -> str:
    job = self.job
    mesh = f'data={job.data}, fsdp={job.fsdp}, tensor={job.tensor}'
    lines = [
      f'per device ({mesh}), {job.batch} x {job.seq_len} tokens a step in '
      f'{job.microbatches} microbatches, remat {job.remat}, {job.dtype}:'
    ]
    lines += [_row(name, size) for name, size in self.memory.items() if size]
    lines.append(_row('at the worst moment', self.total))
    lines += [
      _row(f'{name}, in host memory', n) for name, n in self.host.items() if n
    ]
    scores = footprint.attention_scores(job)
    if scores > self.total / 20:
      lines.append(_row('(one layer of attention scores)', scores))
    lines += [_row(name, size) for name, size in self.moved.items() if size]
    return '\n'.join([*lines, f'  {"work":40}{self.flops / 1e12:10.2f} TFLOP'])


def _row(name: str, size: float) -> str:
  return f'  {name:40}{size / GB:10.3f} GB'


def plan(job: Job) -> Plan:
  """Plans a training step from shapes alone.

  Raises:
    ValueError: if the model cannot be quantized or adapted so, or the batch
      cannot be split so.

  Example:
    >>> job = Job(published.model_config('llama-65b'), batch=1, seq_len=512)
    >>> plan(job).total / 1e9 < 48
    True
  """
  ways = job.data * job.fsdp * job.microbatches
  if job.batch % ways:
    raise ValueError(
      f'a batch of {job.batch} cannot be split into {job.microbatches} '
      f'microbatches over data={job.data} x fsdp={job.fsdp} devices; expected '
      f'a multiple of {ways}'
    )
  memory = footprint.static(job)
  kept, waiting = footprint.activations(job)
  host = {'activations': waiting, 'optimizer': 0}
  if job.paged:
    host['optimizer'], memory['optimizer'] = memory['optimizer'], 0
  memory |= {
    'activations': kept,
    'workspace': footprint.workspace(job),
    'logits': footprint.logits(job),
  }
  return Plan(job, memory, host, traffic.moved(job), traffic.flops(job))


def fits(made: Plan, memory: int) -> bool:
  """Whether a plan's worst moment is within so many bytes."""
  return made.total <= memory


def nearest(job: Job, memory: int) -> tuple[str, Plan] | None:
  """The least change that makes a job fit: (what, its plan); None if none does.

  Changes are tried in the order of what they cost, first those that change
  nothing but time, each on top of those before that changed nothing but time.
  """
  for words, other in _changes(job):
    made = plan(other)
    if fits(made, memory):
      return words, made
  return None


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
  def with_(**fields) -> Job:
    return dataclasses.replace(job, **fields)

  said = []
  if job.remat not in ('block', 'offload'):
    job = with_(remat='block')
    said.append("model.remat='block'")
    yield _joined(said), job
  each = job.data * job.fsdp
  if job.batch // each > job.microbatches:
    job = with_(microbatches=job.batch // each)
    said.append(f'train.microbatches={job.microbatches}')
    yield _joined(said), job
  if job.remat != 'offload':
    job = with_(remat='offload')
    said.append("model.remat='offload'")
    yield _joined(said), job
  if not job.paged:
    job = with_(paged=True)
    said.append("optim.paged='host'")
    yield _joined(said), job
  if job.adapter is not None and job.quant is None:
    job = with_(quant=QuantSpec())
    said.append("quant.format='nf4'")
    yield _joined(said), job
  elif job.quant is not None and not job.quant.double_quant:
    job = with_(quant=dataclasses.replace(job.quant, double_quant=True))
    said.append('quant.double_quant=True')
    yield _joined(said), job
  for fsdp in (2, 4, 8, 16, 32, 64):
    if fsdp > job.fsdp:
      # One row a device at least.
      batch = max(job.batch, job.data * fsdp)
      batch = -(-batch // (job.data * fsdp)) * job.data * fsdp
      parts = batch // (job.data * fsdp)
      more = f'mesh.fsdp={fsdp}'
      if batch != job.batch:
        more += f' with train.batch_size={batch}'
      yield (
        _joined([*said, more]),
        with_(fsdp=fsdp, batch=batch, microbatches=parts),
      )
  length = job.seq_len // 2
  while length >= 128:
    yield _joined([*said, f'train.seq_len={length}']), with_(seq_len=length)
    length //= 2


def _joined(said: list[str]) -> str:
  return ' and '.join(said)


def verdict(made: Plan, device: Device) -> str:
  """Whether it fits a GPU, how fast it can be there, and what would help."""
  if fits(made, device.usable):
    rate, what = traffic.bound(made.job, device)
    return (
      f'{device.name}: fits, {made.total / GB:.1f} of {device.usable / GB:.1f} '
      f'GB; at most {rate:,.0f} tokens/s, by {what}'
    )
  found = nearest(made.job, device.usable)
  hint = (
    'and no change tried makes it fit: a smaller model, or a larger card'
    if found is None
    else f'with {found[0]} it does ({found[1].total / GB:.1f} GB)'
  )
  return (
    f'{device.name}: does not fit, {made.total / GB:.1f} of '
    f'{device.usable / GB:.1f} GB; {hint}'
  )


def methods(job: Job) -> dict[str, Plan]:
  """The job by each of five methods, with its own specs where it has any."""
  adapter, quant = job.adapter or AdapterSpec(), job.quant or QuantSpec()
  plans = {'full': plan(dataclasses.replace(job, quant=None, adapter=None))}
  for prefix, base in (('', None), ('Q', quant)):
    for method, name in (('lora', 'LoRA'), ('dora', 'DoRA')):
      spec = dataclasses.replace(adapter, method=method)
      one = dataclasses.replace(job, quant=base, adapter=spec)
      plans[prefix + name] = plan(one)
  return plans


def of_run(
  config: RunConfig,
  model: ModelConfig | None = None,
  count: int | None = None,
  *,
  paged: bool | None = None,
) -> Job:
  """The job that a run's config stands for.

  Args:
    config: its train.seq_len must be given: nothing is read that could tell.
    model: the architecture; what config.model.name stands for if None.
    count: devices that mesh.fsdp=-1 fills; one if None.
    paged: whether optimizer state waits in the host's memory; as the config
      says if None, which 'auto' does not.

  Raises:
    ValueError: if train.seq_len is 0, or the model is unknown.
  """
  m, mesh, t = config.model, config.mesh, config.train
  if not t.seq_len:
    raise ValueError(
      "config.train.seq_len=0 takes the data's longest example, which a plan "
      'does not read; set --config.train.seq_len=N'
    )
  fsdp = mesh.fsdp
  if fsdp == -1:
    fsdp = max(
      1, (count or mesh.data * mesh.tensor) // (mesh.data * mesh.tensor)
    )
  return Job(
    model or published.model_config(config.model.name),
    config.quant.spec(),
    config.adapter.spec(),
    t.batch_size,
    t.seq_len,
    t.microbatches,
    # What 'auto' chooses takes two bytes on every GPU there is a plan for.
    dtype='bfloat16' if m.dtype == 'auto' else m.dtype,
    remat=m.remat,
    attention=m.attention,
    optimizer=optim.from_config(config.optim, config.optim.lr),
    paged=config.optim.paged == 'host' if paged is None else paged,
    data=mesh.data,
    fsdp=fsdp,
    tensor=mesh.tensor,
  )


def check(job: Job, memory: int) -> Plan:
  """Refuses a job that cannot fit, before anything is loaded.

  Args:
    job: what would be trained.
    memory: bytes of one device.

  Raises:
    ValueError: with the plan's table and the nearest change that fits.
  """
  made = plan(job)
  if fits(made, memory):
    return made
  found = nearest(job, memory)
  hint = f'; it would with {found[0]}' if found else ''
  raise ValueError(
    f'this run needs {made.total / GB:.1f} GB a device by its plan, and a '
    f'device has {memory / GB:.1f} GB{hint}. To try nevertheless: '
    f'--config.train.ignore_plan=True\n{made}'
  )


def device_memory() -> int | None:
  """Bytes that the first device lets a program have; None where it is silent
  (a CPU)."""
  stats = jax.local_devices()[0].memory_stats()
  return stats['bytes_limit'] if stats and 'bytes_limit' in stats else None


def refuse(config: RunConfig) -> None:
  """`check` of a run on this machine, where its devices say what they hold.

  Not with train.seq_len=0, whose meaning only the data knows.
  """
  memory = device_memory()
  if memory is None or config.train.ignore_plan or not config.train.seq_len:
    return
  paged = True if config.optim.paged == 'auto' else None
  check(of_run(config, count=jax.device_count(), paged=paged), memory)


def room(config: RunConfig) -> int | None:
  """Bytes that a run leaves of each device for the optimizer's state.

  None where devices do not say what they hold, or train.seq_len is 0.
  """
  memory = device_memory()
  if memory is None or not config.train.seq_len:
    return None
  made = plan(of_run(config, count=jax.device_count(), paged=True))
  return max(0, memory - made.total)
