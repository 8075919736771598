import functools
import json
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from operation import VARIANTS, assert_close, jitted, sample, value_and_gradients

from lbpwht_jax import low_rank_matmul, lp_l1, lp_linf
from lbpwht_jax.ops.basis import coefficient_count

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "golden" / "official_lbp_wht.npz")
CASES = json.loads(str(GOLDEN["meta"]))
FULL_RANK_GRIDS = [(7, 7), (14, 14), (12, 9), (5, 3), (3, 3), (1, 1), (56, 56), (100,), (4, 7, 7)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['index']}-{case['kind']}-{case['h']}x{case['w']}-r{case['r']}")
def test_official_reproduces_the_authors_numbers(case):
    get = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN if key.startswith(f"{case['index']:02d}/")}
    assert case.get("bias", True) == ("bias" in get)
    bias = get.get("bias", np.zeros(case["co"], np.float32))
    grid = {"grid": (case["h"], case["w"]), "prefix_tokens": case.get("extra", 0)} if case["kind"] == "linear" else {}

    @jax.jit
    def layer(x, kernel, bias, g):
        def forward(x, kernel, bias):
            y = low_rank_matmul(x, kernel, lp_l1(case["r"], projection="official"), **grid)
            return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

        y, pullback = jax.vjp(forward, x, kernel, bias)
        return dict(zip(("y", "grad_x", "grad_kernel", "grad_bias"), (y, *pullback(g)), strict=True))

    actual = layer(get["x"], get["kernel"], bias, get["g"])
    names = sorted(actual.keys() & get.keys())
    assert {"y", "grad_x", "grad_kernel"} <= set(names)
    # float32 on both sides, summed in another order
    assert_close([actual[name] for name in names], [get[name] for name in names], 1e-5)


@pytest.mark.parametrize("grid", FULL_RANK_GRIDS, ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_fitted_is_exact_when_every_function_is_kept(grid, prefix):
    rng = np.random.default_rng(1)
    tokens = prefix + math.prod(grid)
    x, g, kernel = (rng.normal(size=shape) for shape in ((2, tokens, 6), (2, tokens, 5), (6, 5)))
    operation = functools.partial(low_rank_matmul, spec=lp_linf(8, len(grid)), grid=grid, prefix_tokens=prefix)
    exact = x @ kernel, g @ kernel.T, np.einsum("bti,bto->io", x, g)
    # float32 transforms there and back, and sums over up to 2 x 3138 terms
    assert_close(jitted(operation, *(jnp.asarray(a, jnp.float32) for a in (x, kernel, g))), exact, 1e-5)


# Whatever the functions kept, an exact product is; and both are where every function is kept.
@pytest.mark.parametrize(
    ("spec", "argnum"),
    [(lp_linf(8), 0), (lp_linf(8), 1), (lp_l1(2, dx="exact"), 0), (lp_l1(2, dw="exact"), 1)],
    ids=["every-function-dx", "every-function-dw", "dx-exact", "dw-exact"],
)
def test_exact_directions_equal_finite_differences(spec, argnum):
    operands = [jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32) for shape in ((2, 16, 3), (3, 2))]

    @jax.jit
    def operation(array):
        return low_rank_matmul(*(array if n == argnum else operands[n] for n in range(2)), spec, (3, 5), 1)

    # linear in each operand, so that differences err by rounding alone, divided by the step
    chex.assert_numerical_grads(operation, (operands[argnum],), order=1, modes=("rev",), atol=1e-4, rtol=1e-2, eps=0.1)


@pytest.mark.parametrize("grid", [(7, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("r", [2, 4, 6, 8])
def test_fitted_errs_no_more_than_official_on_smooth_fields(grid, r):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    field = scipy.ndimage.gaussian_filter(rng.normal(size=(20, 4, *grid, 11)), sigma=(0, 0, 1.5, 1.5, 0))
    x, g = jnp.asarray(field[..., :6], jnp.float32), jnp.asarray(field[..., 6:], jnp.float32)

    def gradients(spec):
        run = functools.partial(value_and_gradients, functools.partial(low_rank_matmul, spec=spec))
        return jax.jit(jax.vmap(run, (0, None, 0)))(x, kernel, g)[1:]

    truth = np.asarray(g @ kernel.T), np.einsum("nbhwi,nbhwo->nio", x, g)
    errors = {}
    for projection in ("fitted", "official"):
        pairs = zip(gradients(lp_l1(r, projection=projection)), truth, strict=True)
        differences = [
            np.linalg.norm((a - t).reshape(20, -1), axis=1) / np.linalg.norm(t.reshape(20, -1), axis=1) for a, t in pairs
        ]
        errors[projection] = np.mean(differences, axis=1)
    assert (errors["fitted"] <= errors["official"]).all(), errors


@settings(max_examples=50)
@given(st.data())
def test_random_grids_blocks_selections_and_dtypes(data):
    ndim = data.draw(st.integers(1, 2))
    block = data.draw(st.sampled_from([2, 4, 8]))
    grid = data.draw(st.tuples(*[st.integers(1, 12)] * ndim))
    prefix = data.draw(st.integers(0, 2))
    r = data.draw(st.integers(1, block))
    fields = {"projection": data.draw(st.sampled_from(["fitted", "official"])), "block": block}
    for product in ("dx", "dw"):
        fields[product] = data.draw(st.sampled_from(["low_rank", "exact"]))
    spec = data.draw(st.sampled_from([lp_l1, lp_linf]))(r, ndim, **fields)
    # unit roundoffs times about ten for sums, coefficients and products rounded one after the other
    dtype, tolerance = data.draw(st.sampled_from([(jnp.float32, 2e-6), (jnp.bfloat16, 4e-2), (jnp.float16, 5e-3)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tokens = prefix + math.prod(grid)
    x, g, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, tokens, 4), (2, tokens, 3), (4, 3)))
    operation = functools.partial(low_rank_matmul, spec=spec, grid=grid, prefix_tokens=prefix)
    actual = jitted(operation, x, kernel, g)
    chex.assert_type(actual, dtype)
    wide = [np.asarray(a, np.float64) for a in (x, kernel, g)]
    assert_close(actual, (wide[0] @ wide[1], *reference.gradients(*wide, spec, grid, prefix)), tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_residuals_are_the_projected_x_and_the_kernel(variant):
    spec, grid, prefix, _ = VARIANTS[variant]
    operation, x, kernel, _ = sample(variant)

    @jax.jit
    def residuals(x, kernel):
        return jax.vjp(operation, x, kernel)[1]

    shapes = sorted((leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(residuals, x, kernel))), key=len)
    if spec.dw == "exact":
        kept = prefix + math.prod(grid)
    else:
        kept = prefix + coefficient_count(spec, grid)
        assert kept < prefix + math.prod(grid)
    assert shapes == [kernel.shape, (8, kept, 6)]


def test_the_compiled_backward_takes_no_array_as_large_as_the_dense_residual():
    x, kernel = jax.ShapeDtypeStruct((4, 49, 32), jnp.float32), jax.ShapeDtypeStruct((32, 16), jnp.float32)
    pullback = jax.eval_shape(
        lambda x, kernel: jax.vjp(lambda *a: low_rank_matmul(*a, lp_l1(4), (7, 7)), x, kernel)[1], x, kernel
    )
    g = jax.ShapeDtypeStruct((4, 49, 16), jnp.float32)
    compiled = jax.jit(lambda pullback, g: pullback(g)).lower(pullback, g).compile()
    sizes = [math.prod(a.shape) for a in jax.tree.leaves(compiled.in_avals) if tuple(a.shape) != g.shape]
    assert sizes and max(sizes) == 4 * 10 * 32 < math.prod(x.shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("preferred", [None, jnp.float32], ids=str)
def test_dtypes(dtype, preferred):
    operation, x, kernel, g = sample("prefix", dtype=dtype)
    operation = functools.partial(operation, preferred_element_type=preferred)
    g = g.astype(preferred or dtype)
    y, dx, dw = jax.eval_shape(functools.partial(value_and_gradients, operation), x, kernel, g)
    chex.assert_type([y, dx, dw], [g.dtype, dtype, dtype])
    chex.assert_equal_shape([y, g])
    chex.assert_trees_all_equal_shapes((dx, dw), (x, kernel))


def test_half_precision_accumulates_in_float32():
    # 1 + 2048 ones: float16 cannot count past 2048 one by one
    x, kernel = jnp.ones((1, 64, 2049), jnp.float16), jnp.ones((2049, 1), jnp.float16) / 8
    operation = functools.partial(low_rank_matmul, spec=lp_l1(1), grid=(8, 8), preferred_element_type=jnp.float32)
    chex.assert_trees_all_equal(operation(x, kernel), np.full((1, 64, 1), 2049 / 8, np.float32))


def test_float64():
    with jax.enable_x64(True):
        operation, x, kernel, g = sample("fitted", (2,), dtype=jnp.float64)
        expected = reference.gradients(*(np.asarray(a) for a in (x, kernel, g)), lp_l1(4), (7, 7))
        assert_close(jitted(operation, x, kernel, g)[1:], expected, 1e-13)


def test_mixed_dtypes_follow_numpy_promotion_and_keep_their_cotangents():
    operation, x, kernel, g = sample("fitted")
    half = x.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        actual = jitted(operation, half, kernel, g)
        expected = jitted(operation, half.astype(jnp.float32), kernel, g)
    chex.assert_type(actual, [jnp.float32, jnp.bfloat16, jnp.float32])
    # bfloat16 has 8 bits: coefficients of x and its cotangent are rounded to them
    assert_close(actual, expected, 1e-2)
