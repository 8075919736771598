"""Attention windows against their definitions, token by token."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax.models.windows import from_windows, relative_coordinates, relative_index, shift_mask, to_windows

WINDOWS = [(4, 4), (3, 5), (1, 2), (1, 1)]


def test_windows_are_slices_of_the_map_and_go_back():
    x = np.random.default_rng(0).standard_normal((2, 6, 12, 3), np.float32)
    windows = np.asarray(to_windows(jnp.asarray(x), (3, 4)))
    slices = [x[:, row : row + 3, column : column + 4] for row in (0, 3) for column in (0, 4, 8)]
    np.testing.assert_array_equal(windows, np.stack([s.reshape(2, 12, 3) for s in slices], axis=1))
    np.testing.assert_array_equal(from_windows(jnp.asarray(windows), (3, 4), (6, 12)), x)


@pytest.mark.parametrize("window", WINDOWS)
def test_offsets_between_tokens_are_log_spaced(window):
    coordinates = relative_coordinates(window)[relative_index(window)]
    tokens = list(itertools.product(range(window[0]), range(window[1])))
    assert coordinates.shape == (len(tokens), len(tokens), 2)
    for (a, one), (b, other) in itertools.product(enumerate(tokens), repeat=2):
        for axis in (0, 1):
            offset = one[axis] - other[axis]
            # Equation 4 of the paper, on offsets from -8 to 8 and over log2(8), as its code and timm have it.
            scaled = 8 * abs(offset) / max(window[axis] - 1, 1)
            np.testing.assert_allclose(coordinates[a, b, axis], np.sign(offset) * np.log(1 + scaled) / np.log(8), rtol=1e-6)


@pytest.mark.parametrize("window", WINDOWS)
def test_every_offset_is_used(window):
    assert set(relative_index(window).ravel()) == set(range(len(relative_coordinates(window))))


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((8, 8), (4, 4), (2, 2)), ((8, 16), (4, 4), (1, 3)), ((4, 12), (4, 4), (0, 2)), ((6, 9), (3, 3), (1, 1))],
)
def test_the_mask_parts_tokens_that_were_far_apart(size, window, shift):
    positions = np.stack(np.indices(size), axis=-1)
    shifted = np.roll(positions, [-s for s in shift], axis=(0, 1))
    tokens = np.asarray(to_windows(jnp.asarray(shifted)[None], window))[0]
    distances = np.abs(tokens[:, :, None] - tokens[:, None, :])
    near = (distances < np.array(window)).all(axis=-1)
    np.testing.assert_array_equal(shift_mask(size, window, shift), np.where(near, 0, -100))
    assert not near.all()
