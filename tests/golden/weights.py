"""Inputs both sides are given, made again from seeds with numpy alone.

Everything comes from `RandomState`, whose stream numpy has frozen, so the
golden files need not hold the inputs. Matrices are in the (out, in) order of
torch; adapters are in ours, (in, rank) and (rank, out).
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

# Our name of each linear of a layer and the Hugging Face one.
LINEARS = {
  'attn/q': 'self_attn.q_proj',
  'attn/k': 'self_attn.k_proj',
  'attn/v': 'self_attn.v_proj',
  'attn/o': 'self_attn.o_proj',
  'mlp/gate': 'mlp.gate_proj',
  'mlp/up': 'mlp.up_proj',
  'mlp/down': 'mlp.down_proj',
}


def matrix(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
  """Normal float32 numbers of the given standard deviation."""
  normal = np.random.RandomState(seed).standard_normal(shape)
  return (normal * scale).astype(np.float32)


def edges() -> np.ndarray:
  """A (9, 64) matrix of awkward blocks, one to a row.

  Thresholds hit exactly and missed by one step either way, codes hit exactly,
  a zero block, tiny and huge blocks, a constant, one outlier, signed zeros.
  """
  # bitsandbytes functional.py, get_4bit_type("nf4"); see REFERENCE.md.
  codes = np.float32(
    [
      -1.0,
      -0.6961928009986877,
      -0.5250730514526367,
      -0.39491748809814453,
      -0.28444138169288635,
      -0.18477343022823334,
      -0.09105003625154495,
      0.0,
      0.07958029955625534,
      0.16093020141124725,
      0.24611230194568634,
      0.33791524171829224,
      0.44070982933044434,
      0.5626170039176941,
      0.7229568362236023,
      1.0,
    ]
  )
  thresholds = (codes[1:] + codes[:-1]) / np.float32(2)
  up = np.nextafter(thresholds, np.float32(2))
  down = np.nextafter(thresholds, np.float32(-2))
  near = np.concatenate([thresholds, up, down, codes, [np.float32(-1)] * 3])
  out = np.zeros((9, 64), np.float32)
  out[0] = near
  out[1] = near * np.float32(2.0**-7)
  out[3] = matrix(31, (64,), 1e-30)
  out[4] = matrix(32, (64,), 1e30)
  out[5] = -0.25
  out[6] = matrix(33, (64,), 1e-4)
  out[6, 17] = -3.0
  out[7] = np.where(np.arange(64) % 2, np.float32(-0.0), np.float32(0.5))
  out[8] = matrix(34, (64,)) * np.float32(0.02)
  return out


class LinearCase(NamedTuple):
  """One adapted linear: input, weight, adapter and output cotangent."""

  x: np.ndarray  # [B, L, I]
  weight: np.ndarray  # [O, I]
  bias: np.ndarray | None  # [O]
  lora_a: np.ndarray  # [I, R]
  lora_b: np.ndarray  # [R, O]
  magnitude: np.ndarray  # [O]
  dy: np.ndarray  # [B, L, O]


def linear_case(
  seed: int, i: int, o: int, r: int, bias: bool = True
) -> LinearCase:
  """A case away from initialization: B random, magnitude perturbed."""
  weight = matrix(seed, (o, i), 0.05)
  norm = np.sqrt((weight.astype(np.float64) ** 2).sum(1)).astype(np.float32)
  return LinearCase(
    x=matrix(seed + 1, (2, 7, i)),
    weight=weight,
    bias=matrix(seed + 2, (o,)) if bias else None,
    lora_a=matrix(seed + 3, (i, r), i**-0.5),
    lora_b=matrix(seed + 4, (r, o), 0.05),
    magnitude=norm * (1 + matrix(seed + 5, (o,), 0.1)),
    dy=matrix(seed + 6, (2, 7, o)),
  )


def tiny_llama(
  seed: int, tied: bool = True
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A LlamaForCausalLM of some 100,000 numbers: config and tensors.

  The untied one has biases in attention, and heads of 16, so that the heads
  together are wider than the model.
  """
  d, f, n, h, k, v = 64, 128, 3, 8, 4, 256
  dh = 8 if tied else 16
  config = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'attention_bias': not tied,
    'attention_dropout': 0.0,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'dtype': 'float32',
    'head_dim': dh,
    'hidden_act': 'silu',
    'hidden_size': d,
    'initializer_range': 0.02,
    'intermediate_size': f,
    'max_position_embeddings': 128,
    'mlp_bias': False,
    'num_attention_heads': h,
    'num_hidden_layers': n,
    'num_key_value_heads': k,
    'rms_norm_eps': 1e-5,
    'rope_parameters': {'rope_theta': 10000.0, 'rope_type': 'default'},
    'tie_word_embeddings': tied,
    'vocab_size': v,
  }
  shapes = {
    'attn/q': (h * dh, d),
    'attn/k': (k * dh, d),
    'attn/v': (k * dh, d),
    'attn/o': (d, h * dh),
    'mlp/gate': (f, d),
    'mlp/up': (f, d),
    'mlp/down': (d, f),
  }
  rng = np.random.RandomState(seed)

  def normal(*shape: int, scale: float, mean: float = 0.0) -> np.ndarray:
    return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

  tensors = {'model.embed_tokens.weight': normal(v, d, scale=0.3)}
  for layer in range(n):
    at = f'model.layers.{layer}.'
    for ours, name in LINEARS.items():
      o, i = shapes[ours]
      tensors[f'{at}{name}.weight'] = normal(o, i, scale=i**-0.5)
      if ours.startswith('attn/') and not tied:
        tensors[f'{at}{name}.bias'] = normal(o, scale=0.2)
    for norm in ('input_layernorm', 'post_attention_layernorm'):
      tensors[f'{at}{norm}.weight'] = normal(d, scale=0.1, mean=1.0)
  tensors['model.norm.weight'] = normal(d, scale=0.1, mean=1.0)
  if not tied:
    tensors['lm_head.weight'] = normal(v, d, scale=d**-0.5)
  return config, tensors


def write_hf(
  folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Path:
  """Writes config.json and model.safetensors; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config, indent=2))
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  return folder


def hf_module(layer: int, linear: str) -> str:
  """'model.layers.3.self_attn.q_proj' for layer 3 and 'attn/q'."""
  return f'model.layers.{layer}.{LINEARS[linear]}'


def initial_a(name: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
  """LoRA's A [I, R] for the module of this Hugging Face name.

  Uniform in +-1/sqrt(I), as PEFT's own initialization.
  """
  rng = np.random.RandomState(zlib.crc32(f'{seed}:{name}'.encode()))
  bound = shape[0] ** -0.5
  return rng.uniform(-bound, bound, shape).astype(np.float32)


def batches(
  seed: int,
  vocab: int,
  steps: int,
  rows: int,
  length: int,
  distinct: int | None = None,
) -> np.ndarray:
  """Tokens int32 [steps, B, L], rare ones rarer (Zipf), so loss can fall.

  With distinct, that many batches are taken in turns, so it falls far.
  """
  rng = np.random.RandomState(seed)
  share = 1.0 / (np.arange(vocab) + 10.0)
  order = rng.permutation(vocab)
  shape = (distinct or steps, rows, length)
  draw = rng.choice(vocab, shape, p=share / share.sum())
  turn = np.arange(steps) % len(draw)
  return order[draw[turn]].astype(np.int32)
