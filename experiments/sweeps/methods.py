"""Full fine-tuning, LoRA, DoRA, QLoRA and QDoRA, each at its own best rate.

  qdora sweep experiments/sweeps/methods.py --out runs/sweeps/methods

57 runs of SmolLM2-135M on E2E data to text: five methods, three or four
learning rates (full fine-tuning's a tenth of the others'), three seeds. The
rate is chosen by the loss on inputs of the valid split, what is reported is of
inputs of the test split. Some three hours on two CPU cores, and 15 GB of disk
for the checkpoints.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped

ADAPTERS = zipped(
  {
    'label': ['LoRA', 'DoRA', 'QLoRA', 'QDoRA'],
    'quant.format': ['none', 'none', 'nf4', 'nf4'],
    'adapter.method': ['lora', 'dora', 'lora', 'dora'],
  }
)
FULL = [{'label': 'full', 'quant.format': 'none', 'adapter.method': 'none'}]


def get_sweep() -> Sweep:
  return Sweep(
    question='Which method learns most, each at its own best learning rate?',
    config='e2e_small.py',
    points=product(
      grid('seed', [0, 1, 2]),
      [
        *product(ADAPTERS, grid('optim.lr', [3e-4, 1e-3, 3e-3, 1e-2])),
        *product(FULL, grid('optim.lr', [3e-5, 1e-4, 3e-4])),
      ],
    ),
    measure='e2e nats by token',
    x='optim.lr',
    over=['optim.lr'],
    chosen_by='held-out loss',
    pairs=[
      ('DoRA', 'LoRA'),
      ('QDoRA', 'QLoRA'),
      ('QLoRA', 'LoRA'),
      ('full', 'LoRA'),
    ],
  )
