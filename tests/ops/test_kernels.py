"""The kernels, interpreted on CPU, and a TPU's products against the written-out matrices in float64; mapped and sharded."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import erf

from lbpwht_jax import lp_l1, lp_linf
from lbpwht_jax.ops import projection_matrices
from lbpwht_jax.ops.cells import grid_cells
from lbpwht_jax.ops.kernels import kernel
from lbpwht_jax.ops.products_tpu import form, takes

GRIDS = {
    "partial": (lp_l1(4), (7, 7), 0),
    "prefix": (lp_l1(4), (14, 14), 1),
    "whole": (lp_linf(2), (16, 8), 0),
    "many": (lp_l1(6), (20, 28), 2),
    "official": (lp_l1(3, projection="official"), (7, 14), 1),
    "one-dimension": (lp_l1(3, ndim=1), (20,), 2),
    "three-dimensions": (lp_l1(3, ndim=3, block=4), (3, 5, 4), 0),
    "everything": (lp_l1(15), (8, 8), 0),
}
ALL_KINDS = ("project", "expand", "gelu_backward", "gelu_backward_projected", "gelu_coded", "slope_projected")
ALL_KINDS += ("norm_gelu_coded", "norm_slope_projected")
KINDS = [(platform, kind) for platform in ("cuda",) for kind in ALL_KINDS]
# float32 sums of up to 64 terms, and erf to 1.5e-7
TOLERANCE = 3e-6


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def slope(x):
    return 0.5 * (1 + erf(x / np.sqrt(2))) + x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)


def code(slopes):
    """Equal steps from the least slope, at -sqrt(2), to the largest, at sqrt(2): written apart from the library's coders."""
    least, largest = slope(np.array([-np.sqrt(2), np.sqrt(2)]))
    return np.rint((slopes - least) / (largest - least) * 255).astype(np.uint8)


def decoded(codes):
    least, largest = slope(np.array([-np.sqrt(2), np.sqrt(2)]))
    return codes / 255 * (largest - least) + least


def companded(numbers):
    """Equal steps of ``x / (2 + |x|)``, counted from 128: written apart from the library's coders."""
    return (128 + np.rint(128 * numbers / (2 + np.abs(numbers)))).astype(np.uint8)


def sums_by_cell(grid, tokens):
    """``[batch, cells, channels]`` sums over the tokens of each cell."""
    cells = grid_cells(*grid)
    return np.stack([tokens[:, own[own < tokens.shape[1]]].sum(1) for own in cells.tokens], axis=1)


def case(kind, grid, batch=2, channels=40):
    """Random operands in float32, and what a kernel should return, in float64."""
    analysis, synthesis = projection_matrices(*grid)
    rng = np.random.default_rng(0)
    tokens = 2 * rng.normal(size=(batch, len(synthesis), channels))
    coefficients = rng.normal(size=(batch, len(analysis), channels))
    codes = rng.integers(0, 256, tokens.shape, np.uint8)
    dx = slope(tokens) * (synthesis @ coefficients)
    norm = rng.normal(size=(4, channels))
    mean, inverse, scale, bias = norm[:, None]
    normalised = (tokens - mean) * inverse
    kept = (codes.clip(1) - 128.0) / 128
    kept = 2 * kept / (1 - np.abs(kept))
    through = slope(kept * scale + bias) * (synthesis @ coefficients)
    sums = np.stack([sums_by_cell(grid, through), sums_by_cell(grid, through * kept)], axis=2)
    operands, expected = {
        "project": ((tokens,), (analysis @ tokens,)),
        "expand": ((coefficients,), (synthesis @ coefficients,)),
        "gelu_backward": (
            (coefficients, tokens),
            (dx, analysis @ gelu(tokens)),
        ),
        "gelu_backward_projected": ((coefficients, tokens), (analysis @ dx, analysis @ gelu(tokens))),
        "gelu_coded": ((tokens,), (gelu(tokens), analysis @ gelu(tokens), code(slope(tokens)))),
        "slope_projected": (
            (coefficients, codes),
            (analysis @ (decoded(codes) * (synthesis @ coefficients)),),
        ),
        "norm_gelu_coded": (
            (norm, tokens),
            (gelu(normalised * scale + bias), analysis @ gelu(normalised * scale + bias), companded(normalised)),
        ),
        "norm_slope_projected": (
            (norm, coefficients, codes.clip(1)),
            (analysis @ (through * inverse * scale), sums),
        ),
    }[kind]
    return [jnp.asarray(a, a.dtype if a.dtype == np.uint8 else jnp.float32) for a in operands], list(expected)


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        chex.assert_shape(a, e.shape)
        if e.dtype == np.uint8:
            chex.assert_type(a, np.uint8)
            # what lies halfway between two codes may go to either: rounding and erf's approximation decide
            assert np.abs(np.asarray(a, int) - e).max() <= 1 and np.mean(a != e) < 1e-3
            continue
        np.testing.assert_allclose(a, e, rtol=0, atol=TOLERANCE * np.abs(e).max())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("platform", "kind"), KINDS)
def test_equals_the_matrices(platform, kind, grid):
    operands, expected = case(kind, grid)
    assert_close(kernel(platform, kind, *grid, interpret=True)(*operands), expected)


# bands of 8 rows of tokens, and a grid as large whose blocks are partial, which has none
LARGE = {"bands": (lp_l1(4), (40, 32), 0), "no bands": (lp_l1(2), (36, 36), 0)}


@pytest.mark.parametrize("grid", [*GRIDS.values(), *LARGE.values()], ids=[*GRIDS, *LARGE])
@pytest.mark.parametrize("kind", ["project", "expand", "gelu_backward", "gelu_backward_projected"])
def test_a_tpus_products_equal_the_matrices(kind, grid):
    operands, expected = case(kind, grid, channels=10)
    results = jax.jit(form(kind, *grid))(*operands)
    assert_close(results if isinstance(results, tuple) else (results,), expected)


@pytest.mark.parametrize(
    ("dtype", "grid", "prefix", "taken"),
    [
        (jnp.bfloat16, (14, 14), 1, True),
        (jnp.float32, (14, 14), 1, False),
        # rows of 8 x 56 tokens and 70 coefficients; 3,136 tokens and 490 coefficients at once would take longer than to move
        (jnp.bfloat16, (56, 56), 0, True),
        (jnp.bfloat16, (56, 56), 1, False),
    ],
)
def test_a_tpu_takes_products_where_they_take_no_longer_than_moving(dtype, grid, prefix, taken):
    assert takes(dtype, lp_l1(4), grid, prefix) == taken


@pytest.mark.parametrize("channels", [1, 16, 130])
def test_any_number_of_channels(channels):
    operands, expected = case("gelu_backward", GRIDS["partial"], channels=channels)
    assert_close(kernel("cuda", "gelu_backward", *GRIDS["partial"], interpret=True)(*operands), expected)


def test_vmap_of_one_operand_and_of_both():
    (coefficients, tokens), _ = case("gelu_backward", GRIDS["prefix"], batch=6)
    run = kernel("cuda", "gelu_backward", *GRIDS["prefix"], interpret=True)
    parts = coefficients.reshape(3, 2, *coefficients.shape[1:])
    both = jax.vmap(run)(parts, tokens.reshape(3, 2, *tokens.shape[1:]))
    flat = [array.reshape(-1, *array.shape[2:]) for array in both]
    assert_close(flat, run(coefficients, tokens))
    one = jax.vmap(run, (0, None))(parts, tokens[:2])
    for k in range(3):
        assert_close([array[k] for array in one], run(parts[k], tokens[:2]))


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data")], ids=["batch", "channels"])
@pytest.mark.parametrize(("platform", "kind"), KINDS)
def test_sharded_along_batch_or_channels_nothing_is_gathered(platform, kind, spec):
    operands, expected = case(kind, GRIDS["prefix"], batch=4)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    of_norm = P(None, *spec[2:])
    operands = [jax.device_put(array, NamedSharding(mesh, spec if array.ndim == 3 else of_norm)) for array in operands]
    compiled = jax.jit(kernel(platform, kind, *GRIDS["prefix"], interpret=True)).lower(*operands).compile()
    assert "all-gather" not in compiled.as_text()
    results = compiled(*operands)
    for array in results:
        expected_spec = spec if array.ndim == 3 else P(*spec[:2], None, *spec[2:])  # sums have one axis more
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, expected_spec), array.ndim)
    assert_close(results, expected)


@pytest.mark.parametrize(
    ("spec", "grid", "prefix"),
    [
        (lp_l1(4, block=16), (16, 16), 0),
        (lp_l1(2), (8, 8), 65),
        # 9 tokens in blocks of 4 and 5: the reflection of the first reaches into the second
        (lp_l1(2, projection="official"), (9, 8), 0),
    ],
    ids=["large blocks", "many prefix tokens", "reflection"],
)
def test_no_cells_where_a_kernel_would_not_fit(spec, grid, prefix):
    assert grid_cells(spec, grid, prefix) is None
