"""Walsh functions on the axes of a token grid, and the matrices they make, in numpy, once a shape."""

import dataclasses
import functools
import itertools
import math

import numpy as np

from lbpwht_jax.ops.spec import Grid, LowRankSpec
from lbpwht_jax.ops.walsh import walsh_matrix


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """The Walsh functions of every block on one grid axis.

    Attributes:
      analysis: ``[blocks, functions, tokens]``; each block's functions, zero on the tokens of the others.
      synthesis: of the same shape.
      kept: ``[blocks, functions]``, false at functions that vanish.
      before: missing tokens before the first one.
      after: missing tokens behind the last one.
    """

    analysis: np.ndarray
    synthesis: np.ndarray
    kept: np.ndarray
    before: int
    after: int

    @property
    def whole(self) -> bool:
        """Whether blocks fill the axis."""
        return self.before == self.after == 0


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
def grid_axis(length: int, block: int, projection: str) -> Axis:
    """The functions on an axis of ``length`` tokens, blocks laid centred."""
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
    return Axis(analysis, synthesis, np.any(analysis, axis=-1), before, padding - before)


@functools.cache
def coefficient_indices(spec: LowRankSpec, grid: Grid) -> np.ndarray:
    """``[coefficients, axes, 2]``: the block and the function of each coefficient along each grid axis."""
    axes = [grid_axis(length, spec.block, spec.projection) for length in grid]
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
    return len(coefficient_indices(spec, grid))


@functools.cache
def token_sum_weights(spec: LowRankSpec, grid: Grid, prefix_tokens: int = 0) -> np.ndarray | None:
    """What coefficients and prefix tokens are multiplied by to give the sum over all tokens, which constants being kept allow.

    A projector that keeps constants is symmetric, so ``1^T x = 1^T (E A) x``, where ``1^T E`` is zero but for the means.

    Returns:
      float64 array ``[prefix_tokens + coefficients]``; ``None`` where constants are not kept or the projection, official on
      partial blocks, is no projector.
    """
    exact = spec.projection == "fitted" or all(grid_axis(n, spec.block, spec.projection).whole for n in grid)
    if not exact or (0,) * spec.ndim not in spec.bases:
        return None
    means = coefficient_indices(spec, grid)
    weights = [
        math.prod(
            grid_axis(n, spec.block, spec.projection).synthesis[b, k].sum() for n, (b, k) in zip(grid, index, strict=True)
        )
        for index in means
    ]
    return np.concatenate([np.ones(prefix_tokens), np.where(np.any(means[..., 1], axis=-1), 0.0, weights)])


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
    index = coefficient_indices(spec, grid)
    axes = [grid_axis(length, spec.block, spec.projection) for length in grid]
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
