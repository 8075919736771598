"""A token grid as cells for kernels: the tokens of one block, its coefficients, and the small matrices between them."""

import dataclasses
import functools
import math

import numpy as np

from lbpwht_jax.ops.basis import coefficient_indices, grid_axes, projection_matrices
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

_LARGEST = 64
# Fills a cell's tokens and coefficients up: behind the end of every array, where a kernel neither reads nor writes.
MISSING = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a token grid; prefix tokens, where there are any, are in the first one, or a cell of their own before it.

    Attributes:
      tokens: int32 ``[cells, T]``, the tokens of each cell, filled up with ``MISSING``. ``T`` is a power of two.
      coefficients: int32 ``[cells, R]``, its coefficients, filled up with ``MISSING``. ``R`` is a power of two.
      analysis: float64 ``[cells, R, T]``, zero where filled up.
      synthesis: float64 ``[cells, T, R]``, zero where filled up.
    """

    tokens: np.ndarray
    coefficients: np.ndarray
    analysis: np.ndarray
    synthesis: np.ndarray


def _width(groups: list[np.ndarray]) -> int:
    """A power of two that holds each group, of at least 16: the least that tensor cores multiply."""
    return max(16, 1 << (max(map(len, groups)) - 1).bit_length())


def _filled(groups: list[np.ndarray]) -> np.ndarray:
    """The groups side by side, in rows of equal width."""
    width = _width(groups)
    return np.stack([np.pad(group, (0, width - len(group)), constant_values=MISSING) for group in groups]).astype(np.int32)


@functools.cache
def grid_cells(spec: SpecFields, grid: Grid, prefix_tokens: int = 0) -> Cells | None:
    """The cells of a grid with prefix tokens in front.

    Returns:
      ``None`` where a kernel would not fit: cells of more than 64 tokens or coefficients, or blocks whose coefficients need
      tokens of other blocks (official on some partial blocks).
    """
    axes = grid_axes(spec, grid)
    blocks = [axis.blocks for axis in axes]
    places = [(np.arange(length) + axis.before) // spec.block for length, axis in zip(grid, axes, strict=True)]
    of_token = np.ravel_multi_index(np.meshgrid(*places, indexing="ij"), blocks).reshape(-1)
    of_coefficient = np.ravel_multi_index(tuple(coefficient_indices(spec, grid)[:, :, 0].T), blocks)
    cells = range(math.prod(blocks))
    tokens, coefficients = (
        [prefix_tokens + np.flatnonzero(owner == cell) for cell in cells] for owner in (of_token, of_coefficient)
    )
    prefix = np.arange(prefix_tokens)
    shared = all(_width([*groups, np.concatenate([prefix, groups[0]])]) == _width(groups) for groups in (tokens, coefficients))
    for groups in (tokens, coefficients):
        if shared:
            groups[0] = np.concatenate([prefix, groups[0]])
        else:
            groups.insert(0, prefix)
    analysis, synthesis = projection_matrices(spec, grid, prefix_tokens)
    tokens, coefficients = _filled(tokens), _filled(coefficients)
    if max(tokens.shape[1], coefficients.shape[1]) > _LARGEST:
        return None
    # a row and a column of zeros at the end, for what is missing
    padded_analysis, padded_synthesis = (np.pad(matrix, ((0, 1), (0, 1))) for matrix in (analysis, synthesis))
    t, r = np.minimum(tokens, len(synthesis)), np.minimum(coefficients, len(analysis))
    own_analysis = padded_analysis[r[:, :, None], t[:, None, :]]
    own_synthesis = padded_synthesis[t[:, :, None], r[:, None, :]]
    for own, whole in ((own_analysis, analysis), (own_synthesis, synthesis)):
        if np.count_nonzero(own) != np.count_nonzero(whole):
            return None
    return Cells(tokens, coefficients, own_analysis, own_synthesis)
