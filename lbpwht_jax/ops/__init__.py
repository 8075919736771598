"""The operation: Walsh functions on a token grid, the projection onto them, and products whose backward pass uses it."""

from lbpwht_jax.ops.affine import Affine
from lbpwht_jax.ops.basis import coefficient_count, projection_matrices
from lbpwht_jax.ops.heuristic import predicted_speedup
from lbpwht_jax.ops.matmul import Link, low_rank_matmul
from lbpwht_jax.ops.projection import expand, project
from lbpwht_jax.ops.residuals import Residuals
from lbpwht_jax.ops.spec import LowRankSpec, lp_l1, lp_linf
from lbpwht_jax.ops.walsh import fast_walsh_hadamard, walsh_matrix

__all__ = [
    "Affine",
    "Link",
    "LowRankSpec",
    "Residuals",
    "coefficient_count",
    "expand",
    "fast_walsh_hadamard",
    "low_rank_matmul",
    "lp_l1",
    "lp_linf",
    "predicted_speedup",
    "project",
    "projection_matrices",
    "walsh_matrix",
]
