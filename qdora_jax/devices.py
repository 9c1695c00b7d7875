"""GPUs by name: what they hold and how fast they are, as published."""

import dataclasses
import difflib
from typing import Any

GIB = 2**30
# What no program can have of a card: CUDA's context (some 500 MiB on recent
# cards), cuBLAS's workspace, buffers of collectives. Beyond these JAX takes 75%
# of a card at start: XLA_PYTHON_CLIENT_MEM_FRACTION=.97 lets it have the rest.
RESERVED = GIB


@dataclasses.dataclass(frozen=True)
class Device:
  """One GPU.

  Attributes:
    name: ours.
    memory: bytes, as nvidia-smi counts them.
    flops: dense 16-bit products with float32 sums, FLOP/s.
    bandwidth: of its memory, bytes/s.
    link: to its neighbours, bytes/s in one direction: NVLink, else PCIe.
    host_link: to the host's memory, bytes/s in one direction (PCIe).
  """

  name: str
  memory: int
  flops: float
  bandwidth: float
  link: float
  host_link: float

  @property
  def usable(self) -> int:
    """Bytes that a program can have."""
    return self.memory - RESERVED


def _device(
  name: str, mib: int, tflops: float, gb_s: float, link: float, host: float
) -> Device:
  return Device(name, mib * 2**20, tflops * 1e12, gb_s * 1e9, link * 1e9, host)


# PCIe 3, 4 and 5, 16 lanes, one direction (PCI-SIG), bytes/s.
_PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63e9}

# Figures are those of NVIDIA's data sheets, named on the line above; sparse
# ones are halved. On GeForce cards products with float32 sums run at half the
# rate of those with float16 sums, which advertisements give.
DEVICES: dict[str, Device] = {
  device.name: device
  for device in (
    # NVIDIA T4 data sheet (float16: it has no bfloat16 units).
    _device('t4', 15_360, 65, 320, 15.75, _PCIE[3]),
    # NVIDIA V100 data sheet, SXM2 (float16: it has no bfloat16 units).
    _device('v100-16', 16_384, 125, 900, 150, _PCIE[3]),
    # NVIDIA Ada GPU architecture white paper, table of GeForce RTX 4080.
    _device('rtx-4080', 16_376, 97.5, 717, 31.5, _PCIE[4]),
    # NVIDIA Ampere GA102 white paper, table of GeForce RTX 3090.
    _device('rtx-3090', 24_576, 71, 936, 31.5, _PCIE[4]),
    # NVIDIA Ada GPU architecture white paper, table of GeForce RTX 4090.
    _device('rtx-4090', 24_564, 165.2, 1008, 31.5, _PCIE[4]),
    # NVIDIA A10G data sheet, as AWS's G5 instances have it.
    _device('a10g', 23_028, 70, 600, 31.5, _PCIE[4]),
    # NVIDIA L4 data sheet (242 with sparsity).
    _device('l4', 23_034, 121, 300, 31.5, _PCIE[4]),
    # NVIDIA RTX A6000 data sheet (309.7 with sparsity).
    _device('a6000', 49_140, 154.8, 768, 31.5, _PCIE[4]),
    # NVIDIA L40S data sheet (733 with sparsity).
    _device('l40s', 46_068, 362, 864, 31.5, _PCIE[4]),
    # NVIDIA A100 data sheet, SXM: 40 GB, 80 GB.
    _device('a100-40', 40_960, 312, 1555, 300, _PCIE[4]),
    _device('a100-80', 81_920, 312, 2039, 300, _PCIE[4]),
    # NVIDIA H100 data sheet, SXM (1,979 with sparsity).
    _device('h100', 81_559, 989.5, 3350, 450, _PCIE[5]),
    # NVIDIA H200 data sheet, SXM.
    _device('h200', 143_771, 989.5, 4800, 450, _PCIE[5]),
  )
}


def best_dtype(device: Any) -> tuple[str, str]:
  """(compute dtype, why), for a device of `jax.devices()`.

  bfloat16 on whatever accelerator has it. NVIDIA's tensor cores know it from
  compute capability 8.0 on, float16 from 7.0 on; before, float16 is no faster
  (CUDA C++ Programming Guide, Compute Capabilities). A CPU's float32 is exact.
  """
  name = device.device_kind
  if device.platform == 'cpu':
    return 'float32', 'this is a CPU'
  if not hasattr(device, 'compute_capability'):
    return 'bfloat16', f'{name} has it'
  major, _, minor = str(device.compute_capability).partition('.')
  if not major.isdigit() or int(major) >= 8:  # AMD's are names.
    return 'bfloat16', f'{name} has it'
  why = f'{name} (compute capability {major}.{minor}) has no bfloat16'
  if int(major) == 7:
    return 'float16', f'{why}; the loss is scaled'
  return 'float32', f'{why}, and no fast float16'


def find(name: str) -> Device:
  """The GPU of that name.

  Raises:
    ValueError: if it is not known, naming the nearest.
  """
  if name.lower() in DEVICES:
    return DEVICES[name.lower()]
  near = difflib.get_close_matches(name.lower(), DEVICES, n=3, cutoff=0.4)
  raise ValueError(
    f'no device {name!r} is known; near: {", ".join(near or DEVICES)} (all: '
    f'{", ".join(DEVICES)})'
  )
