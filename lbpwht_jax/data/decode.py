"""Encoded images to uint8 arrays, on the host, with Pillow."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_TRANSPOSED = (5, 6, 7, 8)
_ORIENTATION = 0x0112


class UnreadableImage(ValueError):
    """Bytes that no image can be made of; the text says why."""


def decode(source: bytes | Image.Image, channels: int, least: int | None = None) -> tuple[Image.Image, float]:
    """Decodes an image, turns it upright and brings it to 8 bits and one or three channels.

    Transparency is laid over white; 16-bit images keep their upper 8 bits.

    Args:
      source: a file's bytes, or an open image.
      channels: 1 for greyscale, 3 for RGB.
      least: edge in pixels below which no side matters: large JPEGs are then decoded at half, a quarter or an eighth of their
        size.

    Returns:
      The image, of mode ``L`` or ``RGB``, and the width of the original over its height.

    Raises:
      UnreadableImage: if the bytes are damaged, or of no format or mode that Pillow turns into 8 bits.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        width, height = image.size
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
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    return image, width / height


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
    """The whole image as uint8 ``[size, size, channels]``, whatever its proportions (bicubic)."""
    return _array(image.resize((size, size), Image.Resampling.BICUBIC))


def resize_and_crop(image: Image.Image, size: int, crop: float, interpolation: str = "bicubic") -> np.ndarray:
    """What timm shows a model in an evaluation.

    Args:
      image: of mode ``L`` or ``RGB``.
      size: of the result, in pixels.
      crop: ``size`` over the shorter side that the image is resized to before the centre is cut out, in (0, 1].
      interpolation: "bicubic" or "bilinear".

    Returns:
      uint8, ``[size, size, channels]``.
    """
    shorter, (width, height) = math.floor(size / crop), image.size
    scaled = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    left, top = (round((edge - size) / 2) for edge in scaled)
    image = image.resize(scaled, Image.Resampling[interpolation.upper()])
    return _array(image.crop((left, top, left + size, top + size)))


def load_image(path: Path, image_size: int, channels: int, crop: float, interpolation: str = "bicubic") -> np.ndarray:
    """Reads one file as an evaluation sees it: uint8, ``[image_size, image_size, channels]``.

    Args:
      path: an image file.
      image_size: of the result, in pixels.
      channels: 1 or 3.
      crop: as ``resize_and_crop`` takes it.
      interpolation: likewise.

    Raises:
      ValueError: if the file cannot be read or is no image; the text names it.
    """
    try:
        image, _ = decode(path.read_bytes(), channels)
    except (OSError, UnreadableImage) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from None
    return resize_and_crop(image, image_size, crop, interpolation)


def _array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
