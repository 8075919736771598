import math

import chex
import jax
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from lbpwht_jax import LowRankSpec, lp_l1, lp_linf
from lbpwht_jax.ops import coefficient_count, projection_matrices
from lbpwht_jax.ops.projection import _expand_by_axis, _project_by_axis

GRIDS = [(7, 7), (14, 14), (12, 9), (5, 3), (3, 3), (1, 1), (16, 8), (28, 28), (100,), (6,), (4, 7, 7)]


def projector(spec, grid):
    analysis, synthesis = projection_matrices(spec, grid)
    return synthesis @ analysis


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("r", [1, 2, 4, 8])
@pytest.mark.parametrize("select", [lp_l1, lp_linf])
def test_fitted_is_the_orthogonal_projector_onto_the_restricted_functions(grid, r, select):
    spec = select(r, ndim=len(grid))
    actual = projector(spec, grid)
    chex.assert_trees_all_close(actual, actual.T, rtol=0, atol=1e-12)
    chex.assert_trees_all_close(actual @ actual, actual, rtol=0, atol=1e-12)
    chex.assert_trees_all_close(actual, reference.fitted_projector(spec, grid), rtol=0, atol=1e-10)
    assert coefficient_count(spec, grid) == round(np.trace(actual))


@settings(max_examples=60)
@given(st.data())
def test_fitted_projects_whatever_the_selection(data):
    ndim = data.draw(st.integers(1, 2))
    block = data.draw(st.sampled_from([1, 2, 4, 8]))
    grid = data.draw(st.tuples(*[st.integers(1, 19)] * ndim))
    functions = st.tuples(*[st.integers(0, block - 1)] * ndim)
    chosen = data.draw(st.lists(functions, min_size=1, max_size=12, unique=True))
    more = data.draw(st.lists(functions, max_size=12).map(lambda extra: [f for f in dict.fromkeys(extra) if f not in chosen]))
    few, many = (projector(LowRankSpec(bases, block=block), grid) for bases in (chosen, chosen + more))
    for matrix in (few, many):
        chex.assert_trees_all_close(matrix @ matrix, matrix, rtol=0, atol=1e-12)
        chex.assert_trees_all_close(matrix, matrix.T, rtol=0, atol=1e-12)
    # nested selections project onto nested spaces, so the error cannot rise
    chex.assert_trees_all_close(few @ many, few, rtol=0, atol=1e-12)
    assert coefficient_count(LowRankSpec(chosen, block=block), grid) <= math.prod(grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fitted_keeps_everything_when_all_functions_are_kept(grid):
    chex.assert_trees_all_close(projector(lp_linf(8, len(grid)), grid), np.eye(math.prod(grid)), rtol=0, atol=1e-12)
    assert coefficient_count(lp_linf(8, len(grid)), grid) == math.prod(grid)


@pytest.mark.parametrize("grid", [(8, 8), (16, 8), (24,)], ids=str)
def test_both_projections_agree_on_whole_blocks(grid):
    fitted, official = (projection_matrices(lp_l1(4, len(grid), projection=p), grid) for p in ("fitted", "official"))
    chex.assert_trees_all_close(fitted, official, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("projection", ["fitted", "official"])
@pytest.mark.parametrize("r", [2, 5])
def test_axis_by_axis_equals_the_matrices(grid, projection, r):
    spec = lp_l1(r, len(grid), projection=projection)
    analysis, synthesis = projection_matrices(spec, grid)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, math.prod(grid), 5))
    coefficients = rng.normal(size=(2, 3, len(analysis), 5))
    both = jax.jit(lambda x, c: (_project_by_axis(x, spec, grid, None), _expand_by_axis(c, spec, grid, None)))
    actual = both(x.astype(np.float32), coefficients.astype(np.float32))
    # float32 sums of at most 784 terms of order 1, results of order 10
    chex.assert_trees_all_close(actual, (analysis @ x, synthesis @ coefficients), rtol=0, atol=2e-5)


def test_prefix_tokens_pass_through():
    analysis, synthesis = projection_matrices(lp_l1(2), (7, 7), 2)
    chex.assert_shape([analysis, synthesis], [(2 + 3, 2 + 49), (2 + 49, 2 + 3)])
    inner_analysis, inner_synthesis = projection_matrices(lp_l1(2), (7, 7))
    chex.assert_trees_all_equal(analysis[:2, :2], np.eye(2))
    chex.assert_trees_all_equal(analysis[2:, 2:], inner_analysis)
    chex.assert_trees_all_equal(synthesis[2:, 2:], inner_synthesis)
    assert not analysis[:2, 2:].any() and not analysis[2:, :2].any()
