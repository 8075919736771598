"""The bias of ``low_rank_matmul``: its gradient is exact, and taken from the coefficients where they hold it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LowRankSpec, lp_l1, lp_linf
from lbpwht_jax.ops.matmul import low_rank_matmul

CASES = {
    "fitted": (lp_l1(3), (7, 7), 0),
    "whole blocks": (lp_l1(2, projection="official"), (16, 8), 0),
    "official partial": (lp_l1(3, projection="official"), (7, 7), 0),
    "prefix": (lp_linf(2), (5, 9), 2),
    "large": (lp_l1(2), (28, 28), 1),
    "no mean": (LowRankSpec([(0, 1), (1, 0)]), (7, 7), 0),
    "exact dW": (lp_l1(2, dw="exact"), (7, 7), 0),
    "exact": (lp_l1(2, dx="exact", dw="exact"), (7, 7), 0),
}


def inputs(grid, prefix, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tokens = prefix + np.prod(grid)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, tokens, 4), (4, 5), (5,), (3, tokens, 5))]


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", CASES)
def test_the_bias_and_its_gradient_are_exact(case, dtype, tolerance):
    spec, grid, prefix = CASES[case]
    x, kernel, bias, g = inputs(grid, prefix, dtype)

    @jax.jit
    def with_bias(x, kernel, bias, g):
        y, pullback = jax.vjp(lambda *a: low_rank_matmul(*a[:2], spec, grid, prefix, bias=a[2]), x, kernel, bias)
        return y, pullback(g)

    @jax.jit
    def without_bias(x, kernel, bias, g):
        y, pullback = jax.vjp(lambda *a: low_rank_matmul(*a, spec, grid, prefix), x, kernel)
        return y + bias.reshape(1, 1, -1), pullback(g)

    y, (dx, dw, db) = with_bias(x, kernel, bias, g)
    chex.assert_trees_all_equal((y, (dx, dw)), without_bias(x, kernel, bias, g))
    chex.assert_type([y, dx, dw, db], dtype)
    exact = np.asarray(g, np.float64).sum((0, 1))
    # coefficients are rounded to g's dtype, of which up to 3 * 16 are summed
    scale = np.abs(np.asarray(g, np.float64)).sum((0, 1)).max()
    chex.assert_trees_all_close(np.asarray(db, np.float64), exact, rtol=0, atol=tolerance * scale)


def test_the_cotangent_is_read_once():
    spec, grid, _ = CASES["fitted"]
    x, kernel, bias, g = inputs(grid, 0)

    def backward(x, kernel, bias, g):
        return jax.vjp(lambda *a: low_rank_matmul(*a[:2], spec, grid, bias=a[2]), x, kernel, bias)[1](g)

    def reads(jaxpr, variable):
        return sum(variable in equation.invars for equation in jaxpr.eqns)

    program = jax.make_jaxpr(backward)(x, kernel, bias, g).jaxpr
    assert reads(program, program.invars[3]) == 1


@pytest.mark.parametrize("argnums", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_what_is_frozen_changes_nothing_else(argnums):
    spec, grid, _ = CASES["fitted"]
    *primals, g = inputs(grid, 0)

    def loss(*a):
        return jnp.sum(low_rank_matmul(a[0], a[1], spec, grid, bias=a[2]) * g)

    everything = jax.jit(jax.grad(loss, (0, 1, 2)))(*primals)
    some = jax.jit(jax.grad(loss, argnums))(*primals)
    # float32 sums of up to 147 terms, in any order
    chex.assert_trees_all_close(some, tuple(everything[n] for n in argnums), rtol=1e-5, atol=1e-5)
