"""LoRA, DoRA, QLoRA and QDoRA fine-tuning as pure functions over Flax trees."""

from qdora_jax import nf4, paths
from qdora_jax.adapter import Adapter, init_adapter
from qdora_jax.dora import DoraWeight
from qdora_jax.export import export_base, export_folded, export_merged
from qdora_jax.interop.peft import save_adapter
from qdora_jax.interop.peft_read import load_adapter
from qdora_jax.linear import linear, materialize
from qdora_jax.lora import LoraWeight
from qdora_jax.nf4 import NF4Array
from qdora_jax.pretrained import load_pretrained
from qdora_jax.serving import attach_several
from qdora_jax.specs import AdapterSpec, QuantSpec
from qdora_jax.transforms import (
  adapted_norms,
  attach,
  freeze,
  merge,
  norms,
  quantize,
)

__all__ = [
  'Adapter',
  'AdapterSpec',
  'DoraWeight',
  'LoraWeight',
  'NF4Array',
  'QuantSpec',
  'adapted_norms',
  'attach',
  'attach_several',
  'export_base',
  'export_folded',
  'export_merged',
  'freeze',
  'init_adapter',
  'linear',
  'load_adapter',
  'load_pretrained',
  'materialize',
  'merge',
  'nf4',
  'norms',
  'paths',
  'quantize',
  'save_adapter',
]
