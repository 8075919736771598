"""Low-rank backpropagation through the Walsh-Hadamard transform, for fine-tuning vision transformers in JAX and Flax."""

from lbpwht_jax.adaptation.linen import adapt
from lbpwht_jax.adaptation.rules import Freeze, LoRA, LowRank
from lbpwht_jax.layers.linen import LowRankDense
from lbpwht_jax.layers.nnx import LowRankLinear
from lbpwht_jax.models import create_model, list_models
from lbpwht_jax.ops.matmul import low_rank_matmul
from lbpwht_jax.ops.spec import LowRankSpec, lp_l1, lp_linf
from lbpwht_jax.ops.walsh import fast_walsh_hadamard, walsh_matrix
from lbpwht_jax.weights.pretrained import load_pretrained

__all__ = [
    "Freeze",
    "LoRA",
    "LowRank",
    "LowRankDense",
    "LowRankLinear",
    "LowRankSpec",
    "adapt",
    "create_model",
    "fast_walsh_hadamard",
    "list_models",
    "load_pretrained",
    "low_rank_matmul",
    "lp_l1",
    "lp_linf",
    "walsh_matrix",
]
