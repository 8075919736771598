"""Weights on disk, both ways: safetensors, torch files, timm's, transformers' and the authors' names, PEFT's adapters."""

from lbpwht_jax.weights.files import BUNDLED, load_bundled, load_weights, replace_head, save_weights
from lbpwht_jax.weights.peft import load_adapter, save_adapter
from lbpwht_jax.weights.pretrained import export_weights, load_pretrained, read_weights

__all__ = [
    "BUNDLED",
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
