"""Norms on running statistics, for the tests of products with a norm in front."""

import jax.numpy as jnp
import numpy as np

from lbpwht_jax.ops import Affine


def running(parameters, bits, dtype, activation=None):
    """A norm with this scale and bias, on statistics that are always the same."""
    size = len(parameters[0])
    rng = np.random.default_rng(1)
    statistics = jnp.asarray(rng.normal(size=size), jnp.float32), jnp.asarray(rng.uniform(0.5, 2, size), jnp.float32)
    return Affine.running(statistics, *parameters, 1e-5, bits, dtype, activation)
