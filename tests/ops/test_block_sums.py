import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LowRankSpec, lp_l1, lp_linf
from lbpwht_jax.ops.block_sums import aligned_pieces, piece_sizes
from lbpwht_jax.ops.projection import expand, goes_by_axis, project, projection_matrices

# every form: one block, whole blocks, partial blocks aligned with pieces or not, large, one and three axes
GRIDS = [(7, 7), (8, 8), (14, 14), (28, 28), (16, 24), (12, 20), (17, 33), (100,), (4, 8, 12)]
SELECTIONS = [(lp_l1, 1), (lp_l1, 2), (lp_l1, 3), (lp_l1, 6), (lp_linf, 2), (lp_linf, 4)]


def assert_equals_the_matrices(spec, grid):
    analysis, synthesis = projection_matrices(spec, grid, 2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 2 + math.prod(grid), 3))
    coefficients = rng.normal(size=(2, len(analysis), 3))
    # float32 sums of at most 64 terms of order 1
    projected = jax.jit(lambda x: project(x, spec, grid, 2))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(projected, analysis @ x, atol=1e-5)
    expanded = jax.jit(lambda x: expand(x, spec, grid, 2))(jnp.asarray(coefficients, jnp.float32))
    np.testing.assert_allclose(expanded, synthesis @ coefficients, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: f"{s[0].__name__}-{s[1]}")
def test_every_form_equals_the_matrices(grid, selection):
    select, r = selection
    assert_equals_the_matrices(select(r, len(grid)), grid)


@pytest.mark.parametrize("grid", [(7, 7), (16, 24), (17, 33)], ids=str)
def test_official_projections_equal_the_matrices(grid):
    assert_equals_the_matrices(lp_l1(2, projection="official"), grid)


def test_functions_that_differ_by_axis_have_pieces_that_do():
    spec = LowRankSpec([(0, 0), (0, 1), (0, 5)])
    assert piece_sizes(spec, (16, 16)) == (8, 1)
    assert piece_sizes(lp_l1(2), (56, 56)) == (4, 4) and piece_sizes(lp_l1(4), (28, 28)) == (2, 2)
    assert piece_sizes(lp_l1(2, block=4), (16, 16)) == (2, 2)


def test_pieces_are_cut_where_partial_blocks_begin():
    assert aligned_pieces(lp_l1(2), (28, 28)) == (2, 2)
    assert aligned_pieces(lp_l1(2), (7, 7)) == (1, 1)
    assert piece_sizes(lp_l1(2, projection="official"), (28, 28)) == (1, 1)


def test_which_grids_go_by_axis():
    assert goes_by_axis(lp_l1(6), (56, 56)) and goes_by_axis(lp_l1(8), (28, 28))
    assert not goes_by_axis(lp_l1(4), (56, 56)) and not goes_by_axis(lp_l1(8), (14, 14))
