"""Block size and double quantization (QLoRA paper, section 3).

  qdora sweep experiments/sweeps/quantization.py --out runs/sweeps/quantization

21 runs of SmolLM2-135M with QDoRA on E2E data to text: blocks of 32, 64 and 192
(128 does not divide 576, the in axis of all but one of the matrices), absmax in
32 bits and in 8, and DoRA over the weights as they are; three seeds at one
learning rate. Measured is the loss on inputs of the valid split, beside the
bytes. Some forty minutes on two CPU cores, by rank.py's two minutes a run.
"""

from qdora_jax.sweep import Sweep, grid, product, zipped


def get_sweep() -> Sweep:
  sizes = [(size, double) for size in (32, 64, 192) for double in (False, True)]
  labels = [f'{size}{", double" * double}' for size, double in sizes]
  return Sweep(
    question='What do larger blocks and double quantization cost?',
    config='e2e_small.py:loss',
    points=product(
      grid('seed', [0, 1, 2]),
      [
        {'label': 'float32', 'quant.format': 'none'},
        *zipped(
          {
            'label': labels,
            'quant.format': ['nf4'] * len(sizes),
            'quant.block_size': [size for size, _ in sizes],
            'quant.double_quant': [double for _, double in sizes],
          }
        ),
      ],
      grid('optim.lr', [1e-3]),
    ),
    pairs=[(label, 'float32') for label in labels]
    + [(f'{size}, double', f'{size}') for size in (32, 64, 192)],
  )
