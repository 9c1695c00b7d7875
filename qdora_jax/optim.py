"""Schedules and optimizers, from optax, told by names of the trained tree.

Every trained array has a name, `layers/3/attn/q/kernel/lora_b` or
`layers/3/attn_norm/scale`, and rules over names say how it is trained: what is
decayed, what learns faster (LoRA+), what not at all.
"""

import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdora_jax import paths
from qdora_jax.adam8bit import adamw8bit
from qdora_jax.config import OptimSection

# Vectors that scale or shift features: pulling them to zero is not what weight
# decay is for.
UNDECAYED = r'.*/(magnitude|scale|bias|lambda_d|lambda_b)'


# They want the loss as a function, a gradient per example, or other weights for
# evaluation than for training.
_NEED_MORE = ('lbfgs', 'sophia', 'dpsgd')
_NEED_MORE += ('schedule_free_adamw', 'schedule_free_sgd')


# They take an Adapter's empty fields for parameters.
_NO_EMPTY = ('galore',)


class Scaled:
  """A schedule: its shape times a peak, which a step takes as an argument.

  Runs that differ in the peak alone then share one compiled step.
  """

  def __init__(self, shape: optax.Schedule, peak: float):
    self.shape, self.peak = shape, peak
    self._given: Any = None

  def __call__(self, count: Any) -> Any:
    peak = self.peak if self._given is None else self._given
    return self.shape(count) * peak

  @contextlib.contextmanager
  def given(self, peak: jax.Array | None) -> Iterator[None]:
    """While a step is traced, the peak is this argument of it."""
    self._given = peak
    try:
      yield
    finally:
      self._given = None


def schedule(optim: OptimSection, steps: int) -> Scaled:
  """Learning rate by step: linear warm-up, then constant or down to zero."""
  rest = max(1, steps - optim.warmup_steps)
  after = {
    'constant': optax.constant_schedule(1.0),
    'linear': optax.linear_schedule(1.0, 0.0, rest),
    'cosine': optax.cosine_decay_schedule(1.0, rest),
  }[optim.schedule]
  if not optim.warmup_steps:
    return Scaled(after, optim.lr)
  # Step 0 moves already: rates lr/w, 2 lr/w, ... lr.
  first = 1 / optim.warmup_steps
  warm = optax.linear_schedule(first, 1.0, max(1, optim.warmup_steps - 1))
  shape = optax.join_schedules([warm, after], [optim.warmup_steps])
  return Scaled(shape, optim.lr)


def from_config(
  optim: OptimSection, rate: float | optax.Schedule
) -> optax.GradientTransformationExtraArgs:
  """The optimizer that a config names."""
  return make_optimizer(
    rate,
    optim.name,
    weight_decay=optim.weight_decay,
    clip=optim.clip,
    options=optim.options,
    lr_scale=optim.lr_scale,
  )


def check(optim: OptimSection, trained: Any) -> None:
  """Tries a config's optimizer on a tree, without computing anything.

  Raises:
    ValueError: for a name, an option or a rule that cannot be.
  """
  optimizer = from_config(optim, optim.lr)

  def step(tree: Any) -> Any:
    return optimizer.update(tree, optimizer.init(tree), tree, value=0.0)

  try:
    jax.eval_shape(step, trained)
  except TypeError as error:
    raise ValueError(
      f'config.optim.options={dict(optim.options)}: optax.{optim.name} cannot '
      f'use them ({error})'
    ) from error


def make_optimizer(
  rate: float | optax.Schedule,
  name: str = 'adamw',
  *,
  weight_decay: float = 0.0,
  clip: float = 0.0,
  options: Mapping[str, Any] | None = None,
  lr_scale: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Any optax optimizer, with masks and rates by name.

  Args:
    rate: learning rate, or one by step.
    name: of a function in optax or optax.contrib that takes a learning rate;
      or 'adamw8bit', see adam8bit.py.
    weight_decay: of everything but magnitudes, norms and biases.
    clip: largest norm of all gradients together; 0 for none.
    options: further keywords of that function.
    lr_scale: {regex: factor} over names of trained arrays, the first match
      wins: {'.*/lora_b': 16.0} is LoRA+ (arXiv 2402.12354), {'.*/lora_a': 0.0}
      freezes A, and keeps no optimizer state for it.

  Raises:
    ValueError: for a name or keyword that optax does not know, naming the
      nearest; at `init`, for a rule that matches nothing.
  """
  optimizer = _named(name)(rate, **_keywords(name, weight_decay, options or {}))
  if name in _NO_EMPTY:
    optimizer = _flat(optimizer)
  if clip:
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
  if not lr_scale:
    return optax.with_extra_args_support(optimizer)
  rules = tuple(lr_scale.items())
  scaled = optax.chain(optimizer, optax.stateless(_scaler(rules)))
  by_name = optax.partition(
    {'trained': scaled, 'frozen': optax.set_to_zero()},
    lambda tree: jax.tree.map(
      lambda f: 'trained' if f.any() else 'frozen', _factors(tree, rules)
    ),
  )

  def init(tree: Any) -> Any:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = paths.unflatten({paths.of(path): leaf for path, leaf in leaves})
    for pattern, _ in rules:
      paths.select(named, pattern, 'config.optim.lr_scale')
    return by_name.init(tree)

  return optax.GradientTransformationExtraArgs(init, by_name.update)


def _flat(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """The optimizer on {name: array}, without a tree's empty places."""

  def named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {paths.of(path): leaf for path, leaf in leaves}

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    own = None if params is None else named(params)
    new, state = optimizer.update(named(updates), state, own)
    return jax.tree_util.tree_map_with_path(
      lambda path, _: new[paths.of(path)], updates
    ), state

  return optax.GradientTransformation(
    lambda tree: optimizer.init(named(tree)), update
  )


Rules = tuple[tuple[str, float], ...]


def _scaler(rules: Rules) -> Callable[[Any, Any], Any]:
  """Updates times their factors."""

  def scale(array: jax.Array, factors: np.ndarray) -> jax.Array:
    shape = (-1,) + (1,) * (array.ndim - 1)
    return array * jnp.asarray(factors, array.dtype).reshape(shape)

  return lambda updates, _: jax.tree.map(
    scale, updates, _factors(updates, rules)
  )


def _factors(tree: Any, rules: Rules) -> Any:
  """f32 [N] for each array, or [1] without a stack: its names' factors."""

  def factors(path: Any, leaf: Any) -> np.ndarray:
    names = paths.names(paths.of(path), leaf)
    own = [paths.first_match(rules, name, 1.0) for name in names]
    return np.array(own, np.float32)

  return jax.tree_util.tree_map_with_path(factors, tree)


def _decayed(tree: Any) -> Any:
  """Whether weight decay is for an array, in the tree's structure."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not re.fullmatch(UNDECAYED, paths.of(path)), tree
  )


def _named(name: str) -> Callable[..., optax.GradientTransformation]:
  known = {
    key: value
    for module in (optax.contrib, optax)
    for key, value in vars(module).items()
    if inspect.isfunction(value)
    and not key.startswith(('_', 'scale_by'))
    and next(iter(inspect.signature(value).parameters), '') == 'learning_rate'
    and key not in _NEED_MORE
  }
  known['adamw8bit'] = adamw8bit
  if name not in known:
    near = difflib.get_close_matches(name, known, n=3)
    near = near or ['adamw', 'adam', 'lion', 'adafactor', 'sgd']
    raise ValueError(
      f'config.optim.name={name!r}: optax has no such optimizer; near: '
      f'{", ".join(near)}'
    )
  return known[name]


def _keywords(
  name: str, weight_decay: float, options: Mapping[str, Any]
) -> dict[str, Any]:
  takes = inspect.signature(_named(name)).parameters
  ours = ('learning_rate', 'weight_decay', 'mask')
  for key in options:
    if key in ours or key not in takes:
      near = [k for k in takes if k not in ours]
      near = difflib.get_close_matches(key, near, n=1) or near
      raise ValueError(
        f'config.optim.options.{key}: optax.{name} takes {", ".join(near)} here'
      )
  words = dict(options)
  if 'weight_decay' in takes:
    words['weight_decay'] = weight_decay
    if 'mask' in takes:
      words['mask'] = _decayed
  if weight_decay and not {'weight_decay', 'mask'} <= words.keys():
    raise ValueError(
      f'config.optim.weight_decay={weight_decay}: optax.{name} has no weight '
      'decay that can leave magnitudes and norms alone; set it to 0, or '
      "config.optim.name='adamw'"
    )
  return words
