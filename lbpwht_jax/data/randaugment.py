"""RandAugment on the device: timm's operations, and identity.

Every operation is one affine warp, or changes pixels by their values and, for sharpness, their neighbours'.
"""

import math

import jax
import jax.numpy as jnp

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (
    "identity",
    *GEOMETRIC,
    "brightness",
    "color",
    "contrast",
    "posterize",
    "solarize",
    "autocontrast",
    "invert",
    "equalize",
    "solarize_add",
    "sharpness",
)
_GREY = (0.299, 0.587, 0.114)
_FILL = 0.5


def randaugment(key: jax.Array, images: jax.Array, operations: int, magnitude: float) -> jax.Array:
    """Applies random operations to each image, one after the other, each with a random sign.

    Args:
      key: a key for the draws.
      images: ``[batch, height, width, channels]``, in [0, 1].
      operations: number of operations per image, drawn from ``OPERATIONS``.
      magnitude: their strength, in [0, 10]; ten times that of ``apply``.

    Returns:
      Images of the same shape, in [0, 1].
    """

    def step(images, key):
        kind_key, sign_key = jax.random.split(key)
        kinds = jax.random.randint(kind_key, (len(images),), 0, len(OPERATIONS))
        strengths = jax.random.rademacher(sign_key, (len(images),), jnp.float32) * (magnitude / 10)
        return apply(kinds, strengths, images), None

    return jax.lax.scan(step, images, jax.random.split(key, operations))[0]


def apply(kinds: jax.Array, strengths: jax.Array, images: jax.Array) -> jax.Array:
    """Applies one operation to each image.

    Args:
      kinds: ``[batch]``, indices into ``OPERATIONS``.
      strengths: ``[batch]``, in [-1, 1]. At 1, rotate turns by 30 degrees to the left, shears move by 0.3 of the distance from
        the centre, translations by 0.45 of the edge, with grey where there was no image; brightness, color, contrast and
        sharpness are multiplied by 1.9 (at -1 by 0.1). The others ignore the sign: posterize drops up to 4 of the 8 bits,
        solarize inverts what is brighter than 1 - strength, solarize_add adds up to 110 of 255 to what is darker than 128,
        autocontrast, equalize and invert are the same at any strength.
      images: ``[batch, height, width, channels]``, in [0, 1].

    Returns:
      Images of the same shape, in [0, 1].
    """
    branches = (_identity,) * (1 + len(GEOMETRIC)) + (
        _brightness,
        _color,
        _contrast,
        _posterize,
        _solarize,
        _autocontrast,
        _invert,
        _equalize,
        _solarize_add,
        _sharpness,
    )

    def one(kind, strength, image):
        moved = _warp(image, *_affine(kind, strength, image.shape))
        image = jnp.where((kind >= 1) & (kind <= len(GEOMETRIC)), moved, image)
        return jax.lax.switch(kind, branches, image, strength)

    return jax.vmap(one)(kinds, strengths, images).clip(0, 1)


def _affine(kind: jax.Array, strength: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The place that a pixel ``(y, x)``, relative to the centre, is taken from: a matrix ``[2, 2]`` and an offset ``[2]``."""
    rotate, shear_x, shear_y, translate_x, translate_y = (
        jnp.where(kind == OPERATIONS.index(name), strength, 0.0) for name in GEOMETRIC
    )
    angle = rotate * math.radians(30)
    matrix = jnp.stack([jnp.cos(angle), jnp.sin(angle) + 0.3 * shear_y, 0.3 * shear_x - jnp.sin(angle), jnp.cos(angle)])
    return matrix.reshape(2, 2), 0.45 * jnp.stack([translate_y * shape[0], translate_x * shape[1]])


def _warp(image: jax.Array, matrix: jax.Array, offset: jax.Array) -> jax.Array:
    height, width, _ = image.shape
    centre = jnp.asarray([(height - 1) / 2, (width - 1) / 2], jnp.float32)
    places = jnp.stack(jnp.meshgrid(jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32), indexing="ij"))
    places = jnp.tensordot(matrix, places - centre.reshape(2, 1, 1), 1) + (centre + offset).reshape(2, 1, 1)

    def channel(plane):
        return jax.scipy.ndimage.map_coordinates(plane, list(places), order=1, cval=_FILL)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def _identity(image: jax.Array, strength: jax.Array) -> jax.Array:
    return image


def _grey(image: jax.Array) -> jax.Array:
    """The image in grey, ``[height, width, 1]``."""
    if image.shape[-1] == 1:
        return image
    return jnp.sum(image * jnp.asarray(_GREY, jnp.float32).reshape(1, 1, 3), -1, keepdims=True)


def _brightness(image: jax.Array, strength: jax.Array) -> jax.Array:
    return image * (1 + 0.9 * strength)


def _color(image: jax.Array, strength: jax.Array) -> jax.Array:
    grey = _grey(image)
    return grey + (image - grey) * (1 + 0.9 * strength)


def _contrast(image: jax.Array, strength: jax.Array) -> jax.Array:
    mean = _grey(image).mean()
    return mean + (image - mean) * (1 + 0.9 * strength)


def _posterize(image: jax.Array, strength: jax.Array) -> jax.Array:
    step = 2 ** jnp.floor(4 * jnp.abs(strength))
    return jnp.floor(jnp.round(image * 255) / step) * step / 255


def _solarize(image: jax.Array, strength: jax.Array) -> jax.Array:
    return jnp.where(image > 1 - jnp.abs(strength), 1 - image, image)


def _autocontrast(image: jax.Array, strength: jax.Array) -> jax.Array:
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1.0), image)


def _invert(image: jax.Array, strength: jax.Array) -> jax.Array:
    return 1 - image


def _equalize(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Spreads the values of each channel evenly, as Pillow does, on 8 bits."""

    def channel(plane):
        values = jnp.round(plane * 255).astype(jnp.int32)
        counts = jnp.zeros(256, jnp.int32).at[values].add(1)
        last = 255 - jnp.argmax(counts[::-1] > 0)
        step = (counts.sum() - counts[last]) // 255
        table = (step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1)
        return jnp.where(step > 0, jnp.minimum(table, 255)[values] / 255, plane).astype(plane.dtype)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def _solarize_add(image: jax.Array, strength: jax.Array) -> jax.Array:
    return jnp.where(image < 128 / 255, jnp.minimum(image + jnp.abs(strength) * (110 / 255), 1), image)


def _sharpness(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Moves away from, or towards, the image smoothed by its neighbours; the border stays."""
    height, width, _ = image.shape
    around = sum(image[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3))
    smooth = image.at[1:-1, 1:-1].set((around + 4 * image[1:-1, 1:-1]) / 13)
    return smooth + (image - smooth) * (1 + 0.9 * strength)
