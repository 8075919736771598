"""Functions computed again, products that keep rounded operands, and GELU's coded slope: cotangents, and what is kept."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from transformations import compiled_gradients

from lbpwht_jax import LowRankDense, low_rank_matmul, lp_l1
from lbpwht_jax.ops.bilinear import bilinear
from lbpwht_jax.ops.gelu import coded_gelu, gelu
from lbpwht_jax.ops.recompute import recomputed


def sample(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def scores(query, key, scale):
    return jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", query, key) * scale)


def residuals(function, *operands):
    return jax.tree.leaves(jax.vjp(function, *operands)[1])


def test_recomputed_is_the_function():
    operands = sample(2, 5, 16), sample(2, 7, 16), jnp.float32(0.3)

    def again(*operands):
        return recomputed(scores, *operands, bits=(None, None, None))

    chex.assert_trees_all_equal(again(*operands), scores(*operands))
    check_grads(again, operands, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)  # differences in float32
    expected = jax.grad(lambda *a: jnp.sum(scores(*a) ** 2), (0, 1, 2))(*operands)
    chex.assert_trees_all_close(jax.grad(lambda *a: jnp.sum(again(*a) ** 2), (0, 1, 2))(*operands), expected, atol=1e-6)
    assert not [kept for kept in residuals(again, *operands) if kept.shape == (2, 5, 7)]


def test_recomputed_from_rounded_operands():
    """The cotangents are those of the function at the rounded operands, exactly."""
    operands = sample(2, 5, 16), sample(2, 7, 16), jnp.float32(0.3)
    g = sample(2, 5, 7)
    _, pull = jax.vjp(lambda *a: recomputed(scores, *a, bits=(8, 4, None)), *operands)
    steps = [np.abs(np.asarray(a)).max(-1, keepdims=True) / most for a, most in zip(operands[:2], (127, 7), strict=True)]
    rounded = [jnp.asarray(np.round(np.asarray(a) / step) * step) for a, step in zip(operands[:2], steps, strict=True)]
    expected = jax.vjp(scores, *rounded, operands[2])[1](g)
    chex.assert_trees_all_close(pull(g), expected, atol=1e-5)
    assert {kept.dtype for kept in residuals(lambda *a: recomputed(scores, *a, bits=(8, 8, None)), *operands)} == {
        jnp.dtype(jnp.uint8),
        jnp.dtype(jnp.float32),
    }


def test_bilinear_keeps_what_is_wanted():
    x, weights = sample(3, 6, 32), sample(32, 16)

    def product(x, weights):
        return bilinear(jnp.matmul, x, weights, bits=8)

    g = sample(3, 6, 16)
    dx, dweights = jax.vjp(product, x, weights)[1](g)
    exact = jax.vjp(jnp.matmul, x, weights)[1](g)
    chex.assert_trees_all_close(dx, exact[0], atol=1e-5)
    cosine = jnp.vdot(dweights, exact[1]) / (jnp.linalg.norm(dweights) * jnp.linalg.norm(exact[1]))
    assert 1 - 1e-4 < cosine < 1 - 1e-7
    assert not [kept for kept in residuals(lambda x: product(x, weights), x) if kept.dtype == jnp.uint8]
    kept = residuals(lambda weights: product(x, weights), weights)
    assert [leaf.shape for leaf in kept if leaf.dtype == jnp.uint8] == [x.shape]
    assert x.shape not in [leaf.shape for leaf in kept if leaf.dtype == jnp.float32]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_coded_gelu(bits):
    x = sample(4, 30)
    chex.assert_trees_all_equal(coded_gelu(x, bits), gelu(x))
    slope, exact = (jax.vmap(jax.vmap(jax.grad(f)))(x) for f in (lambda v: coded_gelu(v[None], bits)[0], gelu))
    assert jnp.sqrt(jnp.mean((slope - exact) ** 2)) < {2: 0.1, 3: 0.05, 4: 0.025, 8: 0.002}[bits]
    sizes = [kept.size for kept in residuals(lambda x: coded_gelu(x, bits), x)]
    assert sum(sizes) <= 4 * -(-30 // (8 // bits)) + (4 * 8 if bits == 3 else 0)


@pytest.mark.parametrize("spec", [None, lp_l1(2, block=4)])
def test_bits_that_there_are_not(spec):
    for field, there_are in (("slope_bits", "2, 3, 4, 8"), ("input_bits", "4, 8")):
        layer = LowRankDense(16, spec=spec, grid=(4, 4), activation="gelu", **{field: 5})
        with pytest.raises(ValueError, match=rf"LowRankDense .top level.: {field} must be {there_are} or None, got 5"):
            layer.init(jax.random.key(0), sample(2, 16, 24))


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("when", ["always", "faster"])
def test_matmul_keeps_a_coded_slope(bits, when):
    x, kernel, bias = sample(2, 17, 24), sample(24, 16), sample(16)
    spec = lp_l1(2, block=4) if when == "always" else lp_l1(4, block=4, when="faster")

    def layer(x, kernel, bias, slope_bits=bits):
        return low_rank_matmul(x, kernel, spec, (4, 4), 1, bias=bias, activation="gelu", slope_bits=slope_bits)

    g = sample(2, 17, 16)
    own, exact = (compiled_gradients(lambda *a, b=b: layer(*a, b), (x, kernel, bias), g) for b in (bits, None))
    chex.assert_trees_all_close(own[0], exact[0], atol=1e-6)
    chex.assert_trees_all_close(own[2:], exact[2:], atol=1e-5)  # the slope reaches x alone
    cosine = jnp.vdot(own[1], exact[1]) / (jnp.linalg.norm(own[1]) * jnp.linalg.norm(exact[1]))
    assert cosine > {2: 0.97, 8: 0.9999}[bits]
    assert jnp.dtype(jnp.uint8) in [kept.dtype for kept in residuals(layer, x, kernel, bias)]
