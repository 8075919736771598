"""Models under rules: low rank, LoRA and freezing, for Linen and NNX."""

from lbpwht_jax.adaptation.create import create_model
from lbpwht_jax.adaptation.entry import adapt, resolve
from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.loops import unrolled, with_loops
from lbpwht_jax.adaptation.nnx import resolution_of
from lbpwht_jax.adaptation.nnx_branches import merge, unmerge, with_branches
from lbpwht_jax.adaptation.nnx_layers import FrozenParam
from lbpwht_jax.adaptation.partition import join_params, split_params
from lbpwht_jax.adaptation.plan import Plan, PlannedLayer, load_plan
from lbpwht_jax.adaptation.presets import (
    LayerCounts,
    Method,
    Train,
    adapted_model,
    default_train,
    layer_counts,
    parse_method,
    stored_method,
)
from lbpwht_jax.adaptation.resolution import Resolution, TrainableParameters
from lbpwht_jax.adaptation.rules import Freeze, Lean, LoRA, LowRank, Rule

__all__ = [
    "AdaptedModule",
    "Freeze",
    "FrozenParam",
    "LayerCounts",
    "Lean",
    "LoRA",
    "LowRank",
    "Method",
    "Plan",
    "PlannedLayer",
    "Resolution",
    "Rule",
    "Train",
    "TrainableParameters",
    "adapt",
    "adapted_model",
    "create_model",
    "default_train",
    "join_params",
    "layer_counts",
    "load_plan",
    "merge",
    "parse_method",
    "resolution_of",
    "resolve",
    "split_params",
    "stored_method",
    "unmerge",
    "unrolled",
    "with_branches",
    "with_loops",
]
