"""Floors import only downwards; the rooms are the ones the README names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'qdora_jax'
# A floor a paragraph, the lowest first. Evaluation and plans are used by the
# training story, so they stand on its floor.
FLOORS = """
nf4 lora dora nibbles few_kernels few joined residual several vera linear

paths specs adapter transforms serving sharding

attention rope model linen pretrained interop export placement sight flash

adam8bit analysis beam benchmark chat checkpoint commonsense compiled config
config_file data devices evaluate fastchat findings finetune folder footprint
generate harness intervals job likelihood loss metrics nlg opening optim paged
pictures plan processes prompts published report rows run runs scaling signals
step streaming study sweep tally tasks trackers traffic train

cli_run cli_many cli
"""
FLOOR = {
  room: floor
  for floor, rooms in enumerate(FLOORS.split('\n\n'))
  for room in rooms.split()
}


def rooms() -> list[Path]:
  return [
    p
    for p in PACKAGE.rglob('*.py')
    if p.parent != PACKAGE or (p.stem != '__init__')
  ]


def imports(path: Path) -> set[str]:
  """Rooms of this package that a module imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'qdora_jax':
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split('.')
      if parts[0] == 'qdora_jax':
        found.add(parts[1])
    elif isinstance(node, ast.Import):
      for alias in node.names:
        parts = alias.name.split('.')
        if parts[0] == 'qdora_jax' and len(parts) > 1:
          found.add(parts[1])
  return found


@pytest.mark.parametrize('path', rooms(), ids=lambda p: p.stem)
def test_imports_go_down(path):
  room = path.relative_to(PACKAGE).with_suffix('').parts[0]
  for other in imports(path):
    assert FLOOR[other] <= FLOOR[room], f'{room} imports {other}'


def test_every_room_has_a_floor():
  found = {p.relative_to(PACKAGE).with_suffix('').parts[0] for p in rooms()}
  assert found == set(FLOOR)


def test_mathematics_hears_of_nothing_above_or_beside():
  """dora.py never hears of NF4; mathematics knows no trees."""
  assert imports(PACKAGE / 'nf4.py') == set()
  assert imports(PACKAGE / 'lora.py') == set()
  assert imports(PACKAGE / 'dora.py') == {'lora'}


def test_top_level_is_fixed():
  listed = subprocess.run(
    ['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True
  )
  if listed.returncode:
    pytest.skip('not a git checkout')
  top = {line.split('/')[0] for line in listed.stdout.splitlines()}
  assert {name for name in top if not name.startswith('.')} <= {
    'pyproject.toml',
    'README.md',
    'LICENSE',
    'qdora_jax',
    'experiments',
    'notebooks',
    'tests',
  }


def test_only_the_seam_asks_what_a_leaf_is():
  leaves = {'NF4Array', 'LoraWeight', 'DoraWeight'}
  for path in rooms():
    for node in ast.walk(ast.parse(path.read_text())):
      asks = (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == 'isinstance'
      )
      if asks and path.stem != 'linear':
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        assert not names & leaves, f'{path.name}:{node.lineno}'


def test_import_needs_the_core_alone():
  """No extra, no torch, and neither transformers nor matplotlib yet."""
  code = (
    'import sys, qdora_jax; print([m for m in ("torch", "gguf", "transformers",'
    ' "matplotlib", "orbax", "reasoning_gym") if m in sys.modules])'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == '[]'
