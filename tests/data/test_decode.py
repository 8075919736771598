import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lbpwht_jax.data import load_image
from lbpwht_jax.data.decode import UnreadableImage, decode, resize_and_crop, squash

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
GREY = RNG.integers(0, 256, (6, 9)).astype(np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9)).astype(np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data, channels=3):
    image, aspect = decode(data, channels)
    assert aspect == image.width / image.height
    return np.asarray(image, np.int32)


def luma(rgb):
    return rgb @ np.asarray([0.299, 0.587, 0.114])


def over_white(colour, alpha):
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


THREE = np.repeat(GREY[..., None], 3, 2)
CMYK = RNG.integers(0, 256, (6, 9, 4)).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "format", "wanted", "within"),
    [
        pytest.param(Image.fromarray(RGB), "PNG", RGB, 0, id="RGB"),
        pytest.param(Image.fromarray(GREY), "PNG", THREE, 0, id="greyscale"),
        pytest.param(Image.fromarray(GREY >= 128), "PNG", 255 * (THREE >= 128), 0, id="bilevel"),
        pytest.param(Image.fromarray(RGB).quantize(54), "PNG", RGB, 0, id="palette"),
        # alpha is composed in integers, with two roundings
        pytest.param(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG", over_white(RGB, ALPHA), 1, id="RGBA"),
        pytest.param(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG", over_white(THREE, ALPHA), 1, id="greyscale and alpha"),
        # ink covers what light there is
        pytest.param(Image.fromarray(CMYK, "CMYK"), "TIFF", (255 - CMYK[..., :3]) * (1 - CMYK[..., 3:] / 255), 1, id="CMYK"),
        pytest.param(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG", THREE, 0, id="16 bit"),
        pytest.param(Image.fromarray(GREY.astype(np.uint16) * 256 + 255), "TIFF", THREE, 0, id="16 bit, rounded down"),
        pytest.param(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF", THREE, 0, id="32 bit"),
    ],
)
def test_modes(image, format, wanted, within):
    data = encoded(image, format)
    assert abs(pixels(data) - wanted).max() <= within + 1e-6
    # Pillow's own weights, in 16-bit integers, and rounding
    assert abs(pixels(data, 1) - luma(wanted)).max() <= within + 1


def test_a_transparent_colour_of_a_palette_shows_white():
    image = Image.fromarray(np.asarray([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    np.testing.assert_array_equal(pixels(encoded(image, transparency=1)), [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]])


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a.swapaxes(0, 1)[::-1, ::-1]),
        (8, np.rot90),
    ],
)
def test_photos_are_turned_upright(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(RGB), exif=exif)), turn(RGB))


@pytest.mark.parametrize(("orientation", "aspect"), [(1, 1000 / 600), (6, 600 / 1000)])
def test_large_photos_are_decoded_smaller_where_size_allows(orientation, aspect):
    gradient = np.linspace(0, 255, 1000)[None, :, None] * np.ones((600, 1, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(gradient.astype(np.uint8)), "JPEG", exif=exif)
    whole, small = decode(data, 3), decode(data, 3, least=120)
    assert whole[1] == small[1] == aspect
    assert max(whole[0].size) == 1000 and min(small[0].size) == 150
    difference = np.asarray(squash(whole[0], 100), np.int32) - squash(small[0], 100)
    assert abs(difference).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files(format):
    data = encoded(Image.fromarray(RNG.integers(0, 256, (40, 40, 3)).astype(np.uint8)), format)
    assert pixels(data).shape == (40, 40, 3)
    for damaged in (data[: len(data) // 2], data[:20], b""):
        with pytest.raises(UnreadableImage):
            decode(damaged, 3)


def test_what_is_no_image_of_8_or_16_bits():
    for data in (b"these are words", encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF")):
        with pytest.raises(UnreadableImage, match=r"cannot identify image file|floating-point pixels have no agreed range"):
            decode(data, 3)


def test_other_formats_are_not_tried():
    """PostScript would start another program."""
    postscript = encoded(Image.fromarray(RGB), "EPS")
    with pytest.raises(UnreadableImage, match=r"^UnidentifiedImageError: cannot identify image file$"):
        decode(postscript, 3)


def declared(width, height):
    """A PNG that declares a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    small = encoded(Image.fromarray(GREY))
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def test_images_of_too_many_pixels_are_not_decoded(monkeypatch):
    large, larger = declared(12_000, 12_000), declared(30_000, 30_000)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(UnreadableImage, match="12000 x 12000 pixels are more"):
        decode(large, 3)
    with pytest.raises(UnreadableImage, match="DecompressionBombError"):
        decode(larger, 3)


@pytest.mark.parametrize("turn", [False, True])
def test_the_middle_of_a_strip_is_what_resizing_all_of_it_gives(turn):
    image = Image.fromarray(RNG.integers(100, 150, (10, 170, 3)).astype(np.uint8))
    image = image.transpose(Image.Transpose.TRANSPOSE) if turn else image
    whole = image.resize((20, 340) if turn else (340, 20), Image.Resampling.BICUBIC)
    wanted = whole.crop((2, 162, 18, 178) if turn else (162, 2, 178, 18))
    # the corners of the cut-out are given to Pillow in float32
    assert abs(resize_and_crop(image, 16, 0.8).astype(int) - np.asarray(wanted)).max() <= 1


def test_squash_and_crop():
    image = Image.fromarray(RGB)
    assert squash(image, 4).shape == (4, 4, 3) and squash(image.convert("L"), 4).shape == (4, 4, 1)
    # the shorter side has its size already: the centre as it is
    np.testing.assert_array_equal(resize_and_crop(image, 6, 1.0), RGB[:, 2:8])
    np.testing.assert_array_equal(
        resize_and_crop(image.transpose(Image.Transpose.TRANSPOSE), 3, 0.5), RGB[2:5, 3:6].swapaxes(0, 1)
    )


def test_one_file(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(RGB).save(path)
    np.testing.assert_array_equal(load_image(path, 6, 3, 1.0), RGB[:, 2:8])
    assert load_image(path, 6, 1, 1.0).shape == (6, 6, 1)
    path.write_bytes(path.read_bytes()[:50])
    for file, reason in ((path, "OSError"), (tmp_path / "none.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=rf"cannot read the image {file}: .*{reason}"):
            load_image(file, 6, 3, 1.0)
