import math

import chex
import jax
import jax.numpy as jnp
import pytest

from lbpwht_jax import lp_l1, lp_linf
from lbpwht_jax.ops import coefficient_count, expand, project
from lbpwht_jax.ops.forms import transform_form

FORMS = {
    # a grid within one block has no sub-blocks worth expanding to
    "one partial block": (lp_l1(2), (7, 7), "matrix", "matrix"),
    "one block": (lp_l1(2), (8, 8), "by_block", "matrix"),
    "fine functions": (lp_l1(8), (14, 14), "matrix", "matrix"),
    "coarse functions, cut sub-blocks": (lp_l1(4), (14, 14), "matrix", "by_block"),
    "coarse functions": (lp_l1(4), (56, 56), "by_block", "by_block"),
    "large and fine": (lp_l1(6), (56, 56), "by_axis", "by_axis"),
    "large and fine, partial": (lp_l1(8), (28, 28), "by_axis", "by_axis"),
    "large, cut sub-blocks": (lp_l1(2), (17, 33), "by_block", "by_block"),
    "official, partial": (lp_l1(2, projection="official"), (28, 28), "by_axis", "by_axis"),
    "official, whole": (lp_linf(4, projection="official"), (16, 16), "by_block", "by_block"),
    "sequence": (lp_l1(8, ndim=1), (256,), "matrix", "matrix"),
    "long sequence": (lp_l1(8, ndim=1), (264,), "by_axis", "by_axis"),
}


@pytest.mark.parametrize("case", FORMS)
def test_the_form_follows_from_the_shape(case):
    spec, grid, analysis, synthesis = FORMS[case]
    assert transform_form(spec, grid, "analysis") == analysis
    assert transform_form(spec, grid, "synthesis") == synthesis


@pytest.mark.parametrize("case", FORMS)
def test_transforms_run_in_the_form_picked(case):
    """One matrix is one product of two; by axis there is one product for each axis; by block the operand is smaller."""
    spec, grid, *forms = FORMS[case]
    counts = coefficient_count(spec, grid), math.prod(grid)
    for transform, form, rows, results in zip((project, expand), forms, counts[::-1], counts, strict=True):
        operand = jax.ShapeDtypeStruct((2, rows, 3), jnp.float32)
        program = jax.make_jaxpr(lambda x, transform=transform: transform(x, spec, grid))(operand)
        products = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
        assert len(products) == (len(grid) if form == "by_axis" else 1)
        whole = [equation for equation in products if equation.invars[0].aval.shape == (2, results, rows)]
        assert bool(whole) == (form == "matrix")
        chex.assert_shape(program.out_avals, (2, results, 3))
