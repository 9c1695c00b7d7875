"""Which matrices to adapt (QLoRA paper, section 4: all of them).

  qdora sweep experiments/sweeps/targets.py --out runs/sweeps/targets

33 runs of SmolLM2-135M with DoRA on E2E data to text: four sets of matrices,
two learning rates and for subsets a larger one, three seeds. The ranks are
chosen so that each set trains about as many parameters (3.3 to 3.5 million).
Measured is the loss on inputs of the valid split. Some two to four minutes a
run on one CPU core.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped

# Set, regex, rank: of SmolLM2-135M's shapes.
SETS = [
  ('q, v', r'.*/(q|v)/kernel', 58),
  ('attention', r'.*/(q|k|v|o)/kernel', 28),
  ('MLP', r'.*/(gate|up|down)/kernel', 17),
  ('all linear', r'.*/(q|k|v|o|gate|up|down)/kernel', 11),
]


def get_sweep() -> Sweep:
  labels, targets, ranks = zip(*SETS, strict=True)
  sets = zipped(
    {
      'label': labels,
      'adapter.targets': targets,
      'adapter.rank': ranks,
      'adapter.alpha': [2.0 * rank for rank in ranks],
    }
  )
  return Sweep(
    question='Which matrices are worth adapting, for as many parameters?',
    config='e2e_small.py:loss',
    points=product(
      grid('seed', [0, 1, 2]),
      # All linear layers are worse at 1e-2 (methods.py).
      product(grid('optim.lr', [1e-3, 3e-3]), sets)
      + product(grid('optim.lr', [1e-2]), sets[:3]),
    ),
    over=['optim.lr'],
    pairs=[(label, 'all linear') for label in labels[:3]],
  )
