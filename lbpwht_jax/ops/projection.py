"""From a grid of tokens to Walsh coefficients and back, with every static choice made in numpy, once a shape.

``project`` applies ``A`` (coefficients x tokens) and ``expand`` applies ``E`` (tokens x coefficients) along the token axis.
Both are Kronecker products of one small matrix a grid axis, restricted to the selected functions of every block. They are
scaled so that the low-rank products need no further factor: ``dW = (A x)^T (A g)`` and ``dx = E ((A g) W^T)``.

Blocks are laid over the grid centred, the odd missing token first at the top or left, in both projections. On whole blocks
``A`` holds the Walsh functions divided by the square root of the block's size, and ``E = A^T``. On partial blocks:

- ``"fitted"``: per axis, the functions restricted to the block's tokens, orthonormalised in sequency order (Gram-Schmidt);
  those that depend on earlier ones vanish and cost nothing. ``E = A^T`` and ``E A`` is an orthogonal projector, onto the
  span of the selected functions' restrictions when the selection is closed downwards (as LP_{L1} and LP_{Linf} are).
- ``"official"``: the grid is reflected out to whole blocks, analysed, expanded and cropped: ``E A`` is no projector.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from lbpwht_jax.ops.basis import coefficient_count, coefficient_indices, grid_axis, projection_matrices
from lbpwht_jax.ops.block_sums import aligned_pieces, block_matrices, join_pieces, piece_sizes, split_pieces
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.spec import Grid, LowRankSpec

__all__ = ["coefficient_count", "expand", "project", "projection_matrices"]

# Up to this many tokens one matrix a grid is the faster form; above it one product an axis (measured on CPU, float32).
_MATRIX_TOKENS = 256


def _apply(matrix: np.ndarray, x: jax.Array, precision: Any) -> jax.Array:
    """``matrix @ x`` over the last two axes, accumulated in at least float32, as one batched product.

    XLA's CPU backend transposes and copies for ``einsum("rl,blc->brc")``. With the matrix repeated along the batch it calls
    a plain matrix product an image, which is 3 to 6 times faster there.
    """
    batch = x.shape[:-2]
    repeated = jnp.broadcast_to(jnp.asarray(matrix, x.dtype), (*batch, *matrix.shape[-2:]))
    axes = tuple(range(len(batch)))
    product = jax.lax.dot_general(
        repeated,
        x,
        (((x.ndim - 1,), (x.ndim - 2,)), (axes, axes)),
        precision=precision,
        preferred_element_type=accumulation_dtype(x.dtype),
    )
    return product.astype(x.dtype)


@functools.cache
def _factors(spec: LowRankSpec, grid: Grid) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """One analysis and one synthesis matrix an axis, and where the kept coefficients lie in their (row-major) product.

    The matrices cover one block on axes that consist of whole blocks, all blocks together on the others.
    """
    index = coefficient_indices(spec, grid)
    analyses, syntheses = [], []
    position = np.zeros(len(index), np.int64)
    for n, length in enumerate(grid):
        axis = grid_axis(length, spec.block, spec.projection)
        functions = sorted({basis[n] for basis in spec.bases})
        blocks = slice(0, 1) if axis.whole else slice(None)
        columns = slice(0, spec.block) if axis.whole else slice(None)
        analyses.append(axis.analysis[blocks, functions, columns].reshape(-1, axis.analysis[0, 0, columns].size))
        syntheses.append(axis.synthesis[blocks, functions, columns].reshape(analyses[-1].shape).T)
        position = position * len(axis.kept) * len(functions)
        position += index[:, n, 0] * len(functions) + np.searchsorted(functions, index[:, n, 1])
    return analyses, syntheses, position


def _scatter(x: jax.Array, position: np.ndarray, total: int) -> jax.Array:
    """``[..., total, channels]`` with the rows of x at ``position`` and zeros elsewhere."""
    if np.array_equal(position, np.arange(total)):
        return x
    source = np.full(total, len(position))
    source[position] = np.arange(len(position))
    zero = jnp.zeros_like(x, shape=(*x.shape[:-2], 1, x.shape[-1]))
    return jnp.take(jnp.concatenate([x, zero], axis=-2), source, axis=-2)


def _project_by_axis(x: jax.Array, spec: LowRankSpec, grid: Grid, precision: Any) -> jax.Array:
    analyses, _, position = _factors(spec, grid)
    batch, channels = x.shape[:-2], x.shape[-1]
    done, rest = 1, math.prod(grid)
    for length, matrix in zip(grid, analyses, strict=True):
        rest //= length
        blocks = length // matrix.shape[1]
        x = _apply(matrix, x.reshape(*batch, done * blocks, matrix.shape[1], rest * channels), precision)
        done *= blocks * len(matrix)
    x = x.reshape(*batch, done, channels)
    return x if np.array_equal(position, np.arange(done)) else jnp.take(x, position, axis=-2)


def _expand_by_axis(coefficients: jax.Array, spec: LowRankSpec, grid: Grid, precision: Any) -> jax.Array:
    _, syntheses, position = _factors(spec, grid)
    batch, channels = coefficients.shape[:-2], coefficients.shape[-1]
    repeats = [length // len(matrix) for length, matrix in zip(grid, syntheses, strict=True)]
    total = math.prod(n * matrix.shape[1] for n, matrix in zip(repeats, syntheses, strict=True))
    x = _scatter(coefficients, position, total)
    before, after = total, channels
    for matrix, n in reversed(list(zip(syntheses, repeats, strict=True))):
        before //= n * matrix.shape[1]
        x = _apply(matrix, x.reshape(*batch, before * n, matrix.shape[1], after), precision)
        after *= n * len(matrix)
    return x.reshape(*batch, math.prod(grid), channels)


def _project_by_block(x: jax.Array, spec: LowRankSpec, grid: Grid, precision: Any) -> jax.Array:
    matrices, kept = block_matrices(spec, grid, "analysis")
    batch, channels = x.shape[:-2], x.shape[-1]
    pieces = split_pieces(x.reshape(*batch, *grid, channels), spec, grid)
    x = _apply(matrices, pieces, precision).reshape(*batch, -1, channels)
    return x if len(kept) == x.shape[-2] else jnp.take(x, kept, axis=-2)


def _expand_by_block(coefficients: jax.Array, spec: LowRankSpec, grid: Grid, precision: Any) -> jax.Array:
    matrices, kept = block_matrices(spec, grid, "synthesis")
    batch, channels = coefficients.shape[:-2], coefficients.shape[-1]
    blocks = math.prod(len(grid_axis(n, spec.block, spec.projection).kept) for n in grid)
    x = _scatter(coefficients, kept, blocks * spec.rank).reshape(*batch, blocks, spec.rank, channels)
    return join_pieces(_apply(matrices, x, precision), spec, grid).reshape(*batch, math.prod(grid), channels)


def goes_by_axis(spec: LowRankSpec, grid: Grid) -> bool:
    """Whether ``project`` goes axis by axis: large grids whose functions allow no pieces."""
    return max(aligned_pieces(spec, grid)) == 1 and math.prod(grid) > _MATRIX_TOKENS


def _keeping_sharding(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``function(x)``; on a mesh with explicit axes the result is sharded as x is, but for the token axis, which is whole."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return function(x)
    spec = PartitionSpec(*sharding.spec[:-2], None, sharding.spec[-1])
    return jax.sharding.auto_axes(out_sharding=spec)(function)(x)


def project(x: jax.Array, spec: LowRankSpec, grid: Grid, prefix_tokens: int = 0, precision: Any = None) -> jax.Array:
    """Walsh coefficients of a token grid; prefix tokens pass through unchanged, in front.

    Args:
      x: ``[..., prefix_tokens + tokens, channels]``, floating point.
      spec: the functions and the kind of projection.
      grid: tokens along each axis, their product being ``tokens``.
      prefix_tokens: leading tokens outside the grid.
      precision: of the products, as for ``jax.lax.dot_general``.

    Returns:
      ``[..., prefix_tokens + coefficients, channels]``, of x's dtype, accumulated in at least float32.
    """

    def coefficients(x: jax.Array) -> jax.Array:
        by_axis = goes_by_axis(spec, grid)
        if not by_axis and max(aligned_pieces(spec, grid)) == 1:
            return _apply(projection_matrices(spec, grid, prefix_tokens)[0], x, precision)
        form = _project_by_axis if by_axis else _project_by_block
        of_grid = form(x[..., prefix_tokens:, :], spec, grid, precision)
        return jnp.concatenate([x[..., :prefix_tokens, :], of_grid], axis=-2) if prefix_tokens else of_grid

    return _keeping_sharding(coefficients, x)


def expand(coefficients: jax.Array, spec: LowRankSpec, grid: Grid, prefix_tokens: int = 0, precision: Any = None) -> jax.Array:
    """Token grid of Walsh coefficients, the counterpart of ``project``.

    Args:
      coefficients: ``[..., prefix_tokens + coefficients, channels]``, floating point.
      spec: the functions and the kind of projection.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      precision: of the products, as for ``jax.lax.dot_general``.

    Returns:
      ``[..., prefix_tokens + tokens, channels]``, of the coefficients' dtype, accumulated in at least float32.
    """

    def tokens(coefficients: jax.Array) -> jax.Array:
        by_block = max(piece_sizes(spec, grid)) > 1 and max(grid) > spec.block
        if not by_block and math.prod(grid) <= _MATRIX_TOKENS:
            return _apply(projection_matrices(spec, grid, prefix_tokens)[1], coefficients, precision)
        form = _expand_by_block if by_block else _expand_by_axis
        of_grid = form(coefficients[..., prefix_tokens:, :], spec, grid, precision)
        return jnp.concatenate([coefficients[..., :prefix_tokens, :], of_grid], axis=-2) if prefix_tokens else of_grid

    return _keeping_sharding(tokens, coefficients)
