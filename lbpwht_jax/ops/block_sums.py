"""Sums over sub-blocks on which all of a spec's functions are constant, so that transforms work on few numbers.

The Walsh functions with indices below ``2 ** n`` are constant on runs of ``block / 2 ** n`` tokens. LP_{L1-2} thus needs only
the sums of the four quarters of a block of 8x8, and LP_{L1-4} those of its sixteen sub-blocks of 2x2: sums that read the
tokens once, at the speed of memory, where a matrix product would pack and multiply all of them.
"""

import functools
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.ops.basis import grid_axes
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

Side = Literal["analysis", "synthesis", "means"]

# Up to this many tokens one matrix for the grid is faster than one product per axis (measured on CPU, float32).
MATRIX_TOKENS = 256


@functools.cache
def subblock_sizes(spec: SpecFields, grid: Grid, side: Side) -> tuple[int, ...]:
    """Tokens of a sub-block along each grid axis.

    For the analysis, sub-blocks also divide the missing tokens at both ends, so that none is partial; but on a large grid where
    that would leave single tokens (37x37), some are partial, and their missing tokens count as zeros. Official partial blocks
    allow sub-blocks of one token only: their reflected tokens would belong to several. Means are taken over the sub-blocks of
    the synthesis, partial ones too.
    """
    axes = grid_axes(spec, grid)
    if spec.projection == "official" and not all(axis.whole for axis in axes):
        return (1,) * len(grid)
    functions = [1 + max(basis[n] for basis in spec.bases) for n in range(len(grid))]
    sizes = [spec.block // (1 << (count - 1).bit_length()) for count in functions]
    if side == "analysis":
        whole = [math.gcd(size, axis.before, axis.after) for size, axis in zip(sizes, axes, strict=True)]
        large = math.prod(grid) > MATRIX_TOKENS
        sizes = [size if large and divisor == 1 else divisor for size, divisor in zip(sizes, whole, strict=True)]
    return tuple(sizes)


@functools.cache
def block_matrices(spec: SpecFields, grid: Grid, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """One matrix per block, or a single one where all are alike, and which coefficients exist.

    Args:
      spec: the functions.
      grid: tokens along each axis.
      side: ``"analysis"`` for matrices that take the sums of sub-blocks to coefficients, ``"means"`` for those that take means
        to them, ``"synthesis"`` for those that take coefficients to the values of sub-blocks.

    Returns:
      float64 ``[blocks or 1, functions, sub-blocks]`` or ``[blocks or 1, sub-blocks, functions]``, and the indices among
      ``blocks * functions`` of the coefficients that do not vanish.
    """
    axes = grid_axes(spec, grid)
    factors = []
    for axis, size in zip(axes, subblock_sizes(spec, grid, side), strict=True):
        values = axis.synthesis if side == "synthesis" else axis.analysis
        blocks, functions, length = values.shape
        padded = np.zeros((blocks, functions, blocks, spec.block))
        padded.reshape(blocks, functions, -1)[..., axis.before : axis.before + length] = values
        own = padded[np.arange(blocks), :, np.arange(blocks)].reshape(blocks, functions, -1, size)
        factors.append(own.sum(-1) if side == "means" else own.sum(-1) / np.maximum(np.count_nonzero(own, axis=-1), 1))
    matrices, kept = [], []
    for block in itertools.product(*(range(axis.blocks) for axis in axes)):
        rows = [
            functools.reduce(np.kron, [f[b, k] for f, b, k in zip(factors, block, basis, strict=True)]) for basis in spec.bases
        ]
        matrices.append(np.stack(rows, axis=1) if side == "synthesis" else np.stack(rows))
        kept += [all(axis.kept[b, k] for axis, b, k in zip(axes, block, basis, strict=True)) for basis in spec.bases]
    alike = all(np.array_equal(matrix, matrices[0]) for matrix in matrices)
    return np.stack(matrices[:1] if alike else matrices), np.flatnonzero(kept)


def sum_subblocks(x: jax.Array, spec: SpecFields, grid: Grid, stored: bool = False) -> jax.Array:
    """Sums over the sub-blocks of the analysis, block by block.

    Args:
      x: ``[..., *grid, channels]``, floating point.
      spec: the functions.
      grid: tokens along each axis.
      stored: sums by a reduction, with which XLA's CPU backend does not merge what makes x: it would compute x once more, and
        store that part of it which it takes to be dear.

    Returns:
      ``[..., blocks, sub-blocks, channels]`` of x's dtype, summed in at least float32; zero at sub-blocks outside the grid.
    """
    batch, channels = x.shape[: x.ndim - 1 - len(grid)], x.shape[-1]
    sizes = subblock_sizes(spec, grid, "analysis")
    runs, missing, padding, blocks = [], [(0, 0)] * len(batch), [(0, 0)] * len(batch), []
    for length, size, axis in zip(grid, sizes, grid_axes(spec, grid), strict=True):
        missing.append((axis.before % size, axis.after % size))
        runs += [(length + sum(missing[-1])) // size, size]
        padding.append((axis.before // size, axis.after // size))
        blocks += [axis.blocks, spec.block // size]

    if any(map(any, missing)):
        x = jnp.pad(x, [*missing, (0, 0)])
    x = x.reshape(*batch, *runs, channels)
    counts = list(sizes)
    if stored and sizes[0] > 1 and x.dtype == accumulation_dtype(x.dtype):
        x = x.reshape(*batch, *runs[:2], math.prod(runs[2:]) * channels).sum(len(batch) + 1)
        counts[0] = 1
    x = x.reshape(*batch, runs[0], counts[0], *runs[2:], channels)
    offsets = itertools.product(*map(range, counts))
    parts = [x[(..., *(i for n in offset for i in (slice(None), n)), slice(None))] for offset in offsets]
    sums = functools.reduce(jnp.add, [part.astype(accumulation_dtype(x.dtype)) for part in parts]).astype(x.dtype)
    if any(map(any, padding)):
        sums = jnp.pad(sums, [*padding, (0, 0)])
    return block_by_block(sums, blocks)


def block_by_block(x: jax.Array, blocks: list[int]) -> jax.Array:
    """``[..., *sub-blocks of the grid, channels]`` as ``[..., blocks, sub-blocks, channels]``.

    ``blocks``: blocks, and sub-blocks of a block, for each axis in turn.
    """
    first = x.ndim - 1 - len(blocks) // 2
    batch, channels = x.shape[:first], x.shape[-1]
    x = x.reshape(*batch, *blocks, channels)
    block_axes, subblock_axes = range(first, x.ndim - 1, 2), range(first + 1, x.ndim - 1, 2)
    x = x.transpose(*range(first), *block_axes, *subblock_axes, x.ndim - 1)
    return x.reshape(*batch, math.prod(blocks[::2]), math.prod(blocks[1::2]), channels)


def spread_over_subblocks(values: jax.Array, spec: SpecFields, grid: Grid) -> jax.Array:
    """The grid on which every token has the value of its sub-block.

    Args:
      values: ``[..., blocks, sub-blocks, channels]``, for the sub-blocks of the synthesis.
      spec: the functions.
      grid: tokens along each axis.

    Returns:
      ``[..., *grid, channels]``, of the dtype of ``values``.
    """
    batch, channels = values.shape[:-3], values.shape[-1]
    blocks, inside, runs, repeats, crop = [], [], [], [], []
    for length, size, axis in zip(grid, subblock_sizes(spec, grid, "synthesis"), grid_axes(spec, grid), strict=True):
        blocks.append(axis.blocks)
        inside.append(spec.block // size)
        runs += [axis.blocks * spec.block // size, 1]
        repeats += [axis.blocks * spec.block // size, size]
        crop.append(slice(axis.before, axis.before + length))

    x = values.reshape(*batch, *blocks, *inside, channels)
    first, ndim = len(batch), len(grid)
    pairs = [axis for n in range(ndim) for axis in (first + n, first + ndim + n)]
    x = x.transpose(*range(first), *pairs, x.ndim - 1)
    x = jnp.broadcast_to(x.reshape(*batch, *runs, channels), (*batch, *repeats, channels))
    x = x.reshape(*batch, *(n * size for n, size in zip(repeats[::2], repeats[1::2], strict=True)), channels)
    return x[(..., *crop, slice(None))]
