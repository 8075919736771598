"""Few-bit codes against coders that go through the numbers one by one, in Python."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import erf

from lbpwht_jax.ops.coders import Companded, Mask, Rows, Slopes, slope_levels

SLOPE_BITS, ROW_BITS = (2, 3, 4, 8), (4, 8)
LEAST = 0.5 * (1 + math.erf(-1)) - math.exp(-1) / math.sqrt(math.pi)


def slope(x):
    return 0.5 * (1 + erf(x / math.sqrt(2))) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def slow_slopes(slopes, bits):
    """The nearest level to each slope."""
    levels = slope_levels(bits) if bits < 8 else [LEAST + k * (1 - 2 * LEAST) / 255 for k in range(256)]
    return np.array([min(levels, key=lambda level: abs(level - value)) for value in slopes.reshape(-1)]).reshape(slopes.shape)


def slow_rows(rows, bits):
    """Each number to the nearest of the row's steps."""
    most, result = 2 ** (bits - 1) - 1, np.zeros(rows.shape)
    for at, row in enumerate(rows):
        step = max(abs(value) for value in row) / most
        result[at] = [round(value / step) * step if step else 0.0 for value in row]
    return result


def slow_companded(numbers, bits):
    """The nearest of the equal steps of ``x / (2 + |x|)`` to each number, on that scale."""
    half = 2 ** (bits - 1)
    levels = [k / half for k in range(1 - half, half)]
    nearest = [min(levels, key=lambda level: abs(level - x / (2 + abs(x)))) for x in numbers.reshape(-1)]
    return np.array([2 * level / (1 - abs(level)) for level in nearest]).reshape(numbers.shape)


@pytest.mark.parametrize("bits", SLOPE_BITS)
def test_slopes_equal_the_slow_coder(bits):
    slopes = slope(np.random.default_rng(0).normal(size=(20, 21)))
    coded = jax.jit(lambda s: Slopes.of(s, bits))(jnp.asarray(slopes, jnp.float32))
    # float32 rounding may turn a tie over: no value lies so near to a border here
    np.testing.assert_allclose(coded.decoded(), slow_slopes(slopes, bits), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.0897), (3, 0.0438), (4, 0.0217), (8, 0.00143)])
def test_slopes_of_a_normal_input(bits, error):
    """The error is at most what the best levels allow: 0.095, 0.058 and 0.031 where borders are put on x instead."""
    x = np.linspace(-6, 6, 24001)
    weights = np.exp(-x * x / 2) / np.exp(-x * x / 2).sum()
    decoded = np.asarray(Slopes.of(jnp.asarray(slope(x)[None], jnp.float32), bits).decoded())[0]
    difference = decoded - slope(x)
    assert math.sqrt(np.sum(weights * difference**2)) < error
    assert abs(np.sum(weights * difference)) < 1e-4  # no bias adds up


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_levels_are_means_between_borders_halfway(bits):
    levels = np.array(slope_levels(bits))
    x = np.linspace(-8, 8, 100001)
    weights, nearest = np.exp(-x * x / 2), np.argmin(abs(slope(x)[:, None] - levels), axis=1)
    means = [np.average(slope(x)[nearest == k], weights=weights[nearest == k]) for k in range(len(levels))]
    np.testing.assert_allclose(levels, means, atol=2e-4)  # the grids of x differ
    np.testing.assert_allclose(levels + levels[::-1], 1, atol=2e-4)  # slope(-x) = 1 - slope(x)


@pytest.mark.parametrize("bits", ROW_BITS)
@pytest.mark.parametrize("channels", (1, 7, 25))
def test_rows_equal_the_slow_coder(bits, channels):
    rows = np.random.default_rng(1).normal(size=(9, channels)).astype(np.float32)
    rows[3], rows[4] = 0, 2.5
    coded = jax.jit(lambda x: Rows.of(x, bits))(rows)
    chex.assert_shape(coded.codes, (9, -(-channels * bits // 8)))
    np.testing.assert_allclose(coded.decoded(), slow_rows(rows.astype(np.float64), bits), rtol=2e-6, atol=1e-30)


@functools.partial(jax.jit, static_argnums=1)
def rounded(rows, bits):
    return Rows.of(rows, bits).decoded()


@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=9), st.sampled_from(ROW_BITS))
def test_any_row(values, bits):
    """Within half a step where all is finite; never finite where something is not."""
    row = np.array([values], np.float32)
    decoded = np.asarray(rounded(row, bits), np.float64)
    if np.isfinite(row).all():
        step = np.abs(row.astype(np.float64)).max() / (2 ** (bits - 1) - 1)
        # steps below the smallest normal number are flushed to zero
        assert np.abs(decoded - row).max() <= step * 0.5001 + 1e-36
    else:
        assert not np.isfinite(decoded[~np.isfinite(row)]).any()


@pytest.mark.parametrize("bits", ROW_BITS)
def test_companded_numbers_equal_the_slow_coder(bits):
    numbers = np.concatenate([np.random.default_rng(3).normal(size=60), [0.0, 3e4, -3e38, 1e-30]]).reshape(4, 16)
    coded = jax.jit(lambda x: Companded.of(x, bits))(jnp.asarray(numbers, jnp.float32))
    chex.assert_shape(coded.codes, (4, 16 * bits // 8))
    np.testing.assert_allclose(coded.decoded(), slow_companded(numbers, bits), rtol=2e-5, atol=1e-6)
    assert coded.decoded()[3, 12] == 0


def root_mean_square(differences):
    return np.sqrt(np.mean(np.square(differences)))


@pytest.mark.parametrize(("bits", "companded", "rows"), [(8, 0.0102, 0.0067), (4, 0.166, 0.123)])
def test_companded_normal_numbers_beside_rows(bits, companded, rows):
    """Docs' figures: the numbers' error is larger than that of rows, the error of GELU's slope is smaller."""
    numbers = np.random.default_rng(0).normal(size=(400, 192))
    own, other = (coder.of(jnp.asarray(numbers, jnp.float32), bits).decoded() for coder in (Companded, Rows))
    assert root_mean_square(own - numbers) < companded and root_mean_square(other - numbers) > rows
    assert root_mean_square(slope(own) - slope(numbers)) < root_mean_square(slope(other) - slope(numbers))


@pytest.mark.parametrize("bits", ROW_BITS)
def test_companded_numbers_of_heavier_tails_beside_rows(bits):
    """Both errors are smaller than those of rows, on Student's t of 4 degrees of freedom."""
    numbers = np.random.default_rng(0).standard_t(4, (400, 192))
    own, other = (coder.of(jnp.asarray(numbers, jnp.float32), bits).decoded() for coder in (Companded, Rows))
    for error in (
        lambda found: root_mean_square(found - numbers),
        lambda found: root_mean_square(slope(found) - slope(numbers)),
    ):
        assert error(own) < error(other)


def test_companded_numbers_that_are_no_numbers():
    values = jnp.asarray([[jnp.nan, jnp.inf, -jnp.inf, 1.0]])
    for bits in ROW_BITS:
        decoded = np.asarray(Companded.of(values, bits).decoded())[0]
        assert np.isnan(decoded[:3]).all() and np.isfinite(decoded[3])


def test_slopes_beyond_the_ends_and_what_is_no_number():
    values = jnp.asarray([[-jnp.inf, -5.0, 5.0, jnp.inf, jnp.nan]])
    for bits in SLOPE_BITS:
        decoded = np.asarray(Slopes.of(values, bits).decoded())[0]
        levels = slow_slopes(np.array([-9.0, -9.0, 9.0, 9.0]), bits)
        np.testing.assert_allclose(decoded[:4], levels, atol=1e-6)
        assert np.isfinite(decoded[4])


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
def test_dtypes(dtype):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 16)), dtype)
    for coded in (Rows.of(x, 8), Slopes.of(x, 4), Companded.of(x, 8)):
        chex.assert_type(coded.codes, jnp.uint8)
        chex.assert_type(coded.decoded(), dtype)


def test_masks():
    for length in (1, 8, 13):
        masks = np.array(list(itertools.islice(itertools.product((False, True), repeat=length), 300)))
        coded = Mask.of(jnp.asarray(masks))
        chex.assert_shape(coded.codes, (len(masks), -(-length // 8)))
        np.testing.assert_array_equal(coded.decoded(), masks)
