"""Attention windows on a map: cutting, shifting, and the offsets between a window's tokens."""

import jax
import numpy as np

from lbpwht_jax.ops.spec import Grid


def relative_coordinates(window: Grid) -> np.ndarray:
    """The position MLP's input: every offset between two tokens of a window, log-spaced.

    Args:
      window: tokens along each axis of a window, ``(h, w)``.

    Returns:
      float32 ``[(2h - 1) * (2w - 1), 2]``, offsets in row-major order; the largest offset along an axis is ``log2(9) / 3``.
    """
    axes = [8 * np.arange(1 - n, n) / max(n - 1, 1) for n in window]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    return (np.sign(offsets) * np.log2(np.abs(offsets) + 1) / 3).astype(np.float32)


def relative_index(window: Grid) -> np.ndarray:
    """Where in ``relative_coordinates`` the offset between two tokens of a window is.

    Args:
      window: tokens along each axis of a window, ``(h, w)``.

    Returns:
      int64 ``[h * w, h * w]``: entry ``(a, b)`` is the row of the offset from token b to token a.
    """
    height, width = window
    rows, columns = np.indices(window).reshape(2, -1)
    offsets = [position[:, None] - position[None, :] + n - 1 for position, n in ((rows, height), (columns, width))]
    return offsets[0] * (2 * width - 1) + offsets[1]


def shift_mask(size: Grid, window: Grid, shift: Grid) -> np.ndarray:
    """What is added to attention logits after a cyclic shift, between tokens that only the shift brought together.

    Args:
      size: height and width of the (padded) map, multiples of ``window``.
      window: tokens along each axis of a window, ``(h, w)``.
      shift: towards the top left, in tokens, along each axis.

    Returns:
      float32 ``[windows, h * w, h * w]``: 0 within a region of the original map, -100 across.
    """
    # The last `window` positions of an axis hold the last window, of which the last `shift` came from the other end.
    regions = [
        (np.arange(n) >= n - w).astype(np.int64) + (np.arange(n) >= n - s) for n, w, s in zip(size, window, shift, strict=True)
    ]
    labels = 3 * regions[0][:, None] + regions[1][None, :]
    (rows, columns), (height, width) = (n // w for n, w in zip(size, window, strict=True)), window
    labels = labels.reshape(rows, height, columns, width).swapaxes(1, 2).reshape(rows * columns, height * width)
    return np.where(labels[:, :, None] == labels[:, None, :], 0, -100).astype(np.float32)


def to_windows(x: jax.Array, window: Grid) -> jax.Array:
    """``[batch, height, width, channels]`` to ``[batch, windows, tokens, channels]``, both in row-major order."""
    batch, height, width, channels = x.shape
    h, w = window
    x = x.reshape(batch, height // h, h, width // w, w, channels).swapaxes(2, 3)
    return x.reshape(batch, -1, h * w, channels)


def from_windows(x: jax.Array, window: Grid, size: Grid) -> jax.Array:
    """The map of ``size`` that ``to_windows`` cut up."""
    batch, _, _, channels = x.shape
    (height, width), (h, w) = size, window
    x = x.reshape(batch, height // h, width // w, h, w, channels).swapaxes(2, 3)
    return x.reshape(batch, height, width, channels)
