"""What the operation refuses, eagerly and when tracing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LowRankSpec, low_rank_matmul, lp_l1
from lbpwht_jax.ops.validate import check_grid


def call(x=(2, 49, 6), kernel=(6, 5), spec=None, dtype=jnp.float32, **arguments):
    return low_rank_matmul(jnp.zeros(x, dtype), jnp.zeros(kernel, jnp.float32), spec or lp_l1(4), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (7, 8)}, r"grid \(7, 8\) with 0 prefix tokens makes 56 tokens, but x of shape \[2, 49, 6\] has 49"),
        ({"grid": (7, 7), "prefix_tokens": 1}, r"with 1 prefix tokens makes 50 tokens"),
        ({"grid": (7, 7), "x": (6,)}, r"x of shape \[6\] has no token axis"),
        (
            {"grid": (7, 7), "kernel": (4, 5)},
            r"x of shape \[2, 49, 6\] has 6 channels, but the kernel of shape \[4, 5\] takes 4",
        ),
        ({"grid": (7, 7), "kernel": (1, 6, 5)}, r"kernel must be \[in, out\], got shape \[1, 6, 5\]"),
        ({}, r"the grid is missing.*\[2, 49, 6\].*pass grid=\(size, size\)"),
        ({"x": (2, 7, 7, 6), "prefix_tokens": 1}, r"prefix_tokens=1 needs a token axis.*\[2, 7, 7, 6\] is a channels-last map"),
        ({"grid": (49,)}, r"functions have 2 axes and the grid \(49,\) has 1.*ndim=1"),
        ({"grid": (7, 7), "prefix_tokens": -1}, r"prefix_tokens must not be negative, got -1"),
        ({"grid": (0, 7), "x": (2, 0, 6)}, r"every axis of the grid needs at least one token, got \(0, 7\)"),
        (
            {"grid": (1, 1), "x": (2, 1, 6), "spec": LowRankSpec([(0, 1)])},
            r"none of the functions .* exists on the grid \(1, 1\)",
        ),
        ({"grid": (7, 8), "name": "encoder/fc1"}, r"^encoder/fc1: grid \(7, 8\)"),
        (
            {"grid": (7, 7), "bias": np.zeros(4, np.float32)},
            r"the bias must be \[5\], one per channel of the output, got \[4\]",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: call(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (7, 7), "spec": "lp_l1-4"}, r"spec must be a LowRankSpec, such as lp_l1\(4\), got 'lp_l1-4'"),
        ({"grid": 49}, "grid must be a tuple of integers.*got grid=49"),
        ({"grid": (7.0, 7)}, "grid must be a tuple of integers"),
        ({"grid": (7, 7), "dtype": jnp.int32}, "x must be of a floating-point dtype, got int32"),
        ({"grid": (7, 7), "bias": [0, 1, 2, 3, 4]}, "bias must be of a floating-point dtype, got int32"),
    ],
)
def test_errors_of_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("shape", "grid", "found"),
    [((2, 49, 6), [7, 7], (7, 7)), ((2, 7, 9, 6), None, (7, 9)), ((2, 3, 7, 9, 6), None, (7, 9))],
)
def test_the_grid_found(shape, grid, found):
    assert check_grid(shape, lp_l1(4), grid, 0, "here") == found


def test_what_fits_is_taken():
    chex.assert_shape(call(grid=[7, 7]), (2, 49, 5))
    chex.assert_shape(call(x=(2, 50, 6), grid=(7, 7), prefix_tokens=1), (2, 50, 5))
    chex.assert_shape(call(x=(2, 7, 7, 6)), (2, 7, 7, 5))
    chex.assert_shape(call(x=(7, 7, 6), grid=(7, 1)), (7, 7, 5))
    chex.assert_trees_all_equal(call(grid=(7, 7), bias=[0.0, 1.0, 2.0, 3.0, 4.0])[1, 48], jnp.arange(5.0))


@pytest.mark.parametrize("projection", ["fitted", "official"])
@pytest.mark.parametrize("grid", [(7, 7), (16, 16), (33, 31)])
def test_gradients_of_an_empty_batch_are_those_of_a_dense_layer(grid, projection):
    x, kernel = jnp.zeros((0, np.prod(grid), 6)), jnp.ones((6, 5))
    spec = lp_l1(4, projection=projection)
    found = jax.grad(lambda *a: low_rank_matmul(*a, spec, grid).sum(), (0, 1))(x, kernel)
    chex.assert_trees_all_equal(found, jax.grad(lambda x, k: (x @ k).sum(), (0, 1))(x, kernel))
