"""Norms that keep one array, against Flax's and JAX's own derivatives; in few bits, how far they are off."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lbpwht_jax.ops.coders import Rows
from lbpwht_jax.ops.norms import batch_norm, layer_norm

ACTIVATIONS = {None: lambda x: x, "gelu": lambda x: jax.nn.gelu(x, approximate=False), "relu": jax.nn.relu}
# share of the gradient that rounding to so many bits may turn away: 1 - cosine
TURNED = {None: 1e-6, 8: 3e-4, 4: 3e-2}


def arrays():
    rng = np.random.default_rng(0)
    return [jnp.asarray(a, jnp.float32) for a in (2 + 3 * rng.normal(size=(4, 6, 32)), *rng.normal(size=(2, 32)))]


def weights():
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 32)), jnp.float32)


def compare(function, reference, bits):
    operands = arrays()
    chex.assert_trees_all_close(jax.jit(function)(*operands), reference(*operands), atol=3e-5)

    def gradients(function):
        return jax.jit(jax.grad(lambda *a: jnp.sum(weights() * function(*a)), (0, 1, 2)))(*operands)

    found, wanted = gradients(function), gradients(reference)
    for own, exact in zip(found, wanted, strict=True):
        cosine = jnp.vdot(own, exact) / (jnp.linalg.norm(own) * jnp.linalg.norm(exact))
        assert cosine > 1 - TURNED[bits]
        np.testing.assert_allclose(jnp.linalg.norm(own), jnp.linalg.norm(exact), rtol=2 * TURNED[bits] ** 0.5)
        if bits is None:
            chex.assert_trees_all_close(own, exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", TURNED)
def test_layer_norm(bits):
    def reference(x, scale, bias):
        return nn.LayerNorm(epsilon=1e-6).apply({"params": {"scale": scale, "bias": bias}}, x)

    compare(lambda x, scale, bias: layer_norm(x, scale, bias, 1e-6, bits, jnp.float32), reference, bits)


@pytest.mark.parametrize("bits", TURNED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("running", [False, True])
def test_batch_norm(running, activation, bits):
    statistics = {"mean": jnp.full(32, 1.5), "var": jnp.full(32, 8.0)}

    def reference(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
        y, _ = nn.BatchNorm(running, epsilon=1e-5).apply(variables, x, mutable=["batch_stats"])
        return ACTIVATIONS[activation](y)

    def function(x, scale, bias):
        known = (statistics["mean"], statistics["var"]) if running else None
        return batch_norm(x, known, scale, bias, 1e-5, bits, jnp.float32, activation)[0]

    compare(function, reference, bits)


def test_statistics_are_the_batch_s():
    x, scale, bias = arrays()
    _, (mean, variance) = batch_norm(x, None, scale, bias, 1e-5, 8, jnp.float32)
    flat = np.asarray(x, np.float64).reshape(-1, 32)
    np.testing.assert_allclose(mean, flat.mean(0), atol=1e-5)
    np.testing.assert_allclose(variance, flat.var(0), rtol=1e-5)


def kept(function, *operands):
    return [leaf for leaf in jax.tree.leaves(jax.vjp(function, *operands)[1]) if leaf.size >= operands[0].size]


def test_one_array_is_kept():
    x, scale, bias = arrays()
    for bits, dtype in ((None, jnp.float32), (8, jnp.uint8)):
        (own,) = kept(lambda *a, bits=bits: layer_norm(*a, 1e-6, bits, jnp.float32), x, scale, bias)
        chex.assert_shape(own, x.shape)
        chex.assert_type(own, dtype)


def test_nothing_is_kept_of_a_constant_affine_map_for_x_alone():
    x, scale, bias = arrays()
    statistics = (jnp.zeros(32), jnp.ones(32))
    assert not kept(lambda x: batch_norm(x, statistics, scale, bias, 1e-5, 8, jnp.float32)[0], x)


@pytest.mark.parametrize("bits", (None, 8))
def test_transformations(bits):
    x, scale, bias = arrays()

    def gradient(x, scale, bias):
        return jax.grad(lambda *a: jnp.sum(layer_norm(*a, 1e-6, bits, jnp.float32) ** 3), (0, 1, 2))(x, scale, bias)

    expected = jax.jit(gradient)(x, scale, bias)
    mapped = jax.jit(jax.vmap(gradient, (0, None, None)))(x, scale, bias)
    chex.assert_trees_all_close(mapped[0], expected[0], atol=1e-3, rtol=1e-4)  # sums in another order
    for own, whole in zip(mapped[1:], expected[1:], strict=True):
        chex.assert_trees_all_close(own.sum(0), whole, atol=1e-2, rtol=1e-4)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(P("batch"), P(), P()), out_specs=(P("batch"), P(), P())))
    chex.assert_trees_all_close(sharded(x, scale, bias), expected, atol=1e-2, rtol=1e-4)
    chex.assert_trees_all_close(jax.jit(jax.checkpoint(gradient))(x, scale, bias), expected, atol=1e-3, rtol=1e-4)


def test_bfloat16_and_float64():
    x, scale, bias = arrays()
    own = jax.grad(lambda x: jnp.sum(layer_norm(x, scale, bias, 1e-6, 8, jnp.bfloat16).astype(jnp.float32)))(
        x.astype(jnp.bfloat16)
    )
    chex.assert_type(own, jnp.bfloat16)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (x, scale, bias)]
        assert layer_norm(*wide, 1e-6, None, jnp.float64).dtype == jnp.float64


def test_what_is_no_number_stays_none():
    x, scale, bias = arrays()
    x = x.at[0, 0, 0].set(jnp.nan)
    own = jax.grad(lambda x: jnp.sum(layer_norm(x, scale, bias, 1e-6, 8, jnp.float32)))(x)
    assert jnp.isnan(own[0, 0]).all() and jnp.isfinite(own[1:]).all()
    assert jnp.isnan(Rows.of(x, 8).decoded()[0, 0]).all()
