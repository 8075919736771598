"""Means over sub-blocks: all that a low-rank cotangent takes of the slope that it goes through.

Between two layers of low-rank backpropagation the coefficients of a cotangent become ``A (s * (E c))``, with s the slope of
what lies between. All functions kept are constant on sub-blocks (``lbpwht_jax.ops.block_sums``): ``E c`` has one value on each,
and ``A`` weighs the tokens of each alike. So the product is ``A' (m * (E' c))``, with m the mean of s over each sub-block, and
``E'`` and ``A'`` as small as that: nothing is rounded, and of s no more is kept, LP_{L1-4} taking a quarter of it.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lbpwht_jax.ops.basis import grid_axes
from lbpwht_jax.ops.block_sums import MATRIX_TOKENS, block_by_block, block_matrices, subblock_sizes
from lbpwht_jax.ops.projection import apply_matrix, at_subblocks, behind_prefix, of_subblocks
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

# Tokens of a sub-block up to which a mean computes each where it adds it, rather than all of them beforehand.
_INLINE = 4

Elementwise = Callable[[jax.Array], Any]


def has_means(spec: SpecFields, grid: Grid) -> bool:
    """Whether there are sub-blocks of several tokens."""
    return max(subblock_sizes(spec, grid, "means")) > 1


def subblock_means(x: jax.Array, function: Elementwise, spec: SpecFields, grid: Grid, prefix_tokens: int = 0) -> Any:
    """``function`` of prefix tokens, and its means over the tokens that each sub-block has.

    Args:
      x: ``[..., prefix_tokens + tokens, channels]``, floating point.
      function: of each number by itself and its channel; returns an array, or a tree of them.
      spec: the functions kept and the kind of projection.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.

    Returns:
      What ``function`` returns, ``[..., prefix_tokens + sub-blocks, channels]``, of the sub-blocks that have tokens, along the
      grid's axes in turn.
    """
    batch, channels = x.shape[:-2], x.shape[-1]
    axes, sizes = grid_axes(spec, grid), subblock_sizes(spec, grid, "means")
    members = [_members(length, size, axis.before) for length, size, axis in zip(grid, sizes, axes, strict=True)]
    of_grid = x[..., prefix_tokens:, :].reshape(*batch, *grid, channels)
    inline = math.prod(sizes) <= _INLINE
    given = of_grid if inline else function(of_grid)

    def term(each: Sequence[tuple[np.ndarray, np.ndarray]]) -> Any:
        part = jax.tree.map(functools.partial(_taken, tokens=[tokens for tokens, _ in each]), given)
        weights = functools.reduce(np.multiply.outer, [weights for _, weights in each])[..., None]
        return jax.tree.map(functools.partial(_weighted, weights), function(part) if inline else part)

    terms = [term(each) for each in itertools.product(*(zip(*axis, strict=True) for axis in members))]

    def rows(prefix: jax.Array, *terms: jax.Array) -> jax.Array:
        means = functools.reduce(jnp.add, terms)
        return behind_prefix(prefix, means.reshape(*batch, math.prod(means.shape[len(batch) : -1]), channels))

    return jax.tree.map(rows, function(x[..., :prefix_tokens, :]), *terms)


def means_by_block(means: jax.Array, spec: SpecFields, grid: Grid, prefix_tokens: int = 0) -> jax.Array:
    """What ``subblock_means`` returns block by block, as all that follows takes it; zero where a sub-block has no tokens."""
    batch, channels = means.shape[:-2], means.shape[-1]
    axes, sizes = grid_axes(spec, grid), subblock_sizes(spec, grid, "means")
    outside = [(axis.before // size, axis.after // size) for axis, size in zip(axes, sizes, strict=True)]
    blocks = [count for axis, size in zip(axes, sizes, strict=True) for count in (axis.blocks, spec.block // size)]
    present = [blocks[2 * n] * blocks[2 * n + 1] - sum(missing) for n, missing in enumerate(outside)]
    of_grid = means[..., prefix_tokens:, :].reshape(*batch, *present, channels)
    if any(map(any, outside)):
        of_grid = jnp.pad(of_grid, [(0, 0)] * len(batch) + outside + [(0, 0)])
    of_grid = block_by_block(of_grid, blocks)
    of_grid = of_grid.reshape(*batch, math.prod(of_grid.shape[-3:-1]), channels)
    return behind_prefix(means[..., :prefix_tokens, :], of_grid)


def expand_to_subblocks(
    coefficients: jax.Array, spec: SpecFields, grid: Grid, prefix_tokens: int = 0, precision: Any = None
) -> jax.Array:
    """``expand``, with one row for each of ``means_by_block``: ``[..., prefix_tokens + sub-blocks, channels]``."""
    if math.prod(grid) <= MATRIX_TOKENS:
        return apply_matrix(_matrices(spec, grid, prefix_tokens)[1], coefficients, precision)
    values = at_subblocks(coefficients[..., prefix_tokens:, :], spec, grid, precision)
    values = values.reshape(*values.shape[:-3], math.prod(values.shape[-3:-1]), values.shape[-1])
    return behind_prefix(coefficients[..., :prefix_tokens, :], values)


def project_means(x: jax.Array, spec: SpecFields, grid: Grid, prefix_tokens: int = 0, precision: Any = None) -> jax.Array:
    """``project`` of tokens whose ``means_by_block`` are x, ``[..., prefix_tokens + sub-blocks, channels]``."""
    if math.prod(grid) <= MATRIX_TOKENS:
        return apply_matrix(_matrices(spec, grid, prefix_tokens)[0], x, precision)
    blocks, means = math.prod(axis.blocks for axis in grid_axes(spec, grid)), x[..., prefix_tokens:, :]
    means = means.reshape(*x.shape[:-2], blocks, means.shape[-2] // blocks, x.shape[-1])
    return behind_prefix(x[..., :prefix_tokens, :], of_subblocks(means, spec, grid, precision, "means"))


def sum_means(x: jax.Array, spec: SpecFields, grid: Grid, prefix_tokens: int = 0) -> jax.Array:
    """The sums over all tokens, ``[..., channels]``, of what has the ``means_by_block`` x."""
    # XLA's CPU backend sums along rows several times faster by a product
    return apply_matrix(_counts(spec, grid, prefix_tokens)[None], x, lax.Precision.HIGHEST)[..., 0, :]


@functools.cache
def _counts(spec: SpecFields, grid: Grid, prefix_tokens: int) -> np.ndarray:
    """How many tokens each row of ``means_by_block`` is the mean of: float64 ``[prefix_tokens + sub-blocks]``."""
    axes, sizes = grid_axes(spec, grid), subblock_sizes(spec, grid, "means")
    present = [
        np.pad(np.ones(length), (axis.before, axis.after)).reshape(axis.blocks, -1, size).sum(-1)
        for length, axis, size in zip(grid, axes, sizes, strict=True)
    ]
    counts = [
        functools.reduce(np.kron, [of_axis[b] for of_axis, b in zip(present, block, strict=True)])
        for block in itertools.product(*(range(axis.blocks) for axis in axes))
    ]
    return np.concatenate([np.ones(prefix_tokens), *counts])


@functools.cache
def _matrices(spec: SpecFields, grid: Grid, prefix_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Those that ``project_means`` and ``expand_to_subblocks`` apply to small grids."""
    blocks, whole = math.prod(axis.blocks for axis in grid_axes(spec, grid)), []
    for side in ("means", "synthesis"):
        matrices, kept = block_matrices(spec, grid, side)
        rows, columns = matrices.shape[1:]
        matrix = np.zeros((blocks, rows, blocks, columns))
        matrix[np.arange(blocks), :, np.arange(blocks)] = matrices
        matrix = matrix.reshape(blocks * rows, blocks * columns)
        matrix = matrix[kept] if side == "means" else matrix[:, kept]
        padded = np.zeros([prefix_tokens + size for size in matrix.shape])
        padded[:prefix_tokens, :prefix_tokens], padded[prefix_tokens:, prefix_tokens:] = np.eye(prefix_tokens), matrix
        whole.append(padded)
    return whole[0], whole[1]


@functools.cache
def _members(length: int, size: int, before: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of an axis's sub-blocks that have some, and what each weighs: int64 and float64 ``[size, sub-blocks]``.

    A partial sub-block's tokens come several times, as evenly as may be.
    """
    tokens, weights = [], []
    for first in range(-(before % size), length, size):
        own = np.arange(max(first, 0), min(first + size, length))
        times = np.bincount(np.arange(size) % len(own))
        tokens.append(np.resize(own, size))
        weights.append(np.resize(1 / (len(own) * times), size))
    return np.stack(tokens, axis=1), np.stack(weights, axis=1)


def _taken(x: jax.Array, tokens: list[np.ndarray]) -> jax.Array:
    """These tokens along each grid axis of ``[..., *grid, channels]``."""
    for axis, own in enumerate(tokens, x.ndim - 1 - len(tokens)):
        steps = np.unique(np.diff(own))
        if len(steps) < 2 and np.all(steps > 0):
            x = lax.slice_in_dim(x, own[0], own[-1] + 1, int(steps[0]) if len(steps) else 1, axis)
        else:
            x = jnp.take(x, own, axis, mode="clip")
    return x


def _weighted(weights: np.ndarray, x: jax.Array) -> jax.Array:
    constant = float(weights.flat[0])
    if np.all(weights == constant):
        return x * constant
    return x * jnp.asarray(weights, x.dtype).reshape((1,) * (x.ndim - weights.ndim) + weights.shape)
