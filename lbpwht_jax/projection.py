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

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from lbpwht_jax.spec import Grid, LowRankSpec
from lbpwht_jax.wht import walsh_matrix

# Up to this many tokens one matrix a grid is the faster form; above it one product an axis (measured on CPU, float32).
_MATRIX_TOKENS = 256


@dataclasses.dataclass(frozen=True, eq=False)
class _Axis:
    """One grid axis: ``analysis[b, k]`` and ``synthesis[b, k]`` are function k of block b on the axis's tokens."""

    analysis: np.ndarray
    synthesis: np.ndarray
    kept: np.ndarray
    whole: bool


def _orthonormalise(rows: np.ndarray) -> np.ndarray:
    """Gram-Schmidt over the rows in order; rows that depend on earlier ones become zero."""
    result = np.zeros_like(rows)
    for k, row in enumerate(rows):
        for _ in range(2):
            row = row - result[:k].T @ (result[:k] @ row)
        norm = np.linalg.norm(row)
        if norm > 1e-6 * math.sqrt(len(row)):
            result[k] = row / norm
    return result


@functools.cache
def _axis(length: int, block: int, projection: str) -> _Axis:
    walsh = walsh_matrix(block, np.float64)
    blocks = -(-length // block)
    padding = blocks * block - length
    before = -(-padding // 2)
    tokens = np.zeros((blocks * block, length))
    tokens[np.arange(length) + before, np.arange(length)] = 1.0
    tokens = tokens.reshape(blocks, block, length)
    if projection == "fitted":
        present = np.any(tokens, axis=-1)
        analysis = np.stack([_orthonormalise(walsh * present[b]) @ tokens[b] for b in range(blocks)])
        synthesis = analysis
    else:
        walsh = walsh / math.sqrt(block)
        source = np.pad(np.arange(length), (before, padding - before), mode="reflect")
        reflected = np.eye(length)[source].reshape(blocks, block, length)
        analysis, synthesis = walsh @ reflected, walsh @ tokens
    return _Axis(analysis, synthesis, np.any(analysis, axis=-1), padding == 0)


@functools.cache
def _coefficients(spec: LowRankSpec, grid: Grid) -> np.ndarray:
    """``[coefficients, axes, 2]``: the block and the function of each coefficient along each grid axis."""
    axes = [_axis(length, spec.block, spec.projection) for length in grid]
    return np.array(
        [
            tuple(zip(block, basis, strict=True))
            for block in itertools.product(*(range(len(axis.kept)) for axis in axes))
            for basis in spec.bases
            if all(axis.kept[b, k] for axis, b, k in zip(axes, block, basis, strict=True))
        ],
        dtype=np.int64,
    ).reshape(-1, len(grid), 2)


def coefficient_count(spec: LowRankSpec, grid: Grid) -> int:
    """Number of coefficients kept for a whole grid, prefix tokens not counted; at most the number of tokens if fitted."""
    return len(_coefficients(spec, grid))


@functools.cache
def projection_matrices(spec: LowRankSpec, grid: Grid, prefix_tokens: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The matrices behind ``project`` and ``expand``, tokens flattened in row-major order.

    Args:
      spec: the functions and the kind of projection.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid, passed through unchanged.

    Returns:
      ``(analysis, synthesis)``: float64 arrays ``[prefix_tokens + coefficients, prefix_tokens + tokens]`` and its transpose's
      shape.
    """
    index = _coefficients(spec, grid)
    axes = [_axis(length, spec.block, spec.projection) for length in grid]
    matrices = []
    for name in ("analysis", "synthesis"):
        rows = np.ones((len(index), 1))
        for n, axis in enumerate(axes):
            factor = getattr(axis, name)[index[:, n, 0], index[:, n, 1]]
            rows = (rows[:, :, None] * factor[:, None, :]).reshape(len(index), math.prod(grid[: n + 1]))
        matrix = np.zeros((prefix_tokens + rows.shape[0], prefix_tokens + rows.shape[1]))
        matrix[:prefix_tokens, :prefix_tokens] = np.eye(prefix_tokens)
        matrix[prefix_tokens:, prefix_tokens:] = rows
        matrices.append(matrix)
    return matrices[0], matrices[1].T


def accumulation_dtype(*dtypes: Any) -> Any:
    """What products of these floating-point dtypes accumulate in: float64 if one of them is that, else float32."""
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def _apply(matrix: np.ndarray, x: jax.Array, precision: Any) -> jax.Array:
    """``matrix @ x`` over the last two axes, accumulated in at least float32, as one batched product.

    XLA's CPU backend transposes and copies for ``einsum("rl,blc->brc")``. With the matrix repeated along the batch it calls
    a plain matrix product an image, which is 3 to 6 times faster there.
    """
    batch = x.shape[:-2]
    repeated = jnp.broadcast_to(jnp.asarray(matrix, x.dtype), (*batch, *matrix.shape))
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
    index = _coefficients(spec, grid)
    analyses, syntheses = [], []
    position = np.zeros(len(index), np.int64)
    for n, length in enumerate(grid):
        axis = _axis(length, spec.block, spec.projection)
        functions = sorted({basis[n] for basis in spec.bases})
        blocks = slice(0, 1) if axis.whole else slice(None)
        columns = slice(0, spec.block) if axis.whole else slice(None)
        analyses.append(axis.analysis[blocks, functions, columns].reshape(-1, axis.analysis[0, 0, columns].size))
        syntheses.append(axis.synthesis[blocks, functions, columns].reshape(analyses[-1].shape).T)
        position = position * len(axis.kept) * len(functions)
        position += index[:, n, 0] * len(functions) + np.searchsorted(functions, index[:, n, 1])
    return analyses, syntheses, position


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
    x = coefficients
    if not np.array_equal(position, np.arange(total)):
        source = np.full(total, len(position))
        source[position] = np.arange(len(position))
        x = jnp.take(jnp.concatenate([x, jnp.zeros_like(x, shape=(*batch, 1, channels))], axis=-2), source, axis=-2)
    before, after = total, channels
    for matrix, n in reversed(list(zip(syntheses, repeats, strict=True))):
        before //= n * matrix.shape[1]
        x = _apply(matrix, x.reshape(*batch, before * n, matrix.shape[1], after), precision)
        after *= n * len(matrix)
    return x.reshape(*batch, math.prod(grid), channels)


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
        if math.prod(grid) <= _MATRIX_TOKENS:
            return _apply(projection_matrices(spec, grid, prefix_tokens)[0], x, precision)
        of_grid = _project_by_axis(x[..., prefix_tokens:, :], spec, grid, precision)
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
        if math.prod(grid) <= _MATRIX_TOKENS:
            return _apply(projection_matrices(spec, grid, prefix_tokens)[1], coefficients, precision)
        of_grid = _expand_by_axis(coefficients[..., prefix_tokens:, :], spec, grid, precision)
        return jnp.concatenate([coefficients[..., :prefix_tokens, :], of_grid], axis=-2) if prefix_tokens else of_grid

    return _keeping_sharding(tokens, coefficients)
