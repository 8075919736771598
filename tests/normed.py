"""Norms on running statistics, and gradients near others, for the tests of products with a norm in front."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.ops import Affine


def running(parameters, bits, dtype, activation=None):
    """A norm with this scale and bias, on statistics that are always the same."""
    size = len(parameters[0])
    rng = np.random.default_rng(1)
    statistics = jnp.asarray(rng.normal(size=size), jnp.float32), jnp.asarray(rng.uniform(0.5, 2, size), jnp.float32)
    return Affine.running(statistics, *parameters, 1e-5, bits, dtype, activation)


def gradients(of, operands, g):
    """The result and all cotangents."""
    result, pullback = jax.vjp(of, *operands)
    return [result, *jax.tree.leaves(pullback(g))]


def assert_near(own, other, share):
    """Each array's difference is at most a share of its length."""
    for a, b in zip(own, other, strict=True):
        chex.assert_equal_shape((a, b))
        a, b = (array.astype(jnp.float32) for array in (a, b))
        assert float(jnp.linalg.norm(a - b)) <= share * float(jnp.linalg.norm(b)), (a.shape, share)
