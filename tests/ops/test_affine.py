"""Affine maps of the channels, alone and as one with a product, against the same in steps; and what they keep and compute."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from operation import VARIANTS, assert_close, sample

from lbpwht_jax import LowRankDense, low_rank_matmul, lp_l1
from lbpwht_jax.ops.affine import Affine, apply
from lbpwht_jax.ops.affine_product import affine_product
from lbpwht_jax.ops.convolution import Convolution
from lbpwht_jax.ops.exact import ExactProduct
from lbpwht_jax.ops.flops import product_flops

ACTIVATIONS = {None: lambda x: x, "gelu": lambda x: jax.nn.gelu(x, approximate=False), "relu": jax.nn.relu}
CHANNELS = 5
# share of the gradient that rounding to so many bits may turn away: 1 - cosine
TURNED = {None: 1e-6, 8: 3e-4, 4: 1e-1}  # few channels share a scale


def affine(bits=None, activation=None, dtype=jnp.float32):
    """One with a factor of zero, as a pruned channel has."""
    rng = np.random.default_rng(3)
    mean, scale, bias = (jnp.asarray(rng.normal(size=CHANNELS), dtype) for _ in range(3))
    inverse = jnp.asarray(rng.uniform(0.5, 2, CHANNELS), dtype)
    return Affine(mean, inverse, scale.at[0].set(0), bias, bits, activation, jnp.dtype(dtype))


def in_steps(x, affine):
    x = (x - affine.mean[None]) * affine.inverse[None] * affine.scale[None] + affine.bias[None]
    return ACTIVATIONS[affine.activation](x)


def flat(function):
    """A function of x, ``[..., in]``, on rows, for strict rank promotion."""
    return lambda x, *rest: function(x.reshape(-1, x.shape[-1]), *rest).reshape(*x.shape[:-1], -1)


def gradients(function, *operands):
    weights = np.random.default_rng(4).normal(size=jax.eval_shape(function, *operands).shape)

    def loss(*operands):
        return jnp.sum(function(*operands) * jnp.asarray(weights, jnp.float32))

    found = jax.jit(jax.value_and_grad(loss, tuple(range(len(operands)))))(*operands)
    return [leaf for tree in found[1] for leaf in (jax.tree.leaves(parameters(tree)) if isinstance(tree, Affine) else [tree])]


def parameters(affine):
    return affine.mean, affine.scale, affine.bias


def assert_alike(own, exact, bits):
    for a, e in zip(own, exact, strict=True):
        chex.assert_equal_shape((a, e))
        cosine = jnp.vdot(a, e) / (jnp.linalg.norm(a) * jnp.linalg.norm(e))
        assert cosine > 1 - TURNED[bits]
    if bits is None:
        assert_close(own, exact, 1e-5)


def image(inputs=4):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(8, 6, 6, inputs)), jnp.float32)


@pytest.mark.parametrize("bits", TURNED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_alone(activation, bits):
    x = image(CHANNELS)
    own = affine(bits, activation)
    assert_close([jax.jit(apply)(x, own)], [flat(in_steps)(x, own)], 1e-6)
    assert_alike(gradients(apply, x, own), gradients(flat(in_steps), x, own), bits)


PRODUCTS = {
    "dense": (ExactProduct(None), (4, CHANNELS), 4),
    "conv": (Convolution((2, 2), ((1, 1), (1, 1))), (3, 3, 4, CHANNELS), 4),
    "depthwise": (Convolution((1, 1), ((1, 1), (1, 1)), CHANNELS), (3, 3, 1, CHANNELS), CHANNELS),
}


def operands(name):
    product, shape, inputs = PRODUCTS[name]
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    return product, image(inputs), kernel


@pytest.mark.parametrize("bits", TURNED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_behind_a_product(name, activation, bits):
    product, x, kernel = operands(name)
    own = affine(bits, activation)

    def joined(x, kernel, affine):
        return affine_product(product, x, kernel, affine, bits)

    def apart(x, kernel, affine):
        return flat(in_steps)(product(x, kernel), affine)

    assert_close([jax.jit(joined)(x, kernel, own)], [apart(x, kernel, own)], 1e-5)
    assert_alike(gradients(joined, x, kernel, own), gradients(apart, x, kernel, own), bits)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_behind_a_product_with_a_frozen_kernel(name, activation):
    product, x, kernel = operands(name)
    own = affine(None, activation)

    def joined(x, affine):
        return affine_product(product, x, kernel, affine)

    def apart(x, affine):
        return flat(in_steps)(product(x, kernel), affine)

    assert_alike(gradients(joined, x, own), gradients(apart, x, own), None)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_frozen_kernel_costs_no_product(activation):
    product, x, kernel = operands("dense")
    own = affine(None, activation)

    def loss(affine, kernel):
        return jnp.sum(affine_product(product, x, kernel, affine) ** 2)

    one = 2 * x.size * CHANNELS
    assert product_flops(jax.grad(loss), own, kernel) == one
    assert product_flops(jax.grad(loss, (0, 1)), own, kernel) == 2 * one


@pytest.mark.parametrize("activation", (None, "gelu"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_behind_a_low_rank_product(variant, activation):
    operation, x, kernel, _ = sample(variant, batch=(2,))
    own, bias = affine(None, activation), jnp.asarray(np.random.default_rng(5).normal(size=CHANNELS), jnp.float32)

    def joined(x, kernel, bias, affine):
        return operation(x, kernel, bias=bias, affine=affine)

    def apart(x, kernel, bias, affine):
        return flat(in_steps)(operation(x, kernel, bias=bias), affine)

    assert_close([jax.jit(joined)(x, kernel, bias, own)], [apart(x, kernel, bias, own)], 1e-5)
    # sums of up to 1300 terms, from coefficients or not
    assert_close(gradients(joined, x, kernel, bias, own), gradients(apart, x, kernel, bias, own), 3e-5)


def test_little_is_kept():
    product, x, kernel = operands("dense")

    def kept(function, *operands):
        return [leaf.size for leaf in jax.tree.leaves(jax.vjp(function, *operands)[1]) if leaf.size > kernel.size]

    rows = x.size // x.shape[-1]
    assert kept(functools.partial(affine_product, product), x, kernel, affine()) == [x.size]
    with_gelu = kept(functools.partial(affine_product, product), x, kernel, affine(None, "gelu"))
    assert sorted(with_gelu) == sorted([x.size, rows * CHANNELS])
    assert kept(functools.partial(apply, affine=affine()), image(CHANNELS)) == []
    low_rank = functools.partial(low_rank_matmul, spec=lp_l1(2))
    assert sorted(kept(lambda x, k, a: low_rank(x, k, affine=a), x, kernel, affine())) == sorted(
        [8 * 3 * x.shape[-1], rows * CHANNELS]
    )


@pytest.mark.parametrize("spec", (None, lp_l1(3)), ids=("exact", "low-rank"))
@pytest.mark.parametrize("frozen", (False, True))
def test_transformations(spec, frozen):
    x, own = image(), affine(None, "gelu")
    layer = LowRankDense(CHANNELS, spec=spec)
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def gradient(x, params, affine):
        def loss(x, affine, params):
            return jnp.sum(layer.apply(params, x, affine=affine) ** 3)

        return jax.grad(loss, (0, 1) if frozen else (0, 1, 2))(x, affine, params)

    def parts(found):
        return [found[0], *parameters(found[1]), *jax.tree.leaves(found[2:])]

    expected = parts(jax.jit(gradient)(x, params, own))
    assert_close(parts(jax.jit(jax.checkpoint(gradient))(x, params, own)), expected, 1e-5)
    each = parts(jax.jit(jax.vmap(gradient, (0, None, None)))(x[:, None], params, own))
    assert_close([each[0][:, 0], *(a.sum(0) for a in each[1:])], expected, 1e-4)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("batch"), P(), P()), "out_specs": (P("batch"), P()) if frozen else (P("batch"), P(), P())}
    assert_close(parts(jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(x, params, own)), expected, 1e-4)

    def summed(carry, x):
        found = parts(gradient(x[None], params, own))
        return [a + b for a, b in zip(carry, found[1:], strict=True)], found[0][0]

    zeros = [jnp.zeros_like(a) for a in expected[1:]]
    sums, dx = jax.jit(lambda x: jax.lax.scan(summed, zeros, x))(x)
    assert_close([dx, *sums], expected, 1e-4)


@pytest.mark.parametrize("spec", (None, lp_l1(3)), ids=("exact", "low-rank"))
def test_meshes_with_explicit_axes(spec):
    x, own = image(), affine(None, "gelu")
    layer = LowRankDense(CHANNELS, spec=spec)
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def gradient(x, params, affine):
        return jax.grad(lambda x, p, a: jnp.sum(layer.apply(p, x, affine=a) ** 2), (0, 1, 2))(x, params, affine)

    expected = jax.jit(gradient)(x, params, own)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        found = jax.jit(gradient)(jax.device_put(x, P("batch")), *jax.device_put((params, own), P()))
    found, expected = ([t[0], *jax.tree.leaves(t[1]), *parameters(t[2])] for t in (found, expected))
    assert_close([np.asarray(a) for a in found], expected, 1e-4)


def test_narrow_and_wide_dtypes():
    x = image(CHANNELS)
    own = affine(8, "gelu", jnp.bfloat16)
    result = apply(x.astype(jnp.bfloat16), own)
    chex.assert_type(result, jnp.bfloat16)
    with jax.enable_x64(True):
        wide = affine(None, "gelu", jnp.float64)
        x = jnp.asarray(x, jnp.float64)
        kernel = jnp.asarray(np.random.default_rng(1).normal(size=(CHANNELS, CHANNELS)), jnp.float64)
        y = affine_product(ExactProduct(None), x, kernel, wide)
        chex.assert_type(y, jnp.float64)
        np.testing.assert_allclose(y, flat(in_steps)(x @ kernel, wide), rtol=1e-12, atol=1e-12)


def test_a_bias_and_factors_may_come_first():
    x, own = image(CHANNELS), affine()
    ahead, factor = own.bias * 2, own.inverse
    expected = flat(in_steps)(x + ahead.reshape(1, 1, 1, -1), own) * factor.reshape(1, 1, 1, -1)
    assert_close([apply(x, own.after(ahead).scaled(factor))], [expected], 1e-6)
    assert dataclasses.replace(own, bits=8).after(ahead).bits == 8


@pytest.mark.parametrize("spec", (None, lp_l1(2)), ids=("exact", "low-rank"))
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": jnp.ones(3)}, r"affine.scale must be \[5\], .* got \[3\]"),
        ({"bias": jnp.ones(CHANNELS, jnp.bfloat16)}, r"affine.bias must be .* got \[5\] of bfloat16"),
        ({"activation": "swish"}, "affine.activation must be 'gelu', 'relu' or None, got 'swish'"),
        ({"bits": 2}, "affine.bits must be 4, 8 or None, got 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_map_is_an_error_by_the_layers_name(spec, wrong, message):
    layer = LowRankDense(CHANNELS, spec=spec)
    with pytest.raises(ValueError, match=r"LowRankDense \(top level\): " + message):
        layer.init(jax.random.key(0), image(), affine=dataclasses.replace(affine(), **wrong))


def test_something_else_than_a_map_is_an_error():
    layer = LowRankDense(CHANNELS, spec=lp_l1(2))
    with pytest.raises(TypeError, match=r"affine must be a lbpwht_jax\.ops\.Affine"):
        layer.init(jax.random.key(0), image(), affine=jnp.ones(CHANNELS))
