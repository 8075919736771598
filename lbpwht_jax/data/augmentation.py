"""Random changes to training images, on the device, inside jit."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import pydantic.dataclasses
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, model_validator

from lbpwht_jax.data.crops import RATIO, TRIES, first_boxes
from lbpwht_jax.data.randaugment import randaugment
from lbpwht_jax.data.validation import STRICT


def _rising(scale: tuple[float, float]) -> tuple[float, float]:
    if scale[0] > scale[1]:
        raise ValueError(f"the least area must not be above the largest, got {scale}")
    return scale


_Area = Annotated[float, Field(gt=0, le=1)]
_Operations = Annotated[int, Field(gt=0, le=100)]
_Magnitude = Annotated[float, Field(ge=0, le=10)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Augmentation:
    """How training images are changed at random; by default they are not.

    Attributes:
      crop_scale: least and largest area of the random resized crop, as shares of the image's area, in (0, 1]. The crop's
        width over its height, in the original's proportions, is drawn from 3/4 to 4/3. None takes the whole image, squashed.
      flip: whether half of the images are mirrored left to right.
      shift: largest number of pixels by which images are moved along both axes; their edges are repeated.
      randaugment: number of operations per image, at most 100, and their magnitude in [0, 10]; None for no operations.
      mixup: an image is blended with another, and the share that it keeps is drawn from a Beta distribution with this alpha;
        0 for no mixup.
      cutmix: a box of an image is replaced by another image's, and the share of the area that it keeps is drawn from a Beta
        distribution with this alpha; 0 for no cutmix. With both mixup and cutmix, each image undergoes one or the other.
      crop_from: where crops are made. ``"canvas"``: on the device, out of images that were squashed to one and a half times the
        model's size before. ``"image"``: while loading, out of the whole image as it was decoded, as timm does, which keeps its
        detail and takes the host longer.

    Raises:
      pydantic.ValidationError: (a ValueError) if a value has the wrong type or is out of range.
    """

    crop_scale: Annotated[tuple[_Area, _Area], AfterValidator(_rising)] | None = None
    flip: bool = False
    shift: NonNegativeInt = 0
    randaugment: tuple[_Operations, _Magnitude] | None = None
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    crop_from: Literal["canvas", "image"] = "canvas"

    @model_validator(mode="after")
    def _has_crops(self) -> "Augmentation":
        if self.crop_from == "image" and self.crop_scale is None:
            raise ValueError("crop_from 'image' needs crop_scale (--crop-scale), such as 0.08 1")
        return self


Augment = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


def make_augmentation(augmentation: Augmentation, image_size: int) -> Augment:
    """Makes a function that augments a batch, to be called inside jit.

    Args:
      augmentation: the changes.
      image_size: height and width of the images that the function returns, in pixels.

    Returns:
      ``augment(key, images, aspect, labels, num_classes) -> (images, targets)``: from uint8 ``[batch, s, s, channels]``,
      float32 ``[batch]`` and int32 ``[batch]`` to float32 ``[batch, image_size, image_size, channels]`` in [0, 1] and
      float32 ``[batch, num_classes]``.
    """

    def augment(key, images, aspect, labels, num_classes):
        crop_key, flip_key, shift_key, ops_key, mix_key = jax.random.split(key, 5)
        images = images.astype(jnp.float32) / 255
        if augmentation.crop_scale is not None and augmentation.crop_from == "canvas":
            boxes = crop_boxes(crop_key, aspect, augmentation.crop_scale)
            images = resample(images, boxes, image_size)
        elif images.shape[1] != image_size:
            images = resample(images, jnp.tile(jnp.asarray([[0.0, 0.0, 1.0, 1.0]]), (len(images), 1)), image_size)
        if augmentation.flip:
            chosen = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
            images = jnp.where(chosen, images[:, :, ::-1], images)
        if augmentation.shift:
            images = _shift(shift_key, images, augmentation.shift)
        if augmentation.randaugment:
            images = randaugment(ops_key, images, *augmentation.randaugment)
        targets = jax.nn.one_hot(labels, num_classes)
        if augmentation.mixup or augmentation.cutmix:
            images, targets = mix(mix_key, images, targets, augmentation.mixup, augmentation.cutmix)
        return images, targets

    return augment


def crop_boxes(key: jax.Array, aspect: jax.Array, scale: tuple[float, float]) -> jax.Array:
    """Draws boxes of the random resized crop as torchvision and timm do, but without rounding them to pixels.

    Args:
      key: a key for the draw.
      aspect: ``[batch]``, width over height of the original images.
      scale: least and largest area, as shares of the image's area.

    Returns:
      ``[batch, 4]``: top, left, height and width, as shares of the image's height and width.
    """
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    shape = (len(aspect), TRIES)
    area = jax.random.uniform(area_key, shape, minval=scale[0], maxval=scale[1])
    ratio = jnp.exp(jax.random.uniform(ratio_key, shape, minval=math.log(RATIO[0]), maxval=math.log(RATIO[1])))
    return first_boxes(aspect, area, ratio, jax.random.uniform(place_key, (len(aspect), 2)))


def resample(images: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
    """Cuts a box out of each image and resizes it (bicubic, antialiased).

    Args:
      images: ``[batch, height, width, channels]``, in [0, 1].
      boxes: ``[batch, 4]``: top, left, height and width, as shares of the image's height and width.
      size: height and width of the result, in pixels.

    Returns:
      ``[batch, size, size, channels]``, in [0, 1].
    """
    edges = jnp.asarray(images.shape[1:3], jnp.float32)

    def one(image, box):
        scale = size / (box[2:] * edges)
        shape = (size, size, image.shape[-1])
        return jax.image.scale_and_translate(image, shape, (0, 1), scale, -box[:2] * edges * scale, "cubic")

    return jax.vmap(one)(images, boxes).clip(0, 1)


def mix(key: jax.Array, images: jax.Array, targets: jax.Array, mixup: float, cutmix: float) -> tuple[jax.Array, jax.Array]:
    """Mixes each image and its target with those at the same distance from the batch's other end.

    Args:
      key: a key for the draws.
      images: ``[batch, height, width, channels]``.
      targets: ``[batch, classes]``.
      mixup: see ``Augmentation``.
      cutmix: see ``Augmentation``; at least one of the two is not 0.

    Returns:
      Images and targets of the same shapes.
    """
    choice_key, kept_key, place_key = jax.random.split(key, 3)
    batch, height, width, _ = images.shape
    cuts = jax.random.bernoulli(choice_key, 0.5 if mixup and cutmix else float(cutmix > 0), (batch,))
    alpha = jnp.where(cuts, cutmix, mixup)
    given = (1 - jax.random.beta(kept_key, alpha, alpha)).reshape(batch, 1, 1)
    centres = jax.random.uniform(place_key, (2, batch, 1))
    rows, columns = (
        jnp.abs((jnp.arange(n, dtype=jnp.float32) + 0.5).reshape(1, n) / n - place) < jnp.sqrt(given[:, 0]) / 2
        for n, place in zip((height, width), centres, strict=True)
    )
    box = (rows[:, :, None] & columns[:, None, :]).astype(jnp.float32)
    # the other image's share of each pixel
    other = jnp.where(cuts.reshape(batch, 1, 1), box, given)
    share = other.mean((1, 2))[:, None]
    images = images * (1 - other[..., None]) + images[::-1] * other[..., None]
    return images, targets * (1 - share) + targets[::-1] * share


def _shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)
    zero = jnp.zeros((), offsets.dtype)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], zero), images.shape[1:]))(padded, offsets)
