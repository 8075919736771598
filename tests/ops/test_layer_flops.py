import itertools
import math

import chex
import jax
import jax.numpy as jnp
import pytest

from lbpwht_jax import low_rank_matmul, lp_l1, lp_linf
from lbpwht_jax.ops.flops import product_flops
from lbpwht_jax.ops.layer_flops import backward_flops, transform_flops

INPUTS, OUTPUTS = 6, 10
CASES = {
    "matrix": (lp_l1(4), (7, 7), 0),
    "prefix": (lp_l1(2), (7, 7), 2),
    "by block": (lp_l1(4), (28, 28), 1),
    "by axis": (lp_l1(6), (24, 24), 0),
    "dx exact": (lp_l1(3, dx="exact"), (7, 7), 1),
    "dw exact": (lp_linf(3, dw="exact"), (12, 9), 0),
    "both exact": (lp_l1(3, dx="exact", dw="exact"), (7, 7), 0),
}


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=2)), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_backward_flops_are_those_of_the_program(case, needs):
    spec, grid, prefix = CASES[case]
    tokens = prefix + math.prod(grid)
    shapes = [(1, tokens, INPUTS), (INPUTS, OUTPUTS), (1, tokens, OUTPUTS)]
    x, kernel, g = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    wanted = [n for n, need in enumerate(needs) if need]

    def step(x, kernel, g):
        def forward(*arrays):
            operands = [x, kernel]
            for n, array in zip(wanted, arrays, strict=True):
                operands[n] = array
            return low_rank_matmul(*operands, spec, grid, prefix)

        y, pullback = jax.vjp(forward, *((x, kernel)[n] for n in wanted))
        return y, pullback(g)

    forward = 2 * tokens * INPUTS * OUTPUTS
    dx, dw = needs
    assert backward_flops(spec, grid, prefix, INPUTS, OUTPUTS, dx, dw) == product_flops(step, x, kernel, g) - forward
    chex.assert_trees_all_equal_shapes(jax.eval_shape(step, x, kernel, g)[1], tuple((x, kernel)[n] for n in wanted))


def test_one_matrix_costs_its_entries_per_channel():
    assert transform_flops(lp_l1(4), (7, 7)) == (2 * 10 * 49, 2 * 10 * 49)
    assert transform_flops(lp_l1(2), (7, 7), 1) == (2 * 4 * 50, 2 * 4 * 50)
