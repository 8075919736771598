"""The GPU's layer norm kernels, interpreted on CPU, against float64; mapped, sharded, and in place of the plain form."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lbpwht_jax.ops.norms import layer_norm
from lbpwht_jax.ops.norms_gpu import backward_kernel, forward_kernel

EPSILON = 1e-3
SHAPES = [(2, 5, 16), (1, 70, 24), (3, 1, 40), (1, 5, 300), (2, 3, 512), (1, 6, 1100)]


def sample(shape):
    rng = np.random.default_rng(0)
    x, g = rng.normal(1, 2, shape), rng.normal(size=shape)
    codes, steps = rng.integers(0, 255, shape, np.uint8), rng.uniform(0.01, 0.03, (*shape[:2], 1))
    inverse = rng.uniform(0.3, 0.6, (*shape[:2], 1))
    return x, g, codes, steps, inverse, rng.normal(size=shape[-1]), rng.normal(size=shape[-1])


def float32(*arrays):
    return [jnp.asarray(array, array.dtype if array.dtype == np.uint8 else jnp.float32) for array in arrays]


def slow_forward(x, scale, bias):
    inverse = 1 / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    normalised = (x - x.mean(-1, keepdims=True)) * inverse
    return normalised * scale + bias, normalised, inverse


def slow_backward(codes, steps, inverse, scale, g):
    normalised = (codes.astype(np.float64) - 127) * steps
    of_normalised = g * scale
    mean = of_normalised.mean(-1, keepdims=True)
    dx = (of_normalised - mean - normalised * (of_normalised * normalised).mean(-1, keepdims=True)) * inverse
    return dx, (g * normalised).sum((0, 1)), g.sum((0, 1))


def check_forward(results, x, scale, bias):
    y, codes, steps, inverse = (np.asarray(a, np.float64) for a in results)
    expected, normalised, exact_inverse = slow_forward(x, scale, bias)
    # float32 sums of up to 1,100 terms, and the variance as a difference of squares
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(inverse, exact_inverse, rtol=1e-5)
    np.testing.assert_allclose(steps, np.abs(normalised).max(-1, keepdims=True) / 127, rtol=1e-4)
    assert np.all(np.abs((codes - 127) * steps - normalised) < 0.501 * steps)


def check_backward(results, expected):
    dx, sums = (np.asarray(a, np.float64) for a in results)
    of_scale, of_bias = sums.sum((0, 1))
    for actual, wanted in zip((dx, of_scale, of_bias), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_slow_reference(shape):
    x, g, codes, steps, inverse, scale, bias = sample(shape)
    check_forward(forward_kernel(EPSILON, interpret=True)(*float32(x, scale, bias)), x, scale, bias)
    operands = codes, steps, inverse, scale, g
    check_backward(backward_kernel(interpret=True)(*float32(*operands)), slow_backward(*operands))


def test_a_row_of_zeros():
    x = jnp.zeros((1, 2, 16))
    y, codes, steps, _ = forward_kernel(EPSILON, interpret=True)(x, jnp.ones(16), jnp.ones(16))
    chex.assert_trees_all_equal((y, codes, steps), (jnp.ones_like(y), jnp.full_like(codes, 127), jnp.zeros_like(steps)))


def test_sharded_along_the_batch_nothing_is_gathered():
    x, g, codes, steps, inverse, scale, bias = sample((4, 5, 16))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def put(*arrays):
        return [jax.device_put(a, NamedSharding(mesh, P("data") if a.ndim == 3 else P())) for a in float32(*arrays)]

    for kernel, operands in (
        (forward_kernel(EPSILON, interpret=True), put(x, scale, bias)),
        (backward_kernel(interpret=True), put(codes, steps, inverse, scale, g)),
    ):
        program = jax.jit(kernel).lower(*operands).compile()
        assert "all-gather" not in program.as_text()
        results = program(*operands)
        assert results[0].sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 3)
        if len(operands) == 3:
            check_forward(results, x, scale, bias)
        else:
            check_backward(results, slow_backward(codes, steps, inverse, scale, g))


def test_vmap_with_one_scale_and_with_one_each():
    x, *_, scale, bias = sample((4, 5, 16))
    run = forward_kernel(EPSILON, interpret=True)
    x, scale, bias = float32(x.reshape(2, 2, 5, 16), scale, bias)
    mapped = jax.vmap(run, (0, None, None))(x, scale, bias)
    each = jax.vmap(run)(x, jnp.stack([scale, 2 * scale]), jnp.stack([bias, bias]))
    for k in range(2):
        chex.assert_trees_all_close([a[k] for a in mapped], list(run(x[k], scale, bias)), atol=1e-6)
        chex.assert_trees_all_close([a[k] for a in each], list(run(x[k], (k + 1) * scale, bias)), atol=1e-6)


def test_on_a_cpu_narrow_rows_have_the_gradients_of_wide_ones():
    x, g, *_, scale, bias = sample((2, 5, 16))

    def gradients(dtype, bits):
        def of(x, scale, bias):
            return layer_norm(x, scale, bias, EPSILON, bits, dtype)

        operands = jnp.asarray(x, dtype), *float32(scale, bias)
        return jax.vjp(of, *operands)[1](jnp.asarray(g, dtype))

    for narrow, wide in zip(gradients(jnp.bfloat16, 8), gradients(jnp.float32, None), strict=True):
        narrow, wide = (np.asarray(a, np.float64) for a in (narrow, wide))
        # bfloat16's 8 bits of x and g, and the codes' 8
        assert np.abs(narrow - wide).max() < 0.02 * np.abs(wide).max()


@pytest.mark.usefixtures("absent_gpu")
def test_a_gpu_gets_the_kernels():
    def loss(x, scale, bias):
        return layer_norm(x, scale, bias, EPSILON, 8, jnp.bfloat16).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((2, 5, 16), jnp.bfloat16), *[((16,), jnp.float32)] * 2)]
    program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r'name = "(layer_norm_[a-z]+)_5x16"', program) == ["layer_norm_forward", "layer_norm_backward"]
