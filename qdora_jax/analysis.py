"""What training did to weights, and what formats do to them: in numbers.

Weight decomposition (Liu et al. 2024, arXiv 2402.09353, section 3.2). A kernel
W [I, O] is, per output feature, a magnitude ||w|| and a direction w / ||w||.
How far training moved the one and the other, as means over output features:

  dM = mean | ||w'|| - ||w|| |        dD = mean (1 - cos(w', w))

In q of the paper's vision-language model, over layers and checkpoints, the two
go together under LoRA (a correlation of +.83), and against each other under
full fine-tuning (-.62) and DoRA (-.31).

Formats (Dettmers et al. 2023, arXiv 2305.14314, section 4). Four bits are an
index into 16 levels of [-1, 1], scaled by the largest |w| of each block: evenly
spaced (Int4), a float of two exponent bits and one of mantissa (FP4), or the
normal distribution's quantiles (NF4), which are right if weights are normal.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from qdora_jax import nf4, paths
from qdora_jax.dora import root, squared_norm
from qdora_jax.linear import materialize
from qdora_jax.specs import QuantSpec
from qdora_jax.transforms import unquantized

Tree = Mapping[str, Any]

# Of bitsandbytes: its FP4 has no value between 1/192 and 1/6.
_POSITIVE = np.array([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
LEVELS = {
  'int4': np.arange(-7, 8, dtype=np.float32) / np.float32(7),
  'fp4': np.unique([-_POSITIVE, _POSITIVE]).astype(np.float32),
  'nf4': nf4.LEVELS,
}
NAMES = {'int4': 'Int4', 'fp4': 'FP4', 'nf4': 'NF4'}


@dataclasses.dataclass(frozen=True)
class Change:
  """How one kernel moved.

  Attributes:
    name: 'layers/3/attn/q/kernel'.
    magnitude: dM, in the weights' own unit.
    direction: dD, of 0 (as before) to 2 (turned round).
    relative: mean | ||w'|| / ||w|| - 1 |, over features that had a length.
    rank: singular values of W' - W that hold `SHARE` of its squared norm; None
      if not asked for, 0 if nothing moved.
  """

  name: str
  magnitude: float
  direction: float
  relative: float
  rank: int | None = None

  @property
  def layer(self) -> int:
    """Of the name; 0 for a kernel in no stack."""
    _, _, rest = self.name.partition(f'{paths.STACK}/')
    return int(rest.split('/')[0]) if rest else 0

  @property
  def module(self) -> str:
    """'q' of 'layers/3/attn/q/kernel'."""
    return self.name.split('/')[-2]


SHARE = 0.9


def changes(
  before: Tree, after: Tree, targets: str, ranks: bool = False
) -> list[Change]:
  """How each kernel that a rule matches moved.

  Args:
    before: the tree that training began with; any leaf that `linear` takes.
    after: the same paths.
    targets: regex over whole names.
    ranks: whether to find `Change.rank`, a singular value decomposition each.

  Raises:
    ValueError: if targets match nothing, or the trees differ in shapes.
  """
  old, new = paths.flatten(before), paths.flatten(after)
  found = []
  for path, hits in paths.select(before, targets, 'targets').items():
    if path not in new or old[path].shape != new[path].shape:
      shape = new[path].shape if path in new else 'nothing'
      raise ValueError(
        f'{path} was {old[path].shape} and is {shape}; expected the same '
        'architecture before and after'
      )
    w, v = (materialize(tree[path], jnp.float32) for tree in (old, new))
    flat = w.reshape(-1, *w.shape[-2:]), v.reshape(-1, *v.shape[-2:])
    measured = jax.device_get(_changes(*flat))
    names = paths.names(path, old[path])
    for n, (name, hit) in enumerate(zip(names, hits, strict=True)):
      if hit:
        moved = np.asarray(flat[1][n] - flat[0][n]) if ranks else None
        rank = energy_rank(moved) if ranks else None
        found.append(Change(name, *(float(m[n]) for m in measured), rank))
  return found


@jax.jit
def _changes(w_NxIxO: jax.Array, v_NxIxO: jax.Array) -> tuple[jax.Array, ...]:
  """dM, dD and the relative change of lengths, each [N].

  Neither is the difference of two numbers that are almost the same.
  """
  old, new = (root(squared_norm(a)) for a in (w_NxIxO, v_NxIxO))
  both = (old > 0) & (new > 0)
  sums = ((v_NxIxO - w_NxIxO) * (v_NxIxO + w_NxIxO)).sum(-2)
  longer = jnp.abs(sums) / jnp.where(old + new > 0, old + new, 1)
  # Of unit vectors 1 - cos is half of their squared distance.
  unit = (
    a / jnp.where(both, norm, 1)[:, None]
    for a, norm in ((v_NxIxO, new), (w_NxIxO, old))
  )
  turned = squared_norm(jnp.subtract(*unit)) / 2
  return (
    longer.mean(-1),
    turned.mean(-1, where=both),
    (longer / jnp.where(old > 0, old, 1)).mean(-1, where=old > 0),
  )


def energy_rank(delta_IxO: np.ndarray, share: float = SHARE) -> int:
  """How many singular values hold a share of the squared norm."""
  thin = delta_IxO if delta_IxO.shape[0] < delta_IxO.shape[1] else delta_IxO.T
  squares = np.linalg.eigvalsh(thin @ thin.T)[::-1].clip(0)
  if not squares.any():
    return 0
  return int(np.searchsorted(squares.cumsum(), share * squares.sum()) + 1)


def correlation(moved: Sequence[Change]) -> float:
  """Pearson's, of dM and dD; NaN of fewer than three or of constant ones."""
  if len(moved) < 3:
    return math.nan
  sizes = [change.magnitude for change in moved]
  turns = [change.direction for change in moved]
  if np.ptp(sizes) == 0 or np.ptp(turns) == 0:
    return math.nan
  return float(scipy.stats.pearsonr(turns, sizes).statistic)


def round_trip(
  w_IxO: jax.Array, levels: np.ndarray, block_size: int = 64
) -> jax.Array:
  """A kernel as four bits leave it: the nearest level times its block's absmax.

  Args:
    w_IxO: f32 [..., I, O].
    levels: f32 [16], rising from -1 to 1; fewer will do.
    block_size: weights along I that share one absmax.

  Returns:
    f32 [..., I, O].

  Raises:
    ValueError: if block_size does not divide I.
  """
  nf4.check(w_IxO.shape, w_IxO.dtype, block_size)
  *lead, _, o = w_IxO.shape
  blocks = w_IxO.reshape(*lead, -1, block_size, o)
  absmax = jnp.abs(blocks).max(-2, keepdims=True)
  middles = jnp.asarray((levels[1:] + levels[:-1]) / np.float32(2))
  scaled = blocks / jnp.where(absmax > 0, absmax, 1)
  codes = jnp.searchsorted(middles, scaled, side='left')
  return (jnp.asarray(levels)[codes] * absmax).reshape(w_IxO.shape)


@dataclasses.dataclass(frozen=True)
class Format:
  """A way of storing a kernel.

  Attributes:
    levels: name in `LEVELS`.
    block_size: weights that share one absmax.
    double_quant: absmax in 8 bits (NF4 alone has it).
  """

  levels: str
  block_size: int = 64
  double_quant: bool = False

  def __str__(self) -> str:
    double = ' + DQ' if self.double_quant else ''
    return f'{NAMES[self.levels]}{double}, blocks of {self.block_size}'

  @property
  def bits(self) -> float:
    """A weight's, absmax included."""
    scales = 8 + 32 / nf4.NESTED_BLOCK if self.double_quant else 32
    return 4 + scales / self.block_size

  def __call__(self, w_IxO: jax.Array) -> jax.Array:
    """The kernel [..., I, O] as it comes back, float32."""
    if self.levels == 'nf4':
      packed = nf4.quantize(w_IxO, self.block_size, self.double_quant)
      return nf4.dequantize(packed, jnp.float32)
    if self.double_quant:
      raise ValueError(f'{self}: double quantization is of NF4 here')
    return round_trip(w_IxO, LEVELS[self.levels], self.block_size)

  def tree(self, params: Tree, targets: str) -> tuple[Tree, float]:
    """Every kernel that a rule matches as it comes back, and the error.

    What cannot be stored so (`transforms.unquantized`) stays as it is.

    Returns:
      The tree, and ||W' - W|| / ||W|| over all that was stored.

    Raises:
      ValueError: if targets match nothing that could be stored so.
    """
    left = unquantized(params, self.spec(targets))
    flat = dict(paths.flatten(params))
    squares = np.zeros(2)
    for path in paths.select(params, targets, 'targets'):
      if path not in left:
        w = materialize(flat[path], jnp.float32)
        flat[path] = self(w)
        parts = (flat[path] - w, w)
        squares += [float(jnp.square(part).sum()) for part in parts]
    return paths.unflatten(flat), math.sqrt(squares[0] / squares[1])

  def spec(self, targets: str) -> QuantSpec:
    """What `unquantized` takes, to tell which kernels cannot be stored so."""
    return QuantSpec(targets, self.block_size, self.double_quant)


def normality(
  w_IxO: np.ndarray, block_size: int = 0, samples: int = 200, seed: int = 0
) -> tuple[float, int]:
  """The share of weights' groups that a Shapiro-Wilk test calls not normal.

  The QLoRA paper (appendix F) tests LLaMA's output features at a significance
  of 5%, of which 5% of truly normal ones fail, and finds 7.5%.

  Args:
    w_IxO: kernels [..., I, O].
    block_size: tests blocks of so many along I; 0 tests whole columns.
    samples: groups tested, drawn without repetition.
    seed: of the draw.

  Returns:
    The share with p < .05, and how many were tested.

  Raises:
    ValueError: if block_size does not divide I.
  """
  size = block_size or w_IxO.shape[-2]
  if w_IxO.shape[-2] % size:
    raise ValueError(
      f'block_size={size} does not divide the in axis of shape {w_IxO.shape}'
    )
  groups = np.moveaxis(w_IxO, -2, -1).reshape(-1, size)
  draw = np.random.default_rng(seed)
  count = min(samples, len(groups))
  chosen = groups[draw.choice(len(groups), count, replace=False)]
  # A constant group is not normal.
  ps = [scipy.stats.shapiro(g).pvalue if np.ptp(g) else 0.0 for g in chosen]
  return float(np.mean(np.array(ps) < 0.05)), count
