"""Who gains most from more data?

  qdora sweep experiments/sweeps/data_fraction.py --out runs/sweeps/data

36 runs of SmolLM2-135M on E2E data to text: LoRA, DoRA and full fine-tuning, 60
steps each on 20, 80, 320 and all 42,061 rows - a step takes some four, so that
the smallest is seen twelve times and the largest not whole. Three seeds, each
with rows drawn anew; each method at its best rate of methods.py. Measured is
the loss on inputs of the valid split. Some hour and a half on two CPU cores, by
rank.py's two minutes a run and more for full fine-tuning, 20 GB of disk; not
yet run.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped


def get_sweep() -> Sweep:
  return Sweep(
    question='Who gains most from more data, and who bears least of it best?',
    config='e2e_small.py:loss',
    points=product(
      zipped({'seed': [0, 1, 2], 'data.seed': [0, 1, 2]}),
      grid('data.train_size', [20, 80, 320, 42_061]),
      zipped(
        {
          'label': ['LoRA', 'DoRA', 'full'],
          'adapter.method': ['lora', 'dora', 'none'],
          'optim.lr': [3e-3, 3e-3, 1e-4],
        }
      ),
      [{'data.train_rows': 'random'}],
    ),
    x='data.train_size',
    pairs=[('DoRA', 'LoRA'), ('full', 'LoRA')],
  )
