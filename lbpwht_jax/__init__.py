"""Low-rank backpropagation through the Walsh-Hadamard transform, for fine-tuning vision transformers in JAX and Flax."""

from lbpwht_jax.layers import LowRankDense
from lbpwht_jax.matmul import low_rank_matmul
from lbpwht_jax.nnx import LowRankLinear
from lbpwht_jax.spec import LowRankSpec, lp_l1, lp_linf
from lbpwht_jax.wht import fast_walsh_hadamard, walsh_matrix

__all__ = [
    "LowRankDense",
    "LowRankLinear",
    "LowRankSpec",
    "fast_walsh_hadamard",
    "low_rank_matmul",
    "lp_l1",
    "lp_linf",
    "walsh_matrix",
]
