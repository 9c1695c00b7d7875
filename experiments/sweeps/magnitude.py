"""How far do magnitudes alone come?

  qdora sweep experiments/sweeps/magnitude.py --out runs/sweeps/magnitude

39 runs of SmolLM2-135M on E2E data to text: DoRA's magnitudes alone (no A, no
B), these with the norms' scales, DoRA of rank 1, and LoRA of rank 1; three
learning rates, and a larger one for magnitudes alone; three seeds. Measured is
the loss on inputs of the valid split. Some two to four minutes a run on one CPU
core.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped

METHODS = zipped(
  {
    'label': ['magnitudes', 'and norms', 'DoRA, rank 1', 'LoRA, rank 1'],
    'adapter.method': ['magnitude', 'magnitude', 'dora', 'lora'],
    'adapter.trainable': ['', r'.*norm/scale', '', ''],
  }
)


def get_sweep() -> Sweep:
  return Sweep(
    question='How far do magnitudes alone come?',
    config='e2e_small.py:loss',
    points=product(
      grid('seed', [0, 1, 2]),
      # The fewer parameters, the larger the best rate.
      product(grid('optim.lr', [3e-3, 1e-2, 3e-2]), METHODS)
      + product(grid('optim.lr', [1e-1]), METHODS[:1]),
      [{'adapter.rank': 1, 'adapter.alpha': 2.0}],
    ),
    x='optim.lr',
    over=['optim.lr'],
    pairs=[
      ('and norms', 'magnitudes'),
      ('magnitudes', 'LoRA, rank 1'),
      ('DoRA, rank 1', 'LoRA, rank 1'),
    ],
  )
