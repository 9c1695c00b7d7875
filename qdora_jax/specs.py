"""What to quantize and what to adapt: values, hashable, checked when made."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal, get_args

from qdora_jax import paths

# The projections of a decoder block, fused ones too: QLoRA section 5 finds
# that adapting all of them is what closes the gap to full fine-tuning.
ALL_LINEAR = r'.*/(q|k|v|qkv|o|gate|up|gate_up|down)/kernel'


Method = Literal['lora', 'dora', 'magnitude', 'vera', 'dvora']
Init = Literal['kaiming', 'gaussian', 'orthogonal', 'pissa', 'olora', 'loftq']
# What an adapter starts from: nothing but its shape, or the weight itself.
FRESH = ('kaiming', 'gaussian', 'orthogonal')
TAKEN = ('pissa', 'olora', 'loftq')


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """What to quantize, and how.

  Attributes:
    targets: regex over whole names; kernels it matches become NF4Arrays.
    block_size: weights that share one absmax. A kernel whose in axis it does
      not divide stays in full precision (`unquantized` lists them).
    double_quant: store absmax in 8 bits.
  """

  targets: str = ALL_LINEAR
  block_size: int = 64
  double_quant: bool = True


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
  """What to adapt, and how.

  Attributes:
    method: 'lora', 'dora', 'magnitude' (DoRA's magnitude alone), 'vera' (A and
      B random and shared, two vectors trained) or 'dvora' (DoRA over VeRA).
    rank: R.
    alpha: the correction is scaled by alpha / rank (not VeRA's).
    dropout: probability of dropping an entry of the adapter's input.
    targets: regex over whole names ('layers/3/attn/q/kernel').
    rank_pattern: {regex: rank}, the first match wins over `rank`; rank 0 leaves
      a kernel unadapted. Kept as a tuple of pairs, so that specs are hashable.
    alpha_pattern: {regex: alpha}, the first match wins over `alpha`.
    rslora: scale by alpha / sqrt(rank) (arXiv 2312.03732).
    init: how A and B start. 'kaiming' (PEFT's default), 'gaussian' and
      'orthogonal' change nothing at first. 'pissa', 'olora' and 'loftq' take A
      and B out of the weight and leave the rest as the base: they run while a
      checkpoint is loaded (`load_pretrained`).
    factored: DoRA's norm without a dense V; False is for ablations.
    detach: DoRA's norm is a constant in differentiation; False for ablations.
    projection_seed: of VeRA's shared A and B.
    trainable: regex over whole names of unquantized parameters that are trained
      in full beside the adapter: norms, the head, the embedding; '' for none.

  Raises:
    ValueError: for an unknown method, or a number out of range.
  """

  method: Method = 'dora'
  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.0
  targets: str = ALL_LINEAR
  rank_pattern: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
  alpha_pattern: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
  rslora: bool = False
  init: Init = 'kaiming'
  factored: bool = True
  detach: bool = True
  projection_seed: int = 0
  trainable: str = ''

  def __post_init__(self):
    methods = get_args(Method)
    if self.method not in methods:
      raise ValueError(f'method={self.method!r}: expected one of {methods}')
    if self.init not in (*FRESH, *TAKEN):
      raise ValueError(
        f'init={self.init!r}: expected one of {(*FRESH, *TAKEN)}'
      )
    if self.init != 'kaiming' and self.method not in ('lora', 'dora'):
      raise ValueError(
        f'init={self.init!r} is how A and B start; method={self.method!r} '
        'trains none'
      )
    if self.shared and set(dict(self.rank_pattern).values()) - {0}:
      raise ValueError(
        f'rank_pattern={dict(self.rank_pattern)}: the A and B of '
        f'method={self.method!r} are shared by all kernels, and so is their '
        'rank; expected 0 (not adapted) alone'
      )
    if self.rank < 1:
      raise ValueError(f'rank={self.rank}: expected at least 1')
    if not 0 < self.alpha < float('inf'):
      raise ValueError(f'alpha={self.alpha}: expected more than 0')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout}: expected 0 <= dropout < 1')
    for field in ('rank_pattern', 'alpha_pattern'):
      rules = tuple(dict(getattr(self, field)).items())
      object.__setattr__(self, field, rules)
    for pattern, alpha in self.alpha_pattern:
      if alpha <= 0:
        raise ValueError(
          f'alpha_pattern {pattern!r}: {alpha}, expected more than 0'
        )

  @property
  def shared(self) -> bool:
    """Whether A and B are random and the same for all kernels."""
    return self.method in ('vera', 'dvora')

  @property
  def has_magnitude(self) -> bool:
    return self.method in ('dora', 'dvora', 'magnitude')

  def rank_of(self, name: str) -> int:
    """The rank of the kernel of that name; 0 if it is not adapted."""
    if not re.fullmatch(self.targets, name):
      return 0
    return paths.first_match(self.rank_pattern, name, self.rank)

  def alpha_of(self, name: str) -> float:
    """The alpha of the kernel of that name."""
    return paths.first_match(self.alpha_pattern, name, self.alpha)

  def scale_of(self, name: str) -> float:
    """s of the LoRA equation; 0 if the kernel is not adapted."""
    rank = self.rank_of(name)
    if not rank:
      return 0.0
    if self.shared:
      return 1.0  # VeRA's vectors are all the scale there is.
    return self.alpha_of(name) / (rank**0.5 if self.rslora else rank)
