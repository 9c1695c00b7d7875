"""The five methods on one task, from one config: the README's table.

  python experiments/methods.py runs/methods [--config.train.steps=80 ...]

Each method is a process of its own, so that peak memory is its own; a method
whose run folder has ended is not run again. Learning rates were not swept: the
adapters take the quickstart's, full fine-tuning a tenth of it.
"""

import json
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).parent / 'configs' / 'quickstart.py'
METHODS = {
  'full fine-tuning': ('none', 'none', 1e-4),
  'LoRA': ('none', 'lora', 1e-3),
  'DoRA': ('none', 'dora', 1e-3),
  'QLoRA': ('nf4', 'lora', 1e-3),
  'QDoRA': ('nf4', 'dora', 1e-3),
}


def main() -> None:
  folder, *overrides = sys.argv[1:]
  print('| method | exact match | 95% interval | trained | peak | a step |')
  print('|---|---|---|---|---|---|')
  for name, (quant, method, lr) in METHODS.items():
    workdir = Path(folder) / name.replace(' ', '-')
    if not (workdir / 'summary.json').exists():
      command = [sys.executable, '-m', 'qdora_jax.cli', 'train']
      command += ['--config', str(CONFIG), '--workdir', str(workdir)]
      command += [f'--config.quant.format={quant}', f'--config.optim.lr={lr}']
      command += [f'--config.adapter.method={method}']
      command += ['--config.eval.before=False', *overrides]
      subprocess.run(command, check=True, stdout=sys.stderr)
    print(row(name, workdir), flush=True)


def row(name: str, workdir: Path) -> str:
  """A line of the table, from a run folder."""
  from qdora_jax.folder import load_scores

  summary = json.loads((workdir / 'summary.json').read_text())
  score = load_scores(workdir / 'scores.json')['fine-tuned']
  low, high = score.interval
  seconds = summary['seconds_per_step']
  return (
    f'| {name} | {score.mean:.1%} | {100 * low:.1f} to {100 * high:.1f} '
    f'| {summary["trained_parameters"] / 1e6:.2f} M '
    f'| {summary["peak_memory_bytes"] / 1e9:.1f} GB | {seconds:.1f} s |'
  )


if __name__ == '__main__':
  main()
