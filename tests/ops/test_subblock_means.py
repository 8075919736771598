"""Means over sub-blocks, against the matrices of the whole grid."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LowRankSpec, lp_l1, lp_linf
from lbpwht_jax.ops.basis import projection_matrices
from lbpwht_jax.ops.gelu import slope_for_means
from lbpwht_jax.ops.subblock_means import (
    expand_to_subblocks,
    has_means,
    means_by_block,
    project_means,
    subblock_means,
    sum_means,
)

# whole and partial sub-blocks, sub-blocks without tokens, small and large grids, one to three axes
GRIDS = [(7, 7), (8, 8), (14, 14), (28, 28), (16, 24), (17, 33), (100,), (4, 8, 12)]
SELECTIONS = [(lp_l1, 1), (lp_l1, 2), (lp_l1, 4), (lp_linf, 2)]


def sample(spec, grid):
    analysis, synthesis = projection_matrices(spec, grid, 2)
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(2, 2 + math.prod(grid), 3))
    return analysis, synthesis, slopes, rng.normal(size=(2, len(analysis), 3))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: f"{s[0].__name__}-{s[1]}")
def test_means_are_all_that_the_coefficients_take_of_a_factor(selection, grid):
    select, r = selection
    spec = select(r, len(grid))
    assert has_means(spec, grid)
    analysis, synthesis, slopes, coefficients = sample(spec, grid)

    @jax.jit
    def through(x, coefficients):
        means = means_by_block(subblock_means(x, jnp.tanh, spec, grid, 2), spec, grid, 2)
        products = expand_to_subblocks(coefficients, spec, grid, 2) * means
        return project_means(products, spec, grid, 2), sum_means(products, spec, grid, 2)

    products = np.tanh(slopes) * (synthesis @ coefficients)
    expected = analysis @ products, products.sum(1)
    # float32 sums of up to 784 terms of order 1
    chex.assert_trees_all_close(through(*map(np.float32, (slopes, coefficients))), expected, rtol=1e-5, atol=2e-5)


def test_means_themselves():
    """One block of 8x8 with a row and a column missing at the front: sub-blocks of 4, 2 and 1 tokens, in a tree."""
    x = np.random.default_rng(0).normal(size=(2, 1 + 49, 3)).astype(np.float32)
    squares, means = subblock_means(x, lambda x: (x * x, x), lp_l1(4), (7, 7), 1)
    padded = np.pad(x[:, 1:].reshape(2, 7, 7, 3), ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=np.nan)
    for own, values in ((means, padded), (squares, padded**2)):
        expected = np.nanmean(values.reshape(2, 4, 2, 4, 2, 3), axis=(2, 4)).reshape(2, 16, 3)
        # float32 sums of four numbers
        chex.assert_trees_all_close(own[:, 1:], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(means[:, 0], x[:, 0])


def test_subblocks_without_tokens_are_not_kept_and_have_zeros():
    means = subblock_means(jnp.ones((1, 784, 1)), jnp.exp, lp_l1(4), (28, 28))
    assert means.shape == (1, 196, 1)
    means = means_by_block(means, lp_l1(4), (28, 28))
    assert means.shape == (1, 256, 1)
    assert np.count_nonzero(means) == 196


@pytest.mark.parametrize(
    ("spec", "grid"),
    [(lp_l1(6), (16, 16)), (lp_linf(8), (8, 8)), (lp_l1(2, projection="official"), (14, 14))],
    ids=["six", "all functions", "reflected tokens"],
)
def test_where_there_are_none(spec, grid):
    assert not has_means(spec, grid)


def test_the_axes_may_differ():
    spec = LowRankSpec([(0, 0), (0, 1), (0, 5)])
    assert has_means(spec, (16, 16))
    assert subblock_means(jnp.ones((1, 256, 1)), jnp.exp, spec, (16, 16)).shape == (1, 32, 1)


def test_slopes_for_means():
    x = np.linspace(-9, 9, 10001)
    cdf = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    exact = cdf + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    slopes = jax.jit(slope_for_means)(np.float32(x))
    # as its docstring says
    np.testing.assert_allclose(slopes, exact, rtol=0, atol=6e-5)
    ends = slope_for_means(jnp.asarray([-np.inf, np.inf, np.nan], jnp.float32))
    np.testing.assert_allclose(ends, [0, 1, np.nan], rtol=0, atol=6e-5)
