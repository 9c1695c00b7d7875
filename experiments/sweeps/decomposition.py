"""How magnitude and direction change (DoRA paper, section 3.2 and figure 2).

  qdora sweep experiments/sweeps/decomposition.py --out runs/sweeps/turns
  qdora analyze runs/sweeps/turns --out runs/turns

9 runs of SmolLM2-135M on E2E data to text: full fine-tuning, LoRA and DoRA,
each at its best rate of methods.py, 120 steps with four checkpoints kept, three
seeds. The analysis is of their weights: how far each matrix's magnitudes and
directions went, and whether the two go together. Fifty minutes on two CPU
cores beside other work, 20 GB of disk for the checkpoints.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped


def get_sweep() -> Sweep:
  return Sweep(
    question='Do magnitude and direction change together?',
    config='e2e_small.py:loss',
    points=product(
      grid('seed', [0, 1, 2]),
      zipped(
        {
          'label': ['full', 'LoRA', 'DoRA'],
          'adapter.method': ['none', 'lora', 'dora'],
          'optim.lr': [1e-4, 3e-3, 3e-3],
        }
      ),
      [{'train.steps': 120, 'train.save_every': 30, 'train.keep_last': 4}],
    ),
    pairs=[('DoRA', 'LoRA'), ('full', 'LoRA')],
  )
