"""Convolutions against sums over windows in NumPy, in float64, in every form that CPUs have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax.ops.convolution import ConvProduct, convolution

CASES = {
    "depthwise": ((2, 5, 6, 4), (3, 3, 1, 4), (1, 1), ((1, 1), (1, 1)), 4),
    "depthwise, stride 2": ((2, 5, 6, 4), (3, 3, 1, 4), (2, 2), ((1, 1), (1, 1)), 4),
    "depthwise, wide": ((1, 4, 5, 3), (7, 5, 1, 3), (1, 1), ((3, 3), (2, 2)), 3),
    "depthwise, much padding": ((1, 4, 4, 3), (3, 3, 1, 3), (1, 1), ((3, 4), (0, 1)), 3),
    "grouped": ((2, 4, 4, 4), (3, 3, 2, 6), (1, 1), ((1, 1), (1, 1)), 2),
    "patches": ((2, 6, 4, 3), (3, 2, 3, 5), (3, 2), ((0, 0), (0, 0)), 1),
    "patches that leave a rest": ((2, 7, 4, 3), (3, 2, 3, 5), (3, 2), ((0, 0), (0, 0)), 1),
    "stride 2": ((2, 6, 8, 5), (3, 3, 5, 7), (2, 2), ((1, 1), (1, 1)), 1),
    "stride 2, odd": ((2, 7, 8, 5), (3, 3, 5, 7), (2, 2), ((1, 1), (1, 1)), 1),
    "strides 3 and 2": ((3, 9, 8, 2), (5, 3, 2, 3), (3, 2), ((2, 1), (0, 1)), 1),
    "no images": ((0, 6, 8, 5), (3, 3, 5, 7), (2, 2), ((1, 1), (1, 1)), 1),
    "many inputs": ((4, 5, 4, 64), (3, 3, 64, 3), (1, 1), ((1, 1), (1, 1)), 1),
    "colours": ((2, 6, 6, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1)), 1),
}


def reference(x, kernel, g, strides, padding, groups):
    """The result and both gradients, by the definition."""
    x, kernel, g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    _, rows, columns, outputs = g.shape
    y, dx, dkernel = np.zeros_like(g), np.zeros_like(padded), np.zeros_like(kernel)
    per_input, per_output = x.shape[3] // groups, outputs // groups
    for i, j, group in np.ndindex(*kernel.shape[:2], groups):
        at = (
            slice(None),
            slice(i, i + (rows - 1) * strides[0] + 1, strides[0]),
            slice(j, j + (columns - 1) * strides[1] + 1, strides[1]),
            slice(group * per_input, (group + 1) * per_input),
        )
        out = slice(group * per_output, (group + 1) * per_output)
        y[..., out] += padded[at] @ kernel[i, j][:, out]
        dx[at] += g[..., out] @ kernel[i, j][:, out].T
        dkernel[i, j][:, out] += np.einsum("bhwc,bhwd->cd", padded[at], g[..., out])
    (top, _), (left, _) = padding
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def operands(x, kernel, strides, padding, dtype):
    rng = np.random.default_rng(0)
    sizes = [(n + sum(p) - k) // s + 1 for n, k, s, p in zip(x[1:3], kernel, strides, padding, strict=False)]
    shapes = (x, kernel, (x[0], *sizes, kernel[3]))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_result_and_gradients(case, dtype):
    shape, window, strides, padding, groups = case
    with jax.enable_x64(dtype == jnp.float64):
        x, kernel, g = operands(shape, window, strides, padding, dtype)

        def run(x, kernel, g):
            y, back = jax.vjp(lambda x, kernel: convolution(x, kernel, strides, padding, groups), x, kernel)
            return y, *back(g)

        results = jax.jit(run)(x, kernel, g)
    # roundings of the operands' dtype, of which a sum here has up to some hundred
    tolerance = {jnp.float64: 1e-12, jnp.float32: 2e-5, jnp.bfloat16: 5e-2}[dtype]
    for result, exact, like in zip(results, reference(x, kernel, g, strides, padding, groups), (g, x, kernel), strict=True):
        assert result.dtype == like.dtype and result.shape == like.shape
        largest = abs(exact).max(initial=0)
        np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("name", ["depthwise", "patches", "stride 2"])
def test_transformations(name):
    """Mapping, recomputing and looping give what calls one by one give."""
    x, kernel, strides, padding, groups = CASES[name]
    x, kernel, g = operands(x, kernel, strides, padding, jnp.float32)

    def loss(x, kernel):
        return jnp.sum(convolution(x, kernel, strides, padding, groups) * g)

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    xs, kernels = (jnp.stack([a, 2 * a]) for a in (x, kernel))
    singly = [gradients(*each) for each in zip(xs, kernels, strict=True)]
    mapped = jax.jit(jax.vmap(gradients))(xs, kernels)
    looped = jax.lax.scan(lambda _, each: (None, jax.grad(jax.checkpoint(loss), (0, 1))(*each)), None, (xs, kernels))[1]
    for results in (mapped, looped):
        for k in range(2):
            for result, wanted in zip(results, singly[k], strict=True):
                np.testing.assert_allclose(result[k], wanted, rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("name", ["depthwise", "patches", "stride 2"])
def test_batches_split_over_devices(name):
    """The result stays split, and the kernel's gradient is the sum over the devices."""
    x, kernel, strides, padding, groups = CASES[name]
    x, kernel, g = operands((4, *x[1:]), kernel, strides, padding, jnp.float32)

    def run(x, kernel, g):
        y, back = jax.vjp(lambda x, kernel: convolution(x, kernel, strides, padding, groups), x, kernel)
        return y, *back(g)

    wanted = jax.jit(run)(x, kernel, g)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split, whole = jax.P("batch"), jax.P()
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(split, whole, split), out_specs=(split, split, whole)))
    for result, like in zip(mapped(x, kernel, g), wanted, strict=True):
        np.testing.assert_allclose(result, like, rtol=1e-5, atol=1e-5)  # sums in another order


def test_keeps_no_more_than_its_operands():
    x, kernel, strides, padding, groups = CASES["depthwise"]
    x, kernel, _ = operands(x, kernel, strides, padding, jnp.float32)

    def kept(argument):
        def product(*perturbed):
            given = [x, kernel]
            for at, value in zip(argument, perturbed, strict=True):
                given[at] = value
            return convolution(given[0], given[1], strides, padding, groups)

        primals = [(x, kernel)[at] for at in argument]
        residuals = jax.eval_shape(lambda *p: jax.vjp(product, *p)[1], *primals)
        return sorted(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept((0, 1)) == sorted([x.size, kernel.size])
    assert x.size not in kept((0,))  # nothing trains the kernel


def test_refuses_complex_numbers():
    x, kernel = jnp.zeros((1, 4, 4, 2), jnp.complex64), jnp.zeros((3, 3, 2, 2), jnp.complex64)
    with pytest.raises(TypeError, match="must be floating point, got complex64 and complex64; give the layer lax"):
        ConvProduct(8)(x, kernel, (1, 1), ((1, 1), (1, 1)))


def test_refuses_dilation():
    x, kernel = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2))
    with pytest.raises(ValueError, match="dilated"):
        ConvProduct()(x, kernel, (1, 1), ((1, 1), (1, 1)), (1, 1), (2, 2))
