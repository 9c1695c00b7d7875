"""Loading onto devices: a layer at a time, in place, no more than is held."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import weights
from tiny import quick_compiles  # noqa: F401

from qdora_jax import AdapterSpec, QuantSpec, load_pretrained, quantize
from qdora_jax.placement import _programs
from qdora_jax.sharding import make_mesh, unsharded

# Blocks of 8: the tiny model's kernels of 64 rows then divide over 8 devices.
SPECS = {
  'whole': None,
  'nf4': QuantSpec(block_size=8, double_quant=False),
  'nf4 double': QuantSpec(block_size=8),
}


@pytest.mark.parametrize('stored', SPECS)
@pytest.mark.parametrize('sizes', [(1, 8, 1), (1, 4, 2), (2, 1, 4)])
def test_a_base_is_the_same_on_every_mesh(tmp_path, stored, sizes):
  folder = tiny.write_model(tmp_path, tied=False)
  _, one, _ = load_pretrained(folder, SPECS[stored])
  _, many, _ = load_pretrained(folder, SPECS[stored], mesh=make_mesh(*sizes))
  split = 0
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
    split += not b.sharding.is_fully_replicated
  assert split >= 8


@pytest.mark.parametrize(
  'init',
  [
    pytest.param('pissa', marks=tiny.AGAIN),
    pytest.param('loftq', marks=pytest.mark.slow),
  ],
)
def test_adapters_taken_out_of_the_weights_are_the_same_on_a_mesh(
  tmp_path, init
):
  folder = tiny.write_model(tmp_path)
  both = [
    load_pretrained(folder, SPECS['nf4'], AdapterSpec(init=init), mesh=mesh)
    for mesh in (None, make_mesh(fsdp=4, tensor=2))
  ]
  for a, b in zip(*(jax.tree.leaves(parts[1]) for parts in both), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_stack_is_written_in_place():
  """From the compiled program: what comes out is what went in."""
  shapes = ((4, 64, 32), (4, 2, 32))
  _, write = _programs(tuple((s, jnp.float32) for s in shapes), None)
  stack = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  layer = [jax.ShapeDtypeStruct(s[1:], jnp.float32) for s in shapes]
  compiled = write.lower(stack, layer, np.int32(0)).compile()
  memory = compiled.memory_analysis()
  whole = 4 * sum(int(np.prod(s)) for s in shapes)
  assert memory.alias_size_in_bytes == whole
  assert memory.temp_size_in_bytes < whole / 4


def test_what_does_not_divide_is_said():
  """9 blocks do not divide over 8 devices; 30 features not over 4."""
  tree = {
    'layers': {
      'q': {'kernel': jax.ShapeDtypeStruct((2, 576, 64), jnp.float32)},
      'k': {'kernel': jax.ShapeDtypeStruct((2, 512, 30), jnp.float32)},
      'norm': {'scale': jax.ShapeDtypeStruct((2, 3), jnp.float32)},
    }
  }
  mesh = make_mesh(fsdp=8)
  assert unsharded(tree, mesh) == {}
  packed = jax.eval_shape(lambda t: quantize(t, QuantSpec('.*kernel')), tree)
  assert unsharded(packed, mesh) == {
    'layers/q/kernel': '9 blocks do not divide over fsdp=8'
  }
  assert unsharded(packed, make_mesh(fsdp=2, tensor=4)) == {
    'layers/q/kernel': '9 blocks do not divide over fsdp=2',
    'layers/k/kernel': '30 features do not divide over tensor=4',
  }


PROCESS = """
  import sys
  import jax
  import numpy as np

  address, rank, folder, out = sys.argv[1:]
  jax.config.update('jax_num_cpu_devices', 4)
  jax.distributed.initialize(address, 2, int(rank))
  from qdora_jax import QuantSpec, load_pretrained
  from qdora_jax.interop import hf
  from qdora_jax.sharding import make_mesh

  read, get = {}, hf.HFCheckpoint._get

  def noted(self, name, part=None):
    array = get(self, name, part)
    read[name] = array.size
    return array

  hf.HFCheckpoint._get = noted
  spec = QuantSpec(block_size=8)
  for name, sizes in (('fsdp', (1, 8, 1)), ('both', (1, 2, 4))):
    read.clear()
    params = load_pretrained(folder, spec, mesh=make_mesh(*sizes))[1]
    shards = {}
    for n, array in enumerate(jax.tree.leaves(params)):
      for m, shard in enumerate(array.addressable_shards):
        bounds = [s.indices(k)[:2] for s, k in zip(shard.index, array.shape)]
        shards[f'{n}/{m}/data'] = np.asarray(shard.data)
        shards[f'{n}/{m}/bounds'] = np.array(bounds, int).reshape(-1, 2)
    np.savez(f'{out}/{name}{rank}.npz', **shards)
    np.savez(f'{out}/{name}{rank}_read.npz', **read)
"""


@pytest.mark.slow
def test_each_process_reads_what_its_devices_hold(tmp_path):
  """Two processes of four devices; together they hold what one alone does."""
  config, tensors = weights.tiny_llama(0, False)
  folder = weights.write_hf(tmp_path / 'model', config, tensors)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  program = [sys.executable, '-c', textwrap.dedent(PROCESS), address]
  running = [
    subprocess.Popen([*program, str(rank), folder, tmp_path], env=env)
    for rank in range(2)
  ]
  assert [process.wait(timeout=900) for process in running] == [0, 0]
  _, one, _ = load_pretrained(folder, QuantSpec(block_size=8))
  leaves = jax.tree.leaves(one)
  for name in ('fsdp', 'both'):
    covered = [np.zeros(a.shape, bool) for a in leaves]
    for rank in range(2):
      shards = np.load(tmp_path / f'{name}{rank}.npz')
      for key in shards.files:
        n, m, what = key.split('/')
        if what == 'data':
          place = tuple(slice(*b) for b in shards[f'{n}/{m}/bounds'])
          np.testing.assert_array_equal(leaves[int(n)][place], shards[key])
          covered[int(n)][place] = True
      read = np.load(tmp_path / f'{name}{rank}_read.npz')
      for tensor in read.files:
        whole = tensors[tensor].size
        vector = tensors[tensor].ndim == 1
        assert read[tensor] == (whole if vector else whole // 2), tensor
    assert all(c.all() for c in covered)


LARGE = r"""
  import json
  import re
  import sys
  import jax
  import jax.numpy as jnp

  jax.config.update('jax_num_cpu_devices', 8)
  from qdora_jax import QuantSpec, load_pretrained
  from qdora_jax.sharding import make_mesh

  params = load_pretrained(
    sys.argv[1], QuantSpec(), dtype=jnp.bfloat16, mesh=make_mesh(fsdp=8)
  )[1]
  shards = [s for a in jax.tree.leaves(params) for s in a.addressable_shards]
  # Not getrusage's: that begins with what the parent held.
  status = open('/proc/self/status').read()
  peak = 1024 * int(re.search(r'VmHWM:\s+(\d+)', status)[1])
  print(json.dumps([peak, sum(s.data.nbytes for s in shards)]))
"""


@pytest.mark.slow
def test_two_gigabytes_are_loaded_within_little_more_than_they_become(tmp_path):
  """Peak memory of the whole process, Python and JAX included."""
  largest = tiny.script('benchmarks/load.py').write_llama(tmp_path)
  program = [sys.executable, '-c', textwrap.dedent(LARGE), tmp_path]
  out = subprocess.run(program, capture_output=True, check=True, timeout=900)
  peak, held = json.loads(out.stdout)
  whole = sum(file.stat().st_size for file in tmp_path.glob('*.safetensors'))
  assert whole > 1.9e9 and held < 0.5 * whole
  assert peak <= held + 3 * largest
