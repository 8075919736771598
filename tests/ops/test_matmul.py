import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lbpwht_jax import LowRankSpec, low_rank_matmul, lp_l1, lp_linf
from lbpwht_jax.ops.projection import coefficient_count

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "golden" / "official_lbp_wht.npz")
CASES = json.loads(str(GOLDEN["meta"]))
FULL_RANK_GRIDS = [(7, 7), (14, 14), (12, 9), (5, 3), (3, 3), (1, 1), (56, 56), (100,), (4, 7, 7)]

# Every public variant of the operation: its spec, grid and prefix tokens, and whether x is a channels-last map.
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
    "by-axis": (lp_l1(4), (28, 20), 0, False),
    "by-axis-prefix": (lp_l1(3, projection="official"), (28, 20), 2, False),
    "map": (lp_l1(4), (7, 9), 0, True),
    "map-by-axis": (lp_l1(4, projection="official"), (24, 28), 0, True),
    "dx-exact": (lp_l1(4, dx="exact"), (7, 7), 1, False),
    "dw-exact": (lp_l1(4, dw="exact"), (7, 7), 1, False),
    "both-exact": (lp_l1(4, dx="exact", dw="exact"), (7, 7), 0, False),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


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


def value_and_gradients(operation, x, kernel, g):
    y, pullback = jax.vjp(operation, x, kernel)
    return y, *pullback(g)


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("y", "dx", "dw"), actual, expected, strict=True):
        assert relative_error(a, e) <= tolerance, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['index']}-{case['kind']}-{case['h']}x{case['w']}-r{case['r']}")
def test_official_reproduces_the_authors_numbers(case):
    get = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN if key.startswith(f"{case['index']:02d}/")}
    assert case.get("bias", True) == ("bias" in get)
    bias = get.get("bias", np.zeros(case["co"], np.float32))
    grid = {"grid": (case["h"], case["w"]), "prefix_tokens": case.get("extra", 0)} if case["kind"] == "linear" else {}

    def layer(x, kernel, bias):
        y = low_rank_matmul(x, kernel, lp_l1(case["r"], projection="official"), **grid)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

    y, pullback = jax.vjp(layer, *map(jnp.asarray, (get["x"], get["kernel"], bias)))
    dx, dw, db = pullback(jnp.asarray(get["g"]))
    for name, actual in {"y": y, "grad_x": dx, "grad_kernel": dw, "grad_bias": db}.items():
        if name in get:
            assert relative_error(actual, get[name]) <= 1e-5, name


@pytest.mark.parametrize("grid", FULL_RANK_GRIDS, ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_fitted_is_exact_when_every_function_is_kept(grid, prefix):
    rng = np.random.default_rng(1)
    tokens = prefix + math.prod(grid)
    x, g = (jnp.asarray(rng.normal(size=(2, tokens, c)), jnp.float32) for c in (6, 5))
    kernel, bias = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), jnp.asarray(rng.normal(size=5), jnp.float32)

    def dense(x, kernel, bias):
        return x @ kernel + bias.reshape(1, 1, -1)

    def low_rank(x, kernel, bias):
        return low_rank_matmul(x, kernel, lp_linf(8, len(grid)), grid, prefix) + bias.reshape(1, 1, -1)

    results = []
    for layer in (low_rank, dense):
        y, pullback = jax.vjp(layer, x, kernel, bias)
        results.append((y, *pullback(g)))
    for name, actual, expected in zip(("y", "dx", "dw", "db"), *results, strict=True):
        assert relative_error(actual, expected) <= 1e-5, name


@variants
def test_every_variant_equals_the_slow_reference(variant):
    spec, grid, prefix, _ = VARIANTS[variant]
    operation, x, kernel, g = sample(variant, (2,))
    flat = [np.asarray(a, np.float64).reshape(2, -1, a.shape[-1]) for a in (x, g)]
    dx, dw = reference.gradients(flat[0], np.asarray(kernel, np.float64), flat[1], spec, grid, prefix)
    # float32 sums of up to 2 x 672 terms
    assert_close(value_and_gradients(operation, x, kernel, g), (x @ kernel, dx.reshape(x.shape), dw), 2e-6)


@pytest.mark.parametrize("grid", [(7, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("r", [2, 4, 6, 8])
def test_fitted_errs_no_more_than_official_on_smooth_fields(grid, r):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    exact = lp_l1(1, dx="exact", dw="exact")
    errors = {"fitted": [], "official": []}
    for _ in range(20):
        field = scipy.ndimage.gaussian_filter(rng.normal(size=(4, *grid, 11)), sigma=(0, 1.5, 1.5, 0))
        x, g = jnp.asarray(field[..., :6], jnp.float32), jnp.asarray(field[..., 6:], jnp.float32)
        truth = value_and_gradients(functools.partial(low_rank_matmul, spec=exact), x, kernel, g)[1:]
        for projection, found in errors.items():
            operation = functools.partial(low_rank_matmul, spec=lp_l1(r, projection=projection))
            actual = value_and_gradients(operation, x, kernel, g)[1:]
            found.append([float(jnp.linalg.norm(a - t) / jnp.linalg.norm(t)) for a, t in zip(actual, truth, strict=True)])
    fitted, official = (np.mean(found, axis=0) for found in errors.values())
    assert (fitted <= official).all(), (fitted, official)


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
    actual = value_and_gradients(operation, x, kernel, g)
    assert [a.dtype for a in actual] == [dtype] * 3
    wide = [np.asarray(a, np.float64) for a in (x, kernel, g)]
    assert_close(actual, (wide[0] @ wide[1], *reference.gradients(*wide, spec, grid, prefix)), tolerance)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("variant", ["fitted", "official-prefix", "by-axis-prefix"])
def test_any_number_of_batch_dimensions(variant, batch):
    operation, x, kernel, g = sample(variant, batch)
    y, dx, dw = value_and_gradients(operation, x, kernel, g)
    flat_y, flat_dx, flat_dw = value_and_gradients(
        operation, x.reshape(-1, *x.shape[-2:]), kernel, g.reshape(-1, *g.shape[-2:])
    )
    assert_close((y, dx, dw), (flat_y.reshape(y.shape), flat_dx.reshape(x.shape), flat_dw), 1e-6)


def jitted(operation, x, kernel, g):
    return jax.jit(functools.partial(value_and_gradients, operation))(x, kernel, g)


def rematerialised(operation, x, kernel, g):
    return jax.jit(functools.partial(value_and_gradients, jax.checkpoint(operation)))(x, kernel, g)


def rematerialised_but_products(operation, x, kernel, g):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.jit(functools.partial(value_and_gradients, jax.checkpoint(operation, policy=policy)))(x, kernel, g)


def split_batch(x):
    """The first batch axis in two, leaving a batch axis inside."""
    return x.reshape(4, x.shape[0] // 4, *x.shape[1:])


def vmapped(operation, x, kernel, g):
    y, dx, dw = jax.vmap(functools.partial(value_and_gradients, operation), (0, None, 0))(
        split_batch(x), kernel, split_batch(g)
    )
    return y.reshape(g.shape), dx.reshape(x.shape), dw.sum(0)


def differentiated_vmap(operation, x, kernel, g):
    def mapped(x, kernel):
        return jax.vmap(operation, (0, None))(split_batch(x), kernel).reshape(g.shape)

    return value_and_gradients(mapped, x, kernel, g)


def scanned(operation, x, kernel, g):
    def mapped(x, kernel):
        return jax.lax.scan(lambda _, part: (None, operation(part, kernel)), None, split_batch(x))[1].reshape(g.shape)

    return jax.jit(functools.partial(value_and_gradients, mapped))(x, kernel, g)


def pmapped(operation, x, kernel, g):
    parts = functools.partial(value_and_gradients, operation)
    y, dx, dw = jax.pmap(parts, in_axes=(0, None, 0), devices=jax.devices()[:4])(split_batch(x), kernel, split_batch(g))
    return y.reshape(g.shape), dx.reshape(x.shape), dw.sum(0)


def mesh(kind):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])


def shard_mapped(operation, x, kernel, g):
    def local(x, kernel, g):
        return value_and_gradients(operation, x, kernel, g)

    specs = (P("data"), P(), P("data"))
    mapped = jax.shard_map(local, mesh=mesh(AxisType.Auto), in_specs=specs, out_specs=(P("data"), P("data"), P()))
    return jax.jit(mapped)(x, kernel, g)


def sharded(kind, operation, x, kernel, g):
    devices = mesh(kind)
    with jax.set_mesh(devices):
        x, g = (jax.device_put(a, NamedSharding(devices, P("data"))) for a in (x, g))
        kernel = jax.device_put(kernel, NamedSharding(devices, P()))
        y, dx, dw = jax.jit(functools.partial(value_and_gradients, operation))(x, kernel, g)
        assert dx.sharding.is_equivalent_to(x.sharding, x.ndim)
        assert dw.sharding.is_fully_replicated
        return tuple(np.asarray(a) for a in (y, dx, dw))


TRANSFORMS = {
    "jit": jitted,
    "checkpoint": rematerialised,
    "checkpoint-dots": rematerialised_but_products,
    "vmap": vmapped,
    "grad-of-vmap": differentiated_vmap,
    "scan": scanned,
    "pmap": pmapped,
    "shard_map": shard_mapped,
    "sharded-auto": functools.partial(sharded, AxisType.Auto),
    "sharded-explicit": functools.partial(sharded, AxisType.Explicit),
}


@variants
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_give_the_eager_result(transform, variant):
    operation, x, kernel, g = sample(variant)
    expected = value_and_gradients(operation, x, kernel, g)
    # the order of float32 sums over up to 8 x 672 terms
    assert_close(TRANSFORMS[transform](operation, x, kernel, g), expected, 2e-6)


@variants
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
    y, dx, dw = value_and_gradients(operation, x, kernel, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (g.dtype, dtype, dtype)


def test_half_precision_accumulates_in_float32():
    # 1 + 2048 ones: float16 cannot count past 2048 one by one
    x, kernel = jnp.ones((1, 64, 2049), jnp.float16), jnp.ones((2049, 1), jnp.float16) / 8
    operation = functools.partial(low_rank_matmul, spec=lp_l1(1), grid=(8, 8), preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(operation(x, kernel), np.full((1, 64, 1), 2049 / 8))


def test_float64():
    with jax.enable_x64(True):
        operation, x, kernel, g = sample("fitted", (2,), dtype=jnp.float64)
        expected = reference.gradients(*(np.asarray(a) for a in (x, kernel, g)), lp_l1(4), (7, 7))
        assert_close(value_and_gradients(operation, x, kernel, g)[1:] + (x,), (*expected, x), 1e-13)


def test_mixed_dtypes_follow_numpy_promotion_and_keep_their_cotangents():
    operation, x, kernel, g = sample("fitted")
    half = x.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        y, dx, dw = value_and_gradients(operation, half, kernel, g)
        expected = value_and_gradients(operation, half.astype(jnp.float32), kernel, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_close((y, dx, dw), expected, 1e-2)


def test_compiles_once_a_shape():
    traces = []

    @jax.jit
    def step(x, kernel):
        traces.append(None)
        return jax.grad(lambda k: low_rank_matmul(x, k, lp_l1(4), [7, 7]).sum())(kernel)

    for seed in range(3):
        rng = np.random.default_rng(seed)
        step(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 49, 4), (4, 3))))
    assert len(traces) == 1


def call(x=(2, 49, 6), kernel=(6, 5), spec=None, dtype=jnp.float32, **arguments):
    return low_rank_matmul(jnp.zeros(x, dtype), jnp.zeros(kernel, jnp.float32), spec or lp_l1(4), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (7, 8)}, r"grid \(7, 8\) with 0 prefix tokens makes 56 tokens, but x of shape \[2, 49, 6\] has 49"),
        ({"grid": (7, 7), "prefix_tokens": 1}, r"with 1 prefix tokens makes 50 tokens"),
        ({"grid": (7, 7), "x": (6,)}, r"x of shape \[6\] has no token axis"),
        (
            {"grid": (7, 7), "kernel": (4, 5)},
            r"x of shape \[2, 49, 6\] has 6 channels, but the kernel of shape \[4, 5\] takes 4",
        ),
        ({"grid": (7, 7), "kernel": (1, 6, 5)}, r"kernel must be \[in, out\], got shape \[1, 6, 5\]"),
        ({}, r"the grid is missing.*\[2, 49, 6\].*pass grid=\(size, size\)"),
        ({"x": (2, 7, 7, 6), "prefix_tokens": 1}, r"prefix_tokens=1 needs a token axis.*\[2, 7, 7, 6\] is a channels-last map"),
        ({"grid": (49,)}, r"functions have 2 axes and the grid \(49,\) has 1.*ndim=1"),
        ({"grid": (7, 7), "prefix_tokens": -1}, r"prefix_tokens must not be negative, got -1"),
        ({"grid": (0, 7), "x": (2, 0, 6)}, r"every axis of the grid needs at least one token, got \(0, 7\)"),
        (
            {"grid": (1, 1), "x": (2, 1, 6), "spec": LowRankSpec([(0, 1)])},
            r"none of the functions .* exists on the grid \(1, 1\)",
        ),
        ({"grid": (7, 8), "name": "encoder/fc1"}, r"^encoder/fc1: grid \(7, 8\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: call(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (7, 7), "spec": "lp_l1-4"}, r"spec must be a LowRankSpec, such as lp_l1\(4\), got 'lp_l1-4'"),
        ({"grid": 49}, "grid must be a tuple of integers.*got grid=49"),
        ({"grid": (7.0, 7)}, "grid must be a tuple of integers"),
        ({"grid": (7, 7), "dtype": jnp.int32}, "x must be of a floating-point dtype, got int32"),
    ],
)
def test_errors_of_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        call(**arguments)
