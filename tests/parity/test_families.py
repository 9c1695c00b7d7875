"""Settings of config.json that transformers fills in, by its logits."""

import pytest

pytest.importorskip('torch')
pytest.importorskip('bitsandbytes')
pytest.importorskip('peft')

from golden import families, ours, strangers, weights

from qdora_jax import load_pretrained

_LONG = families.CONFIGS['phi3_long']['rope_parameters']
_YARN = families.CONFIGS['llama_yarn']['rope_parameters']
_ORIGINAL = 'original_max_position_embeddings'
_TWO = ['sliding_attention', 'full_attention'] * 2


@pytest.mark.parametrize(
  'name, changes',
  [
    ('phi3_long', {_ORIGINAL: ...}),
    (
      'phi3_long',
      {_ORIGINAL: ..., 'rope_parameters': {**_LONG, _ORIGINAL: 4096}},
    ),
    (
      'phi3_long',
      {_ORIGINAL: 18, 'rope_parameters': {**_LONG, _ORIGINAL: 32}},
    ),
    ('llama_yarn', {_ORIGINAL: 32}),
    (
      'llama_yarn',
      {
        'rope_parameters': {k: v for k, v in _YARN.items() if k != _ORIGINAL},
      },
    ),
    ('llama_yarn', {'rope_parameters': {**_YARN, 'beta_fast': 1.0}}),
    ('llama_yarn', {'rope_parameters': {**_YARN, 'beta_slow': 0.25}}),
    ('qwen2', {'max_window_layers': 0}),
    ('qwen2', {'max_window_layers': ...}),
    ('qwen2', {'sliding_window': None}),
    ('qwen2', {'layer_types': _TWO}),
    ('qwen3', {'sliding_window': 5, 'max_window_layers': 1}),
    (
      'qwen3',
      {'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1},
    ),
    ('smollm3', {'sliding_window': 5}),
    (
      'smollm3',
      {'use_sliding_window': True, 'sliding_window': 5, 'layer_types': None},
    ),
    (
      'smollm3',
      {'use_sliding_window': True, 'sliding_window': 5, 'layer_types': _TWO},
    ),
  ],
)
def test_settings_that_transformers_fills_in(name, changes, tmp_path):
  config, tensors = families.make(name)
  config = {k: v for k, v in {**config, **changes}.items() if v is not ...}
  folder = weights.write_hf(tmp_path, config, tensors)
  model, params, _ = load_pretrained(folder, remat='none')
  tokens = families.prompt()
  got = ours.logits(model, params, tokens)
  want = strangers.logits(strangers.load(folder), tokens)
  assert ours.relative(got, want) <= 1e-5
