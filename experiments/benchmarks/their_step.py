"""The other side of step.py: PEFT's step in a process of its own."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import theirs
import torch
import turns


def make(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
  """A step that is waited for, and its first loss."""
  tokens = np.random.default_rng(args.seed).integers(
    0, args.config['vocab_size'], (args.batch, args.sequence), np.int32
  )
  adapter = None
  if args.adapter is not None:
    adapter = {
      'r': args.rank,
      'lora_alpha': args.alpha,
      'target_modules': 'all-linear',
      'use_dora': args.adapter == 'dora',
      'task_type': 'CAUSAL_LM',
    }
  source = Path(args.folder) if args.folder else args.config
  once = theirs.trainer(
    source, args.packed, adapter, args.dtype, tokens, args.checkpointing
  )
  if torch.cuda.is_available():
    # Not what making the model took.
    torch.cuda.reset_peak_memory_stats()
  return once, {'loss': once(), 'compile': None}


def peak() -> dict[str, int]:
  if torch.cuda.is_available():
    return {'peak': torch.cuda.max_memory_allocated()}
  return {'peak': turns.peak_memory()}


if __name__ == '__main__':
  args = argparse.Namespace(**json.loads(sys.argv[1]))
  turns.serve(lambda: make(args), peak)
