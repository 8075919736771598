"""Reads and writes weights: safetensors and torch files; timm's, transformers' and the authors' names; PEFT's adapters."""

from lbpwht_jax.weights.adapt_from import adapt_from
from lbpwht_jax.weights.files import BUNDLED, load_bundled, load_weights, replace_head, save_weights
from lbpwht_jax.weights.peft import load_adapter, save_adapter
from lbpwht_jax.weights.pretrained import export_weights, load_pretrained
from lbpwht_jax.weights.sources import read_weights

__all__ = [
    "BUNDLED",
    "adapt_from",
    "export_weights",
    "load_adapter",
    "load_bundled",
    "load_pretrained",
    "load_weights",
    "read_weights",
    "replace_head",
    "save_adapter",
    "save_weights",
]
