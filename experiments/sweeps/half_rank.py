"""Is DoRA of half the rank as good as LoRA (DoRA paper, table 1)?

  qdora sweep experiments/sweeps/half_rank.py --out runs/sweeps/half_rank

18 runs of SmolLM2-135M on E2E data to text: LoRA of rank 16, DoRA of 8 and of
16, two learning rates, three seeds, alpha / rank is 2. Measured is the loss on
inputs of the valid split. Some forty minutes on two CPU cores, by rank.py's two
minutes a run.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped


def get_sweep() -> Sweep:
  return Sweep(
    question='Is DoRA of half the rank as good as LoRA?',
    config='e2e_small.py:loss',
    points=product(
      grid('seed', [0, 1, 2]),
      grid('optim.lr', [1e-3, 3e-3]),
      zipped(
        {
          'label': ['LoRA', 'half DoRA', 'DoRA'],
          'adapter.method': ['lora', 'dora', 'dora'],
          'adapter.rank': [16, 8, 16],
          'adapter.alpha': [32.0, 16.0, 32.0],
        }
      ),
    ),
    over=['optim.lr'],
    pairs=[('half DoRA', 'LoRA'), ('DoRA', 'LoRA')],
  )
