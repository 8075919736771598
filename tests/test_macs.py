"""Counts against products worked out by hand."""

import jax
import jax.numpy as jnp
from jax import lax

from lbpwht_jax.macs import count_macs


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products():
    assert count_macs(lambda a, b: a @ b, shape(3, 5), shape(5, 7)) == 3 * 5 * 7
    assert count_macs(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), shape(2, 3, 5), shape(2, 4, 5)) == 2 * 3 * 4 * 5
    assert count_macs(lambda a: a + a, shape(3, 5)) == 0


def test_convolutions():
    def convolve(groups):
        return lambda x, k: lax.conv_general_dilated(
            x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    assert count_macs(convolve(1), shape(2, 8, 8, 3), shape(3, 3, 3, 6)) == 2 * 4 * 4 * 6 * 3 * 3 * 3
    assert count_macs(convolve(6), shape(2, 8, 8, 6), shape(3, 3, 1, 6)) == 2 * 4 * 4 * 6 * 3 * 3


def test_products_inside_other_functions():
    def function(a, b):
        def step(carry, _):
            return carry @ b, None

        a, _ = lax.scan(step, a, length=4)
        return jax.checkpoint(jax.jit(jnp.matmul))(jax.nn.relu(a), b)

    assert count_macs(function, shape(3, 5), shape(5, 5)) == 5 * 3 * 5 * 5
