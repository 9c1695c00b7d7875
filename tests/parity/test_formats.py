"""FP4 against bitsandbytes itself."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
bnb = pytest.importorskip('bitsandbytes')

from golden import weights  # noqa: E402

from qdora_jax import analysis  # noqa: E402


@pytest.mark.parametrize('block_size', [32, 64, 256])
def test_fp4(block_size):
  w_OxI = weights.matrix(5, (48, 512), 0.02)
  stored, state = bnb.functional.quantize_4bit(
    torch.from_numpy(w_OxI), blocksize=block_size, quant_type='fp4'
  )
  theirs = bnb.functional.dequantize_4bit(stored, state).numpy()
  ours = analysis.round_trip(
    jnp.asarray(w_OxI.T), analysis.LEVELS['fp4'], block_size
  )
  np.testing.assert_allclose(ours.T, theirs, rtol=1e-6, atol=1e-9)
  levels = sorted({*bnb.functional.get_4bit_type('fp4', device='cpu').tolist()})
  np.testing.assert_allclose(analysis.LEVELS['fp4'], levels, rtol=1e-6)
