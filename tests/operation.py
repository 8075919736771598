"""Every public variant of the operation, and how its tests run and compare it."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import reference

from lbpwht_jax import LowRankSpec, low_rank_matmul, lp_l1, lp_linf

# Its spec, grid and prefix tokens, and whether x is a channels-last map.
VARIANTS = {
    "fitted": (lp_l1(4), (7, 7), 0, False),
    "official": (lp_l1(4, projection="official"), (7, 7), 0, False),
    "prefix": (lp_l1(4), (7, 7), 2, False),
    "official-prefix": (lp_l1(4, projection="official"), (5, 9), 1, False),
    "linf": (lp_linf(2), (12, 9), 1, False),
    "explicit": (LowRankSpec([(0, 0), (0, 1), (1, 0), (2, 1), (2, 0), (1, 1)]), (8, 8), 0, False),
    "block-4": (lp_l1(3, block=4), (6, 10), 0, False),
    "small-grid": (lp_l1(2), (3, 3), 0, False),
    "one-dimension": (lp_l1(3, ndim=1), (20,), 1, False),
    "three-dimensions": (lp_l1(3, ndim=3, block=4), (3, 5, 4), 0, False),
    "by-block": (lp_l1(4), (28, 20), 0, False),
    "by-axis-prefix": (lp_l1(3, projection="official"), (28, 20), 2, False),
    "map": (lp_l1(4), (7, 9), 0, True),
    "map-by-axis": (lp_l1(4, projection="official"), (24, 28), 0, True),
    "dx-exact": (lp_l1(4, dx="exact"), (7, 7), 1, False),
    "dw-exact": (lp_l1(4, dw="exact"), (7, 7), 1, False),
    "both-exact": (lp_l1(4, dx="exact", dw="exact"), (7, 7), 0, False),
}


def sample(variant, batch=(8,), channels=(6, 5), dtype=jnp.float32):
    """The operation as a function of x and kernel, and random x, kernel and cotangent."""
    spec, grid, prefix, as_map = VARIANTS[variant]
    rng = np.random.default_rng(0)
    tokens = grid if as_map else (prefix + math.prod(grid),)
    x = rng.normal(size=(*batch, *tokens, channels[0]))
    g = rng.normal(size=(*batch, *tokens, channels[1]))
    kernel = rng.normal(size=channels)
    operation = functools.partial(low_rank_matmul, spec=spec, grid=None if as_map else grid, prefix_tokens=prefix)
    return operation, *(jnp.asarray(a, dtype) for a in (x, kernel, g))


@functools.cache
def slow_result(variant):
    """``(y, dx, dw)`` of ``sample(variant)`` in float64, by the slow reference."""
    spec, grid, prefix, _ = VARIANTS[variant]
    x, kernel, g = (np.asarray(a, np.float64) for a in sample(variant)[1:])
    flat_x, flat_g = (a.reshape(len(a), -1, a.shape[-1]) for a in (x, g))
    dx, dw = reference.gradients(flat_x, kernel, flat_g, spec, grid, prefix)
    return x @ kernel, dx.reshape(x.shape), dw


def value_and_gradients(operation, x, kernel, g):
    y, pullback = jax.vjp(operation, x, kernel)
    return y, *pullback(g)


def jitted(operation, x, kernel, g):
    return jax.jit(functools.partial(value_and_gradients, operation))(x, kernel, g)


def assert_close(actual, expected, tolerance):
    """Each array to within ``tolerance`` times its largest value: sums of many terms err by the size of the terms."""
    for a, e in zip(actual, expected, strict=True):
        chex.assert_trees_all_close(a, e, rtol=0, atol=tolerance * float(np.abs(np.asarray(e, np.float64)).max()))
