"""From a grid of tokens to Walsh coefficients and back, with every static choice made in NumPy, once per shape.

``project`` applies ``A`` (coefficients x tokens) and ``expand`` applies ``E`` (tokens x coefficients) along the token axis.
Both are Kronecker products of one small matrix per grid axis, restricted to the selected functions of every block. They are
scaled so that the low-rank products need no further factor: ``dW = (A x)^T (A g)`` and ``dx = E ((A g) W^T)``.

Blocks are laid centred over the grid in both projections; an odd missing token is missing at the top or left. On whole blocks
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

from lbpwht_jax.ops.basis import coefficient_count, coefficient_indices, grid_axes, projection_matrices
from lbpwht_jax.ops.block_sums import Side, block_matrices, spread_over_subblocks, sum_subblocks
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.forms import transform_form
from lbpwht_jax.ops.kernels import kernel_forms
from lbpwht_jax.ops.platforms import by_platform
from lbpwht_jax.ops.sharding import explicit_sharding, with_whole_tokens
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

__all__ = ["coefficient_count", "expand", "project", "projection_matrices"]


def apply_matrix(matrix: np.ndarray, x: jax.Array, precision: Any) -> jax.Array:
    """``matrix @ x`` over the last two axes, accumulated in at least float32, as one batched product.

    XLA's CPU backend transposes and copies for ``einsum("rl,blc->brc")``. With the matrix repeated along the batch it calls
    a plain matrix product per image, which is 3 to 6 times faster there.
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
def _axis_matrices(spec: SpecFields, grid: Grid, side: Side) -> list[np.ndarray]:
    """One matrix per axis, for one block where all blocks of the axis are whole and for the whole axis elsewhere.

    Returns:
      float64 ``[functions, tokens]`` for the analysis and ``[tokens, functions]`` for the synthesis.
    """
    matrices = []
    for n, axis in enumerate(grid_axes(spec, grid)):
        blocks, tokens = (slice(0, 1), slice(0, spec.block)) if axis.whole else (slice(None), slice(None))
        rows = getattr(axis, side)[blocks, _axis_functions(spec, n), tokens]
        matrix = rows.reshape(-1, rows.shape[-1])
        matrices.append(matrix if side == "analysis" else matrix.T)
    return matrices


def _axis_functions(spec: SpecFields, n: int) -> list[int]:
    """The functions needed along grid axis ``n``."""
    return sorted({basis[n] for basis in spec.bases})


@functools.cache
def _axis_positions(spec: SpecFields, grid: Grid) -> np.ndarray:
    """Where the kept coefficients are in the row-major product of the axes' functions: int64 ``[coefficients]``."""
    index = coefficient_indices(spec, grid)
    position = np.zeros(len(index), np.int64)
    for n, axis in enumerate(grid_axes(spec, grid)):
        functions = _axis_functions(spec, n)
        position = position * axis.blocks * len(functions)
        position += index[:, n, 0] * len(functions) + np.searchsorted(functions, index[:, n, 1])
    return position


def _gather(x: jax.Array, position: np.ndarray) -> jax.Array:
    """The rows of ``[..., rows, channels]`` at ``position``."""
    return x if np.array_equal(position, np.arange(x.shape[-2])) else jnp.take(x, position, axis=-2)


def _scatter(x: jax.Array, position: np.ndarray, total: int) -> jax.Array:
    """``[..., total, channels]`` with the rows of x at ``position`` and zeros elsewhere."""
    if np.array_equal(position, np.arange(total)):
        return x
    source = np.full(total, len(position))
    source[position] = np.arange(len(position))
    zero = jnp.zeros_like(x, shape=(*x.shape[:-2], 1, x.shape[-1]))
    return jnp.take(jnp.concatenate([x, zero], axis=-2), source, axis=-2)


def _project_by_axis(x: jax.Array, spec: SpecFields, grid: Grid, precision: Any) -> jax.Array:
    batch, channels = x.shape[:-2], x.shape[-1]
    done, rest = 1, math.prod(grid)
    for length, matrix in zip(grid, _axis_matrices(spec, grid, "analysis"), strict=True):
        functions, tokens = matrix.shape
        rest //= length
        blocks = length // tokens
        x = apply_matrix(matrix, x.reshape(*batch, done * blocks, tokens, rest * channels), precision)
        done *= blocks * functions
    return _gather(x.reshape(*batch, done, channels), _axis_positions(spec, grid))


def _expand_by_axis(coefficients: jax.Array, spec: SpecFields, grid: Grid, precision: Any) -> jax.Array:
    batch, channels = coefficients.shape[:-2], coefficients.shape[-1]
    matrices = _axis_matrices(spec, grid, "synthesis")
    rest = math.prod(length // len(matrix) * matrix.shape[1] for length, matrix in zip(grid, matrices, strict=True))
    x = _scatter(coefficients, _axis_positions(spec, grid), rest)
    done = 1
    for length, matrix in reversed(list(zip(grid, matrices, strict=True))):
        tokens, functions = matrix.shape
        blocks = length // tokens
        rest //= blocks * functions
        x = apply_matrix(matrix, x.reshape(*batch, rest * blocks, functions, done * channels), precision)
        done *= length
    return x.reshape(*batch, math.prod(grid), channels)


def _project_by_block(x: jax.Array, spec: SpecFields, grid: Grid, precision: Any, stored: bool) -> jax.Array:
    sums = sum_subblocks(x.reshape(*x.shape[:-2], *grid, x.shape[-1]), spec, grid, stored)
    return of_subblocks(sums, spec, grid, precision, "analysis")


def of_subblocks(x: jax.Array, spec: SpecFields, grid: Grid, precision: Any, side: Side) -> jax.Array:
    """Coefficients from ``[..., blocks, sub-blocks, channels]``, as ``block_matrices`` of this side takes them."""
    matrices, kept = block_matrices(spec, grid, side)
    coefficients = apply_matrix(matrices, x, precision)
    return _gather(coefficients.reshape(*x.shape[:-3], math.prod(coefficients.shape[-3:-1]), x.shape[-1]), kept)


def _expand_by_block(coefficients: jax.Array, spec: SpecFields, grid: Grid, precision: Any) -> jax.Array:
    values = spread_over_subblocks(at_subblocks(coefficients, spec, grid, precision), spec, grid)
    return values.reshape(*coefficients.shape[:-2], math.prod(grid), coefficients.shape[-1])


def at_subblocks(coefficients: jax.Array, spec: SpecFields, grid: Grid, precision: Any) -> jax.Array:
    """The values of sub-blocks, ``[..., blocks, sub-blocks, channels]``."""
    matrices, kept = block_matrices(spec, grid, "synthesis")
    batch, blocks = coefficients.shape[:-2], math.prod(axis.blocks for axis in grid_axes(spec, grid))
    x = _scatter(coefficients, kept, blocks * spec.rank).reshape(*batch, blocks, spec.rank, coefficients.shape[-1])
    return apply_matrix(matrices, x, precision)


def _transform(
    x: jax.Array, spec: SpecFields, grid: Grid, prefix_tokens: int, precision: Any, side: Side, stored: bool = False
) -> jax.Array:
    kernels = kernel_forms("project" if side == "analysis" else "expand", x, spec, grid, prefix_tokens)
    plain = functools.partial(
        _plain_transform, spec=spec, grid=grid, prefix_tokens=prefix_tokens, precision=precision, side=side, stored=stored
    )
    return by_platform(plain, x, **kernels) if kernels else plain(x)


def _plain_transform(
    x: jax.Array, *, spec: SpecFields, grid: Grid, prefix_tokens: int, precision: Any, side: Side, stored: bool
) -> jax.Array:
    form = transform_form(spec, grid, side)
    if form == "matrix":
        analysis, synthesis = projection_matrices(spec, grid, prefix_tokens)
        return apply_matrix(analysis if side == "analysis" else synthesis, x, precision)
    forms = {
        ("analysis", "by_axis"): _project_by_axis,
        ("analysis", "by_block"): functools.partial(_project_by_block, stored=stored),
        ("synthesis", "by_axis"): _expand_by_axis,
        ("synthesis", "by_block"): _expand_by_block,
    }
    of_grid = forms[side, form](x[..., prefix_tokens:, :], spec, grid, precision)
    return behind_prefix(x[..., :prefix_tokens, :], of_grid)


def behind_prefix(prefix: jax.Array, rows: jax.Array) -> jax.Array:
    """Both along the token axis, the prefix tokens first, if there are any."""
    return jnp.concatenate([prefix, rows], axis=-2) if prefix.shape[-2] else rows


def _keeping_sharding(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``function(x)``; on a mesh with explicit axes, sharded as x is except for the token axis, which is whole."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return function(x)
    return jax.sharding.auto_axes(out_sharding=with_whole_tokens(sharding))(function)(x)


def project(
    x: jax.Array,
    spec: SpecFields,
    grid: Grid,
    prefix_tokens: int = 0,
    precision: Any = None,
    *,
    stored: bool = False,
) -> jax.Array:
    """Walsh coefficients of a token grid, ``A x``; prefix tokens come first and pass through unchanged.

    Args:
      x: ``[..., prefix_tokens + tokens, channels]``, floating point.
      spec: the functions and the kind of projection, a ``LowRankSpec``.
      grid: tokens along each axis, their product being ``tokens``.
      prefix_tokens: leading tokens outside the grid.
      precision: precision of the products, as for ``jax.lax.dot_general``.
      stored: whether x is an operand of a product as well, and so better read than computed once more here.

    Returns:
      ``[..., prefix_tokens + coefficients, channels]``, of x's dtype, accumulated in at least float32.
    """
    return _keeping_sharding(lambda x: _transform(x, spec, grid, prefix_tokens, precision, "analysis", stored), x)


def expand(coefficients: jax.Array, spec: SpecFields, grid: Grid, prefix_tokens: int = 0, precision: Any = None) -> jax.Array:
    """The token grid that Walsh coefficients make, ``E`` times them: the counterpart of ``project``.

    Args:
      coefficients: ``[..., prefix_tokens + coefficients, channels]``, floating point.
      spec: the functions and the kind of projection, a ``LowRankSpec``.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      precision: precision of the products, as for ``jax.lax.dot_general``.

    Returns:
      ``[..., prefix_tokens + tokens, channels]``, of the coefficients' dtype, accumulated in at least float32.
    """
    return _keeping_sharding(lambda x: _transform(x, spec, grid, prefix_tokens, precision, "synthesis"), coefficients)
