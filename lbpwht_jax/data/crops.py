"""Boxes of the random resized crop, for NumPy's arrays on the host and for JAX's on the device."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RATIO = (3 / 4, 4 / 3)
"""Least and largest width over height of a box, in the original's pixels."""

TRIES = 10
"""Draws for each box, of which the first that fits into the image is taken."""


def first_boxes(aspect: Any, area: Any, ratio: Any, place: Any) -> Any:
    """The first box of each image that fits, without rounding it to pixels.

    Where no draw fits, it is the largest central box whose proportions are allowed, as in torchvision and timm.

    Args:
      aspect: ``[batch]``, width over height of the original images.
      area: ``[batch, TRIES]``, shares of the image's area.
      ratio: ``[batch, TRIES]``, width over height of the boxes in the original's pixels.
      place: ``[batch, 2]``, in [0, 1]: how far down and right the boxes are in the room that there is.

    Returns:
      ``[batch, 4]``: top, left, height and width, as shares of the image's height and width; JAX's if the draws are.
    """
    xp: Any = jnp if isinstance(area, jax.Array) else np
    heights, widths = xp.sqrt(area * aspect[:, None] / ratio), xp.sqrt(area * ratio / aspect[:, None])
    fits = (heights <= 1) & (widths <= 1)
    first = xp.argmax(fits, 1)[:, None]
    height, width = (xp.take_along_axis(edges, first, 1)[:, 0] for edges in (heights, widths))
    found, limited = fits.any(1), xp.clip(aspect, *RATIO)
    height = xp.where(found, height, xp.minimum(aspect / limited, 1))
    width = xp.where(found, width, xp.minimum(limited / aspect, 1))
    place = xp.where(found[:, None], place, 0.5)
    return xp.stack([place[:, 0] * (1 - height), place[:, 1] * (1 - width), height, width], 1)


class Draws:
    """What the boxes of a batch are drawn from, before the images' proportions are known.

    Args:
      rng: draws for all rows at once, so that each row's do not depend on which rows a process loads.
      rows: images in the batch.
      scale: least and largest area, as shares of the image's area.
    """

    def __init__(self, rng: np.random.Generator, rows: int, scale: tuple[float, float]):
        self._area = rng.uniform(*scale, (rows, TRIES))
        self._ratio = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), (rows, TRIES)))
        self._place = rng.uniform(size=(rows, 2))

    def box(self, row: int, aspect: float) -> tuple[float, float, float, float]:
        """The box of a row whose image has this width over height: top, left, height and width as shares of the image's."""
        draws = (self._area[row : row + 1], self._ratio[row : row + 1], self._place[row : row + 1])
        top, left, height, width = first_boxes(np.asarray([aspect]), *draws)[0].tolist()
        return top, left, height, width
