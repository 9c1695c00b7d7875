"""How A and B start: at random, or out of the weights.

  qdora sweep experiments/sweeps/initialization.py --out runs/sweeps/init

36 runs of SmolLM2-135M with QLoRA on E2E data to text: Kaiming's, Gaussian and
orthogonal A with B = 0, and PiSSA, OLoRA and LoftQ, which take A and B out of
the weights before these are quantized; two learning rates, three seeds.
Measured is the loss on inputs of the valid split. Some seventy minutes on
two CPU cores, by rank.py's two minutes a run; not yet run.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped

STARTS = ['kaiming', 'gaussian', 'orthogonal', 'pissa', 'olora', 'loftq']


def get_sweep() -> Sweep:
  return Sweep(
    question='How much does the start of A and B matter?',
    config='e2e_small.py:loss',
    points=product(
      grid('seed', [0, 1, 2]),
      grid('optim.lr', [3e-4, 1e-3]),
      zipped({'label': STARTS, 'adapter.init': STARTS}),
      [{'adapter.method': 'lora', 'quant.format': 'nf4'}],
    ),
    over=['optim.lr'],
    pairs=[(start, 'kaiming') for start in STARTS[1:]],
  )
