import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LowRankSpec, lp_l1, lp_linf
from lbpwht_jax.ops.basis import projection_matrices
from lbpwht_jax.ops.block_sums import spread_over_subblocks, subblock_sizes, sum_subblocks
from lbpwht_jax.ops.projection import expand, project

# every form: one block, whole blocks, partial blocks aligned with sub-blocks or not, large, one and three axes
GRIDS = [(7, 7), (8, 8), (14, 14), (28, 28), (16, 24), (12, 20), (17, 33), (100,), (4, 8, 12)]
SELECTIONS = [(lp_l1, 1), (lp_l1, 2), (lp_l1, 3), (lp_l1, 6), (lp_linf, 2), (lp_linf, 4)]


def assert_equals_the_matrices(spec, grid):
    analysis, synthesis = projection_matrices(spec, grid, 2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 2 + math.prod(grid), 3))
    coefficients = rng.normal(size=(2, len(analysis), 3))
    both = jax.jit(lambda x, coefficients: (project(x, spec, grid, 2), expand(coefficients, spec, grid, 2)))
    actual = both(x.astype(np.float32), coefficients.astype(np.float32))
    # float32 sums of at most 64 terms of order 1
    chex.assert_trees_all_close(actual, (analysis @ x, synthesis @ coefficients), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: f"{s[0].__name__}-{s[1]}")
def test_every_form_equals_the_matrices(grid, selection):
    select, r = selection
    assert_equals_the_matrices(select(r, len(grid)), grid)


@pytest.mark.parametrize("grid", [(7, 7), (16, 24), (17, 33)], ids=str)
def test_official_projections_equal_the_matrices(grid):
    assert_equals_the_matrices(lp_l1(2, projection="official"), grid)


def test_functions_that_differ_by_axis_have_subblocks_that_do():
    spec = LowRankSpec([(0, 0), (0, 1), (0, 5)])
    assert subblock_sizes(spec, (16, 16), "synthesis") == (8, 1)
    assert subblock_sizes(lp_l1(2), (56, 56), "synthesis") == (4, 4)
    assert subblock_sizes(lp_l1(4), (28, 28), "synthesis") == (2, 2)
    assert subblock_sizes(lp_l1(2, block=4), (16, 16), "synthesis") == (2, 2)


def test_subblocks_are_cut_where_partial_blocks_begin():
    assert subblock_sizes(lp_l1(4), (37, 37), "analysis") == (2, 2)  # but not to single tokens of a large grid
    assert subblock_sizes(lp_l1(2), (28, 28), "analysis") == (2, 2)
    assert subblock_sizes(lp_l1(2), (7, 7), "analysis") == (1, 1)
    assert subblock_sizes(lp_l1(2, projection="official"), (28, 28), "synthesis") == (1, 1)


@pytest.mark.parametrize("grid", [(8,), (20,), (12, 16), (4, 8, 12)], ids=str)
def test_sums_and_values_of_subblocks(grid):
    spec = lp_linf(2, len(grid))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *grid, 2)).astype(np.float32)
    sizes = subblock_sizes(spec, grid, "analysis")
    sums = np.asarray(jax.jit(lambda x: sum_subblocks(x, spec, grid))(x))
    blocks = [-(-length // 8) for length in grid]
    chex.assert_shape(sums, (3, math.prod(blocks), math.prod(8 // size for size in sizes), 2))
    padded = np.pad(x, [(0, 0), *((-length % 8 // 2,) * 2 for length in grid), (0, 0)])
    for b, block in enumerate(itertools.product(*map(range, blocks))):
        for s, inside in enumerate(itertools.product(*(range(8 // size) for size in sizes))):
            starts = [8 * n + size * k for n, k, size in zip(block, inside, sizes, strict=True)]
            own = padded[:, *(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
            # float32 sums of at most 64 terms of order 1
            chex.assert_trees_all_close(sums[:, b, s], own.reshape(3, -1, 2).sum(1), rtol=0, atol=1e-5)
    values = rng.normal(size=(3, math.prod(blocks), 2 ** len(grid), 2)).astype(np.float32)
    spread = np.asarray(spread_over_subblocks(jnp.asarray(values), spec, grid))
    chex.assert_shape(spread, x.shape)
    for token in itertools.product(*map(range, grid)):
        place = [n + -length % 8 // 2 for n, length in zip(token, grid, strict=True)]
        block = np.ravel_multi_index([n // 8 for n in place], blocks)
        inside = np.ravel_multi_index([n % 8 // 4 for n in place], (2,) * len(grid))
        chex.assert_trees_all_equal(spread[:, *token], values[:, block, inside])
