"""Turns encoded images into uint8 arrays, on the host, with Pillow."""

import functools
import io
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lbpwht_jax.data.files import SUFFIXES, read_file

MOST_PIXELS = 2**27
"""Most pixels of an image; 134 million, while a photo of 10,000 x 8,000 has 80 million."""

_TRANSPOSED = (5, 6, 7, 8)
_ORIENTATION = 0x0112
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-fA-F]+>")
_LONGEST = 16


class UnreadableImage(ValueError):
    """The bytes are not an image that can be decoded; the text says why."""


def decode(source: bytes | Image.Image, channels: int, least: int | None = None) -> tuple[Image.Image, float]:
    """Decodes an image, turns it upright and converts it to 8 bits and one or three channels.

    Transparent images are laid over white; 16-bit images keep their upper 8 bits.

    Args:
      source: a file's bytes, or an open image.
      channels: 1 for greyscale, 3 for RGB.
      least: both sides of the result need only this many pixels; large JPEGs are then decoded at half, a quarter or an eighth
        of their size.

    Returns:
      The image, in mode ``L`` or ``RGB``, and the original's width over its height.

    Raises:
      UnreadableImage: if the bytes are damaged or in a format whose suffix is not one of ``SUFFIXES``, their mode cannot be
        converted to 8 bits, or there are more than ``MOST_PIXELS``.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        image = Image.open(io.BytesIO(source), formats=_formats()) if isinstance(source, bytes) else source
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than the {MOST_PIXELS:,} that an image may have")
        if least is not None:
            image.draft(None, (least, least))
        image.load()
        orientation = image.getexif().get(_ORIENTATION, 1)
        if orientation in _TRANSPOSED:
            width, height = height, width
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        image = _eight_bits(image, mode)
    except Exception as error:  # Pillow's decoders meet damaged bytes with errors of many types
        raise UnreadableImage(f"{type(error).__name__}: {_ADDRESS.sub('', str(error))}") from error
    return image, width / height


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's formats for the suffixes: others, such as PostScript, may start another program."""
    return tuple(sorted({format for suffix, format in Image.registered_extensions().items() if suffix in SUFFIXES}))


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def squash(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the whole image, whatever its proportions, to uint8 ``[size, size, channels]`` (bicubic)."""
    return _array(image.resize((size, size), Image.Resampling.BICUBIC))


def cut_out(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Resizes a box of the image to uint8 ``[size, size, channels]`` (bicubic, antialiased).

    Args:
      image: an image in mode ``L`` or ``RGB``.
      box: top, left, height and width, as shares of the image's height and width.
      size: height and width of the result, in pixels.
    """
    (top, left, height, width), (across, down) = box, image.size
    corners = (left * across, top * down, min((left + width) * across, across), min((top + height) * down, down))
    return _array(image.resize((size, size), Image.Resampling.BICUBIC, corners))


def resize_and_crop(image: Image.Image, size: int, crop: float, interpolation: str = "bicubic") -> np.ndarray:
    """Resizes an image and cuts out its centre, as timm does for evaluation.

    Args:
      image: an image in mode ``L`` or ``RGB``.
      size: height and width of the result, in pixels.
      crop: ``size`` over the shorter side to which the image is resized before the centre is cut out, in (0, 1].
      interpolation: "bicubic" or "bilinear".

    Returns:
      uint8, ``[size, size, channels]``.
    """
    shorter, (width, height) = math.floor(size / crop), image.size
    scaled = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    left, top = (round((edge - size) / 2) for edge in scaled)
    filter = Image.Resampling[interpolation.upper()]
    if max(scaled) > _LONGEST * size:  # a strip, of which the cut-out alone is resized: the whole might need any memory
        across, down = width / scaled[0], height / scaled[1]
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return _array(image.resize((size, size), filter, box))
    image = image.resize(scaled, filter)
    return _array(image.crop((left, top, left + size, top + size)))


def decode_image(source: bytes, image_size: int, channels: int, crop: float, interpolation: str = "bicubic") -> np.ndarray:
    """Decodes one image into the form that an evaluation uses: uint8, ``[image_size, image_size, channels]``.

    Args:
      source: the bytes of an image file.
      image_size: height and width of the result, in pixels.
      channels: 1 for greyscale, 3 for RGB.
      crop: edge of the centre crop over the shorter side of the resized image, in (0, 1].
      interpolation: how the image is resized, "bicubic" or "bilinear".

    Raises:
      UnreadableImage: as ``decode``.
    """
    return resize_and_crop(decode(source, channels)[0], image_size, crop, interpolation)


def load_image(path: Path, image_size: int, channels: int, crop: float, interpolation: str = "bicubic") -> np.ndarray:
    """Reads one file in the form that an evaluation uses; arguments and result are otherwise those of ``decode_image``.

    Raises:
      ValueError: if the file cannot be read or is not an image; the text names it.
    """
    try:
        return decode_image(read_file(path), image_size, channels, crop, interpolation)
    except (OSError, UnreadableImage) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from None


def _array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
