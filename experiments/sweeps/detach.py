"""DoRA's norm held constant or differentiated (DoRA paper, section 4.3).

  qdora sweep experiments/sweeps/detach.py --out runs/sweeps/detach --isolate

12 runs of SmolLM2-135M on E2E data to text: the norm from a dense weight and by
the factored form, each held constant and not; three seeds at one learning rate,
no remat. Measured is the loss on inputs of the valid split, and the peak memory
of each run's own process (--isolate). Forty minutes on two CPU cores, partly
beside tests. `experiments/benchmarks/detach.py` reads the memory off compiled
programs.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped


def get_sweep() -> Sweep:
  return Sweep(
    question="What does holding DoRA's norm constant cost, and save?",
    config='e2e_small.py:loss',
    points=product(
      grid('seed', [0, 1, 2]),
      zipped(
        {
          'label': ['dense', 'dense, held', 'factored', 'factored, held'],
          'adapter.factored': [False, False, True, True],
          'adapter.detach': [False, True, False, True],
        }
      ),
      [{'optim.lr': 3e-3, 'model.remat': 'none'}],
    ),
    pairs=[
      ('dense, held', 'dense'),
      ('factored, held', 'factored'),
      ('factored, held', 'dense, held'),
    ],
  )
