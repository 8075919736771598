"""Low-rank backpropagation through the Walsh-Hadamard transform, for fine-tuning vision transformers in JAX and Flax."""

from importlib.metadata import version

from lbpwht_jax.adaptation import Freeze, LoRA, LowRank, adapt, create_model
from lbpwht_jax.layers import LowRankDense, LowRankLinear
from lbpwht_jax.models import list_models
from lbpwht_jax.ops import LowRankSpec, fast_walsh_hadamard, low_rank_matmul, lp_l1, lp_linf, walsh_matrix
from lbpwht_jax.weights import load_adapter, load_pretrained, save_adapter

__version__ = version("lbpwht_jax")

__all__ = [
    "Freeze",
    "LoRA",
    "LowRank",
    "LowRankDense",
    "LowRankLinear",
    "LowRankSpec",
    "__version__",
    "adapt",
    "create_model",
    "fast_walsh_hadamard",
    "list_models",
    "load_adapter",
    "load_pretrained",
    "low_rank_matmul",
    "lp_l1",
    "lp_linf",
    "save_adapter",
    "walsh_matrix",
]
