"""lm-evaluation-harness: its tasks on a model of ours.

`harness(lm, names)` gives its results by `lm_eval.simple_evaluate`; `Harness`
is the model class for who calls lm_eval otherwise. Texts become tokens, and
stop strings end answers, as with the harness's own Hugging Face model. Whether
a model was trained on what it is asked is not looked for here.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

from qdora_jax import likelihood
from qdora_jax.benchmark import Result
from qdora_jax.generate import generate_text
from qdora_jax.intervals import Measure, Z

try:
  from lm_eval import simple_evaluate, utils
  from lm_eval.api.model import TemplateLM
  from lm_eval.tasks import TaskManager
except ImportError as error:
  raise ImportError(
    f"the harness needs {error.name}: pip install 'qdora_jax[eval]'"
  ) from error


class Harness(TemplateLM):
  """A model of ours for lm_eval.

  Args:
    model: the decoder.
    params: plain, quantized, attached or (fastest for DoRA) frozen.
    tokenizer: a transformers fast tokenizer.
    batch_size: prompts or texts read at once.
    max_length: tokens of a text at most; what is longer loses its beginning.
    max_gen_toks: new tokens where a task does not say.
    add_bos_token: whether texts begin with BOS (the harness's default is no).
    seed: of what is drawn.
  """

  def __init__(
    self,
    model: Any,
    params: Any,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_length: int = 2048,
    max_gen_toks: int = 256,
    add_bos_token: bool = False,
    seed: int = 0,
  ):
    super().__init__()
    self.model, self.params, self.tokenizer = model, params, tokenizer
    self.batch_size, self.max_length = batch_size, max_length
    self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token
    self.key = jax.random.key(seed)

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    return likelihood.first_token(self.tokenizer)

  @property
  def tokenizer_name(self) -> str:
    return self.tokenizer.name_or_path.replace('/', '__')

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: Any
  ) -> list[int]:
    if add_special_tokens is None:
      add_special_tokens = self.add_bos_token
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    return self.tokenizer.apply_chat_template(
      chat_history,
      tokenize=False,
      add_generation_prompt=add_generation_prompt,
      continue_final_message=not add_generation_prompt,
    )

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
  ) -> list[tuple[float, bool]]:
    found = likelihood.log_likelihoods(
      self.model,
      self.params,
      [(context, continuation) for _, context, continuation in requests],
      batch_size=self.batch_size,
      longest=self.max_length,
    )
    return [(one.nats, one.greedy) for one in found]

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    sums = []
    for request in requests:
      (text,) = request.args
      windows = utils.get_rolling_token_windows(
        self.tok_encode(text), self.prefix_token_id, self.max_length, 1
      )
      pairs = [utils.make_disjoint_window(window) for window in windows]
      found = self._loglikelihood_tokens([('', *pair) for pair in pairs])
      sums.append(sum(nats for nats, _ in found))
    return sums

  def generate_until(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[str]:
    said: dict[int, str] = {}
    # Prompts of one setting and of like lengths go together.
    groups: dict[str, list[int]] = {}
    for n, request in enumerate(requests):
      groups.setdefault(repr(sorted(request.args[1].items())), []).append(n)
    for members in groups.values():
      ids = {n: self.tok_encode(requests[n].args[0]) for n in members}
      members.sort(key=lambda n: -len(ids[n]))
      settings = requests[members[0]].args[1]
      for start in range(0, len(members), self.batch_size):
        part = members[start : start + self.batch_size]
        texts = self._generate([ids[n] for n in part], settings)
        said |= dict(zip(part, texts, strict=True))
    return [said[n] for n in range(len(requests))]

  def _generate(
    self, prompts: list[list[int]], settings: dict[str, Any]
  ) -> list[str]:
    given = {'until': [], 'max_gen_toks': self.max_gen_toks, **settings}
    until, most = given['until'], int(given['max_gen_toks'])
    until = [until] if isinstance(until, str) else until
    # The harness's own rule: greedy unless told to draw, and how.
    given = {'temperature': 0.0, 'do_sample': True, **settings}
    warm = float(given['temperature']) if given['do_sample'] else 0.0
    options = {k: settings[k] for k in ('top_k', 'top_p') if k in settings}
    self.key, key = jax.random.split(self.key)
    room = max(1, self.max_length - most)
    return generate_text(
      self.model,
      self.params,
      self.tokenizer,
      [prompt[-room:] for prompt in prompts],
      most,
      stop_strings=[word for word in until if word],
      temperature=warm,
      key=key,
      **(options if warm else {}),
    )


def harness(
  lm: Harness,
  names: Sequence[str],
  *,
  limit: int | None = None,
  shots: int | None = None,
  include_path: str | None = None,
) -> dict[str, Any]:
  """The harness's results of some of its tasks.

  Args:
    lm: the model.
    names: of tasks.
    limit: documents of each.
    shots: solved examples in each prompt; None for what the task says.
    include_path: folder of task files of one's own.

  Raises:
    ValueError: for a task that the harness does not know.
  """
  manager = TaskManager(include_path=include_path)
  unknown = [n for n in names if n not in manager.all_tasks]
  if unknown:
    from qdora_jax import paths

    near = ', '.join(paths.near(unknown[0], manager.all_tasks))
    raise ValueError(f'lm_eval has no task {unknown[0]!r}; near: {near}')
  return simple_evaluate(
    lm,
    tasks=list(names),
    num_fewshot=shots,
    limit=limit,
    task_manager=manager,
    bootstrap_iters=1000,
  )


def results(found: dict[str, Any]) -> list[Result]:
  """The harness's results in our form: of tasks, and of groups with figures.

  Intervals are of 1.96 of its standard errors; where it has none, as of a
  perplexity, there is none.
  """
  kept = []
  for task, figures in found['results'].items():
    measures = {}
    for key, value in figures.items():
      metric, _, filtered = key.partition(',')
      if not filtered or metric.endswith('_stderr'):
        continue
      name = metric if filtered == 'none' else f'{metric} ({filtered})'
      error = figures[f'{metric}_stderr,{filtered}']
      low = high = None
      if isinstance(error, float) and math.isfinite(error):
        low, high = value - Z * error, value + Z * error
      measures[name] = Measure(value, low, high)
    if measures:
      counts = [found['n-samples'][name] for name in _leaves(found, task)]
      total, available = (
        sum(count[kind] for count in counts)
        for kind in ('effective', 'original')
      )
      kept.append(Result(task, 'lm_eval', total, available, measures))
  return kept


def _leaves(found: dict[str, Any], task: str) -> list[str]:
  """The tasks of a group, of its groups, too; a task is its own."""
  if task in found['n-samples']:
    return [task]
  parts = found['group_subtasks'][task]
  return [leaf for part in parts for leaf in _leaves(found, part)]


def table(found: dict[str, Any]) -> str:
  """The harness's results as it prints them."""
  return utils.make_table(found)
