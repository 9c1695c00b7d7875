"""LoRA and DoRA from rank 1 to 64 (DoRA paper, section 5.4).

  qdora sweep experiments/sweeps/rank.py --out runs/sweeps/rank

66 runs of SmolLM2-135M on E2E data to text: three ranks, three learning rates,
for rank 1 a larger one besides and for rank 64 a smaller one; three seeds; the
scale (alpha / rank) is 2 throughout. Measured is the loss on inputs of the
valid split. Some 110 s a run on two CPU cores: two hours.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped


def get_sweep() -> Sweep:
  return Sweep(
    question='How low may the rank be, and does DoRA bear it better than LoRA?',
    config='e2e_small.py:loss',
    points=product(
      grid('seed', [0, 1, 2]),
      product(
        grid('optim.lr', [1e-3, 3e-3, 1e-2]),
        zipped(
          {'adapter.rank': [1, 8, 64], 'adapter.alpha': [2.0, 16.0, 128.0]}
        ),
      )
      + zipped(
        {
          'optim.lr': [3e-2, 3e-4],
          'adapter.rank': [1, 64],
          'adapter.alpha': [2.0, 128.0],
        }
      ),
      zipped({'label': ['LoRA', 'DoRA'], 'adapter.method': ['lora', 'dora']}),
    ),
    x='adapter.rank',
    over=['optim.lr'],
    pairs=[('DoRA', 'LoRA')],
  )
