"""VeRA: one pair of random matrices for all kernels, two trained vectors each.

The idea (Kopiczko et al. 2023, arXiv 2310.11454). A and B of LoRA are drawn
once and stay as they are, the same for every kernel; trained are only how much
of each direction is used, and how much each output takes up:

  y = x W + ((x A) * d) B * b        d [R] starts as .1, b [O] as zero

A few thousand numbers a kernel instead of a hundred thousand, so R is large
(256 to 1024). DVoRA (DoRA's paper, section 5.4) turns the direction of W with
it and trains the magnitude apart.

The layout. A_IxR and B_RxO are drawn from a seed for the largest kernel, and
every other takes their first I rows and O columns, as in PEFT. d and b are
multiplied in where the adapter is attached, so that to `lora` and `dora` this
is an ordinary A and B; what is traded is the room for A * d while a step runs.
Drawn by JAX, they are not PEFT's numbers: a trained VeRA goes to PEFT as the
LoRA that it is (`export_folded`), or merged.
"""

import jax
import jax.numpy as jnp

# VeRA, section 3.3; PEFT's d_initial.
D_INITIAL = 0.1


def projections(
  seed: int, i: int, rank: int, o: int
) -> tuple[jax.Array, jax.Array]:
  """A [I, R] and B [R, O] for the largest kernel, kaiming uniform, float32.

  (Bounds sqrt(6 / I) and sqrt(6 / R), as PEFT draws them.)
  """
  keys = jax.random.split(jax.random.key(seed))
  a, b = (6 / i) ** 0.5, (6 / rank) ** 0.5
  return (
    jax.random.uniform(keys[0], (i, rank), jnp.float32, -a, a),
    jax.random.uniform(keys[1], (rank, o), jnp.float32, -b, b),
  )


def pair(
  shared: tuple[jax.Array, jax.Array], d: jax.Array, b: jax.Array, i: int
) -> tuple[jax.Array, jax.Array]:
  """One kernel's A * d [..., I, R] and B * b [..., R, O].

  Args:
    shared: what `projections` gave.
    d: [..., R].
    b: [..., O].
    i: I.
  """
  big_a, big_b = shared
  o = b.shape[-1]
  wide = (1,) * (d.ndim - 1)
  a_IxR = big_a[:i].reshape(*wide, i, -1)
  b_RxO = big_b[:, :o].reshape(*wide, -1, o)
  return a_IxR * d[..., None, :], b_RxO * b[..., None, :]
