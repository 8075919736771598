"""Pieces of blocks on which all of a spec's functions are constant, so that transforms work on their sums.

The Walsh functions with indices below ``2 ** n`` are constant on runs of ``block / 2 ** n`` tokens. LP_{L1-2} thus needs only
the sums of the four quarters of a block of 8x8, and LP_{L1-4} those of its sixteen 2x2 pieces: sums that read the tokens once,
at the speed of memory, where a matrix product would pack and multiply all of them.
"""

import functools
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.ops.basis import Axis, grid_axis
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.spec import Grid, LowRankSpec


def _axes(spec: LowRankSpec, grid: Grid) -> list[Axis]:
    return [grid_axis(length, spec.block, spec.projection) for length in grid]


@functools.cache
def piece_sizes(spec: LowRankSpec, grid: Grid) -> tuple[int, ...]:
    """Tokens of a piece along each grid axis; 1 on official partial blocks, whose reflected tokens belong to several pieces."""
    if spec.projection == "official" and not all(axis.whole for axis in _axes(spec, grid)):
        return (1,) * len(grid)
    functions = [1 + max(basis[n] for basis in spec.bases) for n in range(len(grid))]
    return tuple(spec.block // (1 << (count - 1).bit_length()) for count in functions)


@functools.cache
def aligned_pieces(spec: LowRankSpec, grid: Grid) -> tuple[int, ...]:
    """As ``piece_sizes``, cut down to what divides the missing tokens at both ends, so that no piece is partial."""
    sizes = zip(piece_sizes(spec, grid), _axes(spec, grid), strict=True)
    return tuple(math.gcd(size, axis.before, axis.after) for size, axis in sizes)


@functools.cache
def block_matrices(spec: LowRankSpec, grid: Grid, side: Literal["analysis", "synthesis"]) -> tuple[np.ndarray, np.ndarray]:
    """One matrix a block, or one for all where they are alike, and the coefficients that exist.

    Args:
      spec: the functions.
      grid: tokens along each axis.
      side: ``"analysis"`` takes the pieces of ``aligned_pieces`` to coefficients, ``"synthesis"`` coefficients to the pieces
        of ``piece_sizes``.

    Returns:
      ``[blocks or 1, functions, pieces]`` or ``[blocks or 1, pieces, functions]``, and the indices of the coefficients that do
      not vanish among ``blocks * functions``.
    """
    sizes = aligned_pieces(spec, grid) if side == "analysis" else piece_sizes(spec, grid)
    axes = _axes(spec, grid)
    factors = []
    for axis, size in zip(axes, sizes, strict=True):
        blocks, functions, length = getattr(axis, side).shape
        padded = np.zeros((blocks, functions, blocks, spec.block))
        padded.reshape(blocks, functions, -1)[..., axis.before : axis.before + length] = getattr(axis, side)
        own = padded[np.arange(blocks), :, np.arange(blocks)].reshape(blocks, functions, -1, size)
        factors.append(own.sum(-1) / np.maximum(np.count_nonzero(own, axis=-1), 1))
    matrices, kept = [], []
    for block in itertools.product(*(range(len(axis.kept)) for axis in axes)):
        rows = [
            functools.reduce(np.kron, [f[b, k] for f, b, k in zip(factors, block, basis, strict=True)]) for basis in spec.bases
        ]
        matrices.append(np.stack(rows) if side == "analysis" else np.stack(rows, axis=1))
        kept += [all(axis.kept[b, k] for axis, b, k in zip(axes, block, basis, strict=True)) for basis in spec.bases]
    alike = all(np.array_equal(matrix, matrices[0]) for matrix in matrices)
    return np.stack(matrices[:1] if alike else matrices), np.flatnonzero(kept)


def split_pieces(x: jax.Array, spec: LowRankSpec, grid: Grid) -> jax.Array:
    """Sums over the aligned pieces, block by block.

    Args:
      x: ``[..., *grid, channels]``.
      spec: the functions.
      grid: tokens along each axis.

    Returns:
      ``[..., blocks, pieces, channels]``, of x's dtype, summed in at least float32; pieces that are missing are zero.
    """
    sizes, axes = aligned_pieces(spec, grid), _axes(spec, grid)
    batch, channels, ndim = x.shape[: x.ndim - 1 - len(grid)], x.shape[-1], len(grid)
    lead = (slice(None),) * len(batch)
    x = x.reshape(*batch, *(n for length, size in zip(grid, sizes, strict=True) for n in (length // size, size)), channels)
    offsets = itertools.product(*map(range, sizes))
    parts = [x[(*lead, *(i for offset in chosen for i in (slice(None), offset)))] for chosen in offsets]
    total = functools.reduce(jnp.add, [part.astype(accumulation_dtype(x.dtype)) for part in parts]).astype(x.dtype)
    missing = [(axis.before // size, axis.after // size) for axis, size in zip(axes, sizes, strict=True)]
    if any(map(any, missing)):
        total = jnp.pad(total, [(0, 0)] * len(batch) + missing + [(0, 0)])
    pieces = [spec.block // size for size in sizes]
    counts = [len(axis.kept) for axis in axes]
    total = total.reshape(*batch, *(n for pair in zip(counts, pieces, strict=True) for n in pair), channels)
    order = [len(batch) + 2 * n + k for k in (0, 1) for n in range(ndim)]
    total = total.transpose(*range(len(batch)), *order, total.ndim - 1)
    return total.reshape(*batch, math.prod(counts), math.prod(pieces), channels)


def join_pieces(x: jax.Array, spec: LowRankSpec, grid: Grid) -> jax.Array:
    """The grid on which every token has the value of its piece.

    Args:
      x: ``[..., blocks, pieces, channels]``, pieces as of ``piece_sizes``.
      spec: the functions.
      grid: tokens along each axis.

    Returns:
      ``[..., *grid, channels]``.
    """
    sizes, axes = piece_sizes(spec, grid), _axes(spec, grid)
    batch, channels, ndim = x.shape[:-3], x.shape[-1], len(grid)
    pieces = [spec.block // size for size in sizes]
    counts = [len(axis.kept) for axis in axes]
    x = x.reshape(*batch, *counts, *pieces, channels)
    order = [len(batch) + n + k * ndim for n in range(ndim) for k in (0, 1)]
    x = x.transpose(*range(len(batch)), *order, x.ndim - 1)
    totals = [count * piece for count, piece in zip(counts, pieces, strict=True)]
    x = x.reshape(*batch, *(n for total in totals for n in (total, 1)), channels)
    x = jnp.broadcast_to(x, (*batch, *(n for pair in zip(totals, sizes, strict=True) for n in pair), channels))
    x = x.reshape(*batch, *(total * size for total, size in zip(totals, sizes, strict=True)), channels)
    crop = [slice(axis.before, axis.before + length) for axis, length in zip(axes, grid, strict=True)]
    return x[(*(slice(None),) * len(batch), *crop)]
