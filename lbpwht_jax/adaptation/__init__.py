"""Models under rules: low rank, LoRA and freezing, for Linen and NNX."""

from lbpwht_jax.adaptation.create import create_model
from lbpwht_jax.adaptation.linen import AdaptedModule, adapt, resolve
from lbpwht_jax.adaptation.nnx import FrozenParam
from lbpwht_jax.adaptation.partition import join_params, split_params
from lbpwht_jax.adaptation.presets import Method, Train, adapted_model, parse_method
from lbpwht_jax.adaptation.rules import Freeze, LoRA, LowRank, Resolution, Rule

__all__ = [
    "AdaptedModule",
    "Freeze",
    "FrozenParam",
    "LoRA",
    "LowRank",
    "Method",
    "Resolution",
    "Rule",
    "Train",
    "adapt",
    "adapted_model",
    "create_model",
    "join_params",
    "parse_method",
    "resolve",
    "split_params",
]
