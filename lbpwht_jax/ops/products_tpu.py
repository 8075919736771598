"""Walsh transforms as products for TPUs: one matrix for the whole grid, or for a band of it, fused with what stands beside it.

Sums by blocks and concatenated prefix tokens, the forms for CPUs, become copies there, and arrays that are kept.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lbpwht_jax.ops.basis import coefficient_count, grid_axes, projection_matrices
from lbpwht_jax.ops.gelu import gelu, gelu_slope
from lbpwht_jax.ops.platforms import is_narrow
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

KINDS = ("project", "expand", "gelu_backward", "gelu_backward_projected")
# Up to this many tokens there are no bands.
_ONE_BAND = 1024
# A TPU v5e multiplies and adds about as often in the time that it takes to move an element of 16 bits.
_MACS_PER_MOVED = 240


def takes(dtype: Any, spec: SpecFields, grid: Grid, prefix_tokens: int) -> bool:
    """Whether the products take no longer than reading and writing does, for a token grid in some dtype."""
    bands = _bands(spec, grid, prefix_tokens)
    tokens = (prefix_tokens + math.prod(grid)) / bands
    coefficients = (prefix_tokens + coefficient_count(spec, grid)) / bands
    return is_narrow(dtype) and tokens * coefficients <= _MACS_PER_MOVED * (tokens + coefficients)


def form(kind: str, spec: SpecFields, grid: Grid, prefix_tokens: int) -> Callable[..., Any]:
    """One transform, as in ``lbpwht_jax.ops.kernels``."""
    analysis, synthesis = (functools.partial(_apply, m) for m in _matrices(spec, grid, prefix_tokens))

    def gelu_backward(coefficients: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # without the barrier XLA would merge this GELU with the forward pass's, and keep its result as well as x
        coefficients, x = lax.optimization_barrier((coefficients, x))
        return synthesis(coefficients) * gelu_slope(x), analysis(gelu(x))

    def gelu_backward_projected(coefficients: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        dx, projected = gelu_backward(coefficients, x)
        return analysis(dx), projected

    return (analysis, synthesis, gelu_backward, gelu_backward_projected)[KINDS.index(kind)]


def _bands(spec: SpecFields, grid: Grid, prefix_tokens: int) -> int:
    """How many runs of tokens, all alike, have coefficients of their own: the rows of blocks of a large grid."""
    axes = grid_axes(spec, grid)
    alike = not prefix_tokens and all(axis.whole for axis in axes)
    return axes[0].blocks if alike and math.prod(grid) > _ONE_BAND else 1


@functools.cache
def _matrices(spec: SpecFields, grid: Grid, prefix_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A band's analysis and synthesis."""
    analysis, synthesis = projection_matrices(spec, grid, prefix_tokens)
    bands = _bands(spec, grid, prefix_tokens)
    rows, tokens = (size // bands for size in analysis.shape)
    return analysis[:rows, :tokens], synthesis[:tokens, :rows]


def _apply(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """``matrix @`` each band of ``[..., tokens or coefficients, channels]``, accumulated in float32 by the TPU."""
    *batch, rows, channels = x.shape
    x = x.reshape(*batch, rows // matrix.shape[1], matrix.shape[1], channels)
    product = jnp.einsum("rn,...nc->...rc", jnp.asarray(matrix, x.dtype), x, preferred_element_type=x.dtype)
    return product.reshape(*batch, -1, channels)
