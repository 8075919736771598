import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from lbpwht_jax.data.randaugment import GEOMETRIC, OPERATIONS, apply, randaugment

RNG = np.random.default_rng(0)
NOISE = RNG.integers(20, 200, (16, 16, 3)).astype(np.uint8)
# smooth, so that sampling to within a hundredth of a pixel, as Pillow does, is enough
SMOOTH = np.stack([8 * np.add.outer(np.arange(16), k * np.arange(16)) / (1 + k) + 20 for k in range(3)], -1).astype(np.uint8)
GREY = (128, 128, 128)
RUN = jax.jit(apply)


def apply_one(name, strength, image):
    kinds = jnp.full(1, OPERATIONS.index(name))
    return np.asarray(RUN(kinds, jnp.full(1, strength), jnp.asarray(image[None], jnp.float32) / 255)[0]) * 255


def affine(image, a, b, c, d, e, f):
    """Pillow's: the pixel at (x, y) comes from (ax + by + c, dx + ey + f), both off the centre."""
    centre = image.width / 2
    matrix = (a, b, c + centre * (1 - a - b), d, e, f + centre * (1 - d - e))
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def pillow(name, s, image):
    match name:
        case "identity":
            return image
        case "rotate":
            return image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=GREY)
        case "shear_x":
            return affine(image, 1, 0.3 * s, 0, 0, 1, 0)
        case "shear_y":
            return affine(image, 1, 0, 0, 0.3 * s, 1, 0)
        case "translate_x":
            return affine(image, 1, 0, 0.45 * s * image.width, 0, 1, 0)
        case "translate_y":
            return affine(image, 1, 0, 0, 0, 1, 0.45 * s * image.height)
        case "brightness" | "color" | "contrast" | "sharpness":
            return getattr(ImageEnhance, name.capitalize())(image).enhance(1 + 0.9 * s)
        case "posterize":
            return ImageOps.posterize(image, 8 - int(4 * abs(s)))
        case "solarize":
            return ImageOps.solarize(image, 255 - 255 * abs(s) + 1e-3)
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "solarize_add":
            return image.point([min(255, value + round(110 * abs(s))) if value < 128 else value for value in range(256)] * 3)
        case "invert":
            return ImageOps.invert(image)


@pytest.mark.parametrize("strength", [-1.0, -0.4, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name, strength):
    image = SMOOTH if name in GEOMETRIC else NOISE
    ours, theirs = apply_one(name, strength, image), np.asarray(pillow(name, strength, Image.fromarray(image)), np.float32)
    difference = abs(ours - theirs)
    if name in GEOMETRIC:
        # at the border of what is in the image, Pillow extends the edge where we blend it with the grey outside
        border = (abs(ours - 127.5) < 1).any(-1) | (abs(theirs - 128) < 1).any(-1)
        assert np.quantile(difference, 0.8) <= 2 and (difference.max(-1) > 2)[~near(border)].sum() == 0
    else:
        # Pillow rounds greys, means and results
        assert difference.max() <= 2


def near(mask):
    padded = np.pad(mask, 1, constant_values=True)
    return np.any([padded[y : y + 16, x : x + 16] for y in range(3) for x in range(3)], 0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_channel(name):
    grey = np.repeat(NOISE[..., :1], 3, -1)
    np.testing.assert_allclose(apply_one(name, 0.5, grey[..., :1]), apply_one(name, 0.5, grey)[..., :1], atol=1e-3)


def test_a_blank_image_has_no_contrast_to_stretch():
    np.testing.assert_allclose(apply_one("autocontrast", 1.0, np.full((16, 16, 3), 77, np.uint8)), 77, rtol=1e-6)


def test_every_operation_is_drawn_with_either_sign():
    count = 1000
    images = jnp.broadcast_to(jnp.asarray(NOISE, jnp.float32) / 255, (count, 16, 16, 3))
    ours = np.asarray(jax.jit(randaugment, static_argnums=(2, 3))(jax.random.key(0), images, 1, 8.0)) * 255
    kinds = [(name, sign) for name in OPERATIONS for sign in (-1, 1)]
    wanted = np.stack([apply_one(name, 0.8 * sign, NOISE) for name, sign in kinds])
    found = np.isclose(ours[:, None], wanted, atol=1e-2).all((2, 3, 4))
    assert found.any(1).all()
    chosen = np.asarray([OPERATIONS.index(kinds[i][0]) for i in found.argmax(1)])
    # five standard deviations of a binomial with p = 1/16
    assert abs(np.bincount(chosen, minlength=16) - count / 16).max() < 5 * (count * 15 / 256) ** 0.5
    signed = [i for i, (name, _) in enumerate(kinds) if name in (*GEOMETRIC, "brightness", "color", "contrast", "sharpness")]
    assert found[:, signed].any(0).all()


def test_operations_follow_one_another():
    images = jnp.broadcast_to(jnp.asarray(NOISE, jnp.float32) / 255, (64, 16, 16, 3))
    once, twice = (randaugment(jax.random.key(3), images, n, 8.0) for n in (1, 2))
    unchanged = [np.isclose(x, images, atol=1e-3).all((1, 2, 3)).mean() for x in (once, twice)]
    assert unchanged[1] < unchanged[0]
