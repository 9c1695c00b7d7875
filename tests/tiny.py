"""A model, a tokenizer, a task and a config small enough to test runs with."""

import functools
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from golden import weights

from qdora_jax import load_pretrained, paths
from qdora_jax.config import RunConfig

EXPERIMENTS = Path(__file__).parents[1] / 'experiments'
BASE = EXPERIMENTS / 'configs' / 'base.py'
EOS = 2
# 'u:1+2=\na:' for a question, the answer and its end behind it.
TEMPLATE = (
  "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}"
  "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def write_model(folder: Path, tied: bool = True, **changes: Any) -> Path:
  """A Hugging Face directory; changes go into its config.json."""
  config, tensors = weights.tiny_llama(0, tied)
  return weights.write_hf(folder, config | changes, tensors)


def write_tokenizer(folder: Path) -> Path:
  """A tokenizer of one token per printable character, with a chat template."""
  special = ['<unk>', '<s>', '</s>']
  characters = ['\n', *map(chr, range(32, 127))]
  vocab = {token: n for n, token in enumerate(special + characters)}
  assert vocab['</s>'] == EOS
  model = tokenizers.models.WordLevel(vocab, unk_token='<unk>')
  tokenizer = tokenizers.Tokenizer(model)
  every = tokenizers.Regex(r'[\s\S]')
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(every, 'isolated')
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.add_special_tokens(special)
  tokenizer.save(str(folder / 'tokenizer.json'))
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'unk_token': '<unk>',
    'bos_token': '<s>',
    'eos_token': '</s>',
    'clean_up_tokenization_spaces': False,
    'chat_template': TEMPLATE,
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def write(folder: Path, tied: bool = True) -> Path:
  """Model and tokenizer in one directory."""
  return write_tokenizer(write_model(folder, tied))


@functools.cache
def loaded(tied: bool = True, quant: Any = None) -> tuple[Any, Any, Any]:
  """(model, params, tokenizer) as `load_pretrained` gives them."""
  with tempfile.TemporaryDirectory() as folder:
    return load_pretrained(write(Path(folder), tied), quant, remat='none')


def perturbed(adapter: Any, seed: int = 0, size: float = 0.05) -> Any:
  """The adapter away from its start; ranks' padding stays zero."""
  moved = {}
  for n, (path, node) in enumerate(paths.flatten(adapter).items()):
    if not hasattr(node, 'lora_b'):
      moved[path] = node  # Trained in full.
      continue
    draw = np.random.RandomState(seed + n)
    if node.lora_b is not None:
      noise = size * draw.standard_normal(node.lora_b.shape)
      ranks = np.array(node.ranks)[:, None]
      live = np.arange(noise.shape[-2])[None] < ranks
      live = live[..., None] if noise.ndim == 3 else live[0][:, None]
      b = jnp.asarray(noise * live, jnp.float32)
      node = node.replace(lora_b=node.lora_b + b)
    if node.magnitude is not None:
      noise = 1 + size * draw.standard_normal(node.magnitude.shape)
      node = node.replace(magnitude=node.magnitude * jnp.float32(noise))
    moved[path] = node
  return paths.unflatten(moved)


class Sums:
  """Stands in for a reasoning-gym dataset: question n is '3+4=' for n = 43."""

  def __init__(self, size: int, seed: int, distinct: int = 100):
    self.size, self.seed, self.distinct = size, seed, distinct

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, i: int) -> dict[str, Any]:
    n = (self.seed + i) % self.distinct
    a, b = n % 10, n // 10
    question = f'{a}+{b}='
    return {'question': question, 'answer': str(a + b), 'metadata': {'n': n}}

  def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
    return 1.0 if answer == entry['answer'] else 0.01


def use_sums(monkeypatch: Any) -> list[tuple[Any, ...]]:
  """Puts Sums in reasoning-gym's place; returns the calls made so far."""
  calls = []

  def load(task: str, size: int, seed: int, options: Any = None) -> Sums:
    calls.append((task, size, seed, dict(options or {})))
    return Sums(size, seed, **(options or {}))

  monkeypatch.setattr('qdora_jax.rows.reasoning_gym.load', load)
  return calls


_OVERRIDES = {
  'data.name': 'reasoning_gym/sums',
  'data.answer_pattern': r'\d+',
  'data.train_size': 24,
  'data.eval_size': 6,
  'model.remat': 'none',
  'adapter.rank': 4,
  'adapter.alpha': 8.0,
  'train.steps': 4,
  'train.batch_size': 8,
  'train.save_every': 2,
  'optim.lr': 1e-2,
  'eval.shots': 0,
  'eval.max_new_tokens': 4,
  'mesh.fsdp': 1,
}


@functools.cache
def script(name: str) -> Any:
  """A program of experiments/, such as 'configs/base.py', as a module."""
  path = EXPERIMENTS / name
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def config(model: Path | str, **overrides: Any) -> dict[str, Any]:
  """base.py's values for a tiny run; overrides are 'section.key': value."""
  values = script('configs/base.py').get_config().to_dict()
  every = {**_OVERRIDES, 'model.name': str(model), **overrides}
  for key, value in every.items():
    *section, last = key.split('.')
    node = values[section[0]] if section else values
    assert last in node, key
    node[last] = value
  return values


def run_config(model: Path | str, **overrides: Any) -> RunConfig:
  return RunConfig.make(config(model, **overrides))


def config_file(folder: Path, model: Path, **overrides: Any) -> Path:
  """The same as a file for --config."""
  every = {**_OVERRIDES, 'model.name': str(model), **overrides}
  lines = [
    'import runpy',
    'def get_config():',
    f'  config = runpy.run_path({str(BASE)!r})["get_config"]()',
    *(f'  config.{key} = {value!r}' for key, value in every.items()),
    '  return config',
  ]
  path = folder / 'tiny_config.py'
  path.write_text('\n'.join(lines))
  return path


def assert_same(got: Any, want: Any) -> None:
  """Two trees of arrays are equal bit for bit, dtypes included."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


DATA = Path(__file__).parents[2] / 'shared' / 'data'
needs_data = pytest.mark.skipif(
  not DATA.exists(), reason='the shared data is not here'
)
# Marks of what other tests show already, of another size, family or mesh.
AGAIN = (pytest.mark.slow, pytest.mark.exhaustive)


def relative(got: Any, want: Any) -> float:
  """Largest difference over the largest wanted number."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want).max()


@pytest.fixture(scope='module', autouse=True)
def quick_compiles() -> Iterator[None]:
  """Import it into a module whose time is XLA's: half of it is saved."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', before)
