"""Walsh functions on the axes of a token grid, and the matrices they make: NumPy, computed once per shape."""

import dataclasses
import functools
import itertools
import math

import numpy as np

from lbpwht_jax.ops.spec_fields import Grid, SpecFields
from lbpwht_jax.ops.walsh import walsh_matrix


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """The Walsh functions of every block on one grid axis.

    Attributes:
      analysis: float64 ``[blocks, functions, tokens]``; each block's functions, zero on the tokens of other blocks.
      synthesis: the same shape and dtype; what a coefficient adds to the tokens.
      kept: boolean ``[blocks, functions]``, false where a function vanishes.
      before: tokens missing from the first block.
      after: tokens missing from the last block.
    """

    analysis: np.ndarray
    synthesis: np.ndarray
    kept: np.ndarray
    before: int
    after: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.kept)

    @property
    def whole(self) -> bool:
        """Whether every block is full."""
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
    """The functions on an axis of ``length`` tokens, over which blocks are laid centred."""
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


def grid_axes(spec: SpecFields, grid: Grid) -> list[Axis]:
    """The functions on every axis of a grid."""
    return [grid_axis(length, spec.block, spec.projection) for length in grid]


@functools.cache
def coefficient_indices(spec: SpecFields, grid: Grid) -> np.ndarray:
    """The block and the function of each coefficient along each grid axis: int64 ``[coefficients, axes, 2]``."""
    axes = grid_axes(spec, grid)
    return np.array(
        [
            tuple(zip(block, basis, strict=True))
            for block in itertools.product(*(range(axis.blocks) for axis in axes))
            for basis in spec.bases
            if all(axis.kept[b, k] for axis, b, k in zip(axes, block, basis, strict=True))
        ],
        dtype=np.int64,
    ).reshape(-1, len(grid), 2)


def coefficient_count(spec: SpecFields, grid: Grid) -> int:
    """Number of coefficients of a whole grid, prefix tokens not counted; if fitted, at most the number of tokens."""
    return len(coefficient_indices(spec, grid))


def holds_token_sum(spec: SpecFields, grid: Grid) -> bool:
    """Whether the sum over all tokens follows from the coefficients: constants are kept, by a true projector.

    The official projection is a projector on whole blocks only.
    """
    is_projector = spec.projection == "fitted" or all(axis.whole for axis in grid_axes(spec, grid))
    return is_projector and (0,) * spec.ndim in spec.bases


@functools.cache
def token_sum_weights(spec: SpecFields, grid: Grid, prefix_tokens: int = 0) -> np.ndarray:
    """The weights with which prefix tokens and coefficients sum to the sum over all tokens, where ``holds_token_sum``.

    The sum is ``1^T x``. A projector ``E A`` that keeps constants is symmetric, so ``1^T x = 1^T E (A x)``: the weights are
    ``1^T E``, zero for every function but the blocks' means.

    Returns:
      float64 array ``[prefix_tokens + coefficients]``.
    """
    axes, index = grid_axes(spec, grid), coefficient_indices(spec, grid)
    sums = [math.prod(axis.synthesis[b, k].sum() for axis, (b, k) in zip(axes, each, strict=True)) for each in index]
    is_mean = np.all(index[..., 1] == 0, axis=-1)
    return np.concatenate([np.ones(prefix_tokens), np.where(is_mean, sums, 0.0)])


@functools.cache
def projection_matrices(spec: SpecFields, grid: Grid, prefix_tokens: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The matrices that ``project`` and ``expand`` apply, tokens flattened in row-major order.

    Args:
      spec: the functions and the kind of projection.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid, passed through unchanged.

    Returns:
      ``(analysis, synthesis)``: float64 arrays ``[prefix_tokens + coefficients, prefix_tokens + tokens]`` and
      ``[prefix_tokens + tokens, prefix_tokens + coefficients]``.
    """
    index = coefficient_indices(spec, grid)
    axes = grid_axes(spec, grid)
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
