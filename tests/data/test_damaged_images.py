"""Damaged images and damaged zip files of images: each is read, or refused by name; nothing else happens."""

import io
import zipfile

import numpy as np
import pytest
from damage import assert_says, damaged
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lbpwht_jax.data import open_dataset
from lbpwht_jax.data.decode import UnreadableImage, decode, resize_and_crop, squash

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 13, 4)).astype(np.uint8)


def encoded(format, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, format, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
IMAGES = [
    encoded("PNG", "RGBA"),
    encoded("PNG", "P"),
    encoded("JPEG", exif=EXIF),
    encoded("GIF", "P", transparency=3),
    encoded("WEBP"),
    encoded("BMP"),
    encoded("TIFF", compression="tiff_lzw"),
    encoded("TIFF", "CMYK"),
    encoded("PPM", "L"),
    encoded("JPEG2000"),
]


@given(data=st.sampled_from(IMAGES).flatmap(damaged), channels=st.sampled_from([1, 3]), least=st.sampled_from([None, 4]))
def test_damaged_images(data, channels, least):
    try:
        image, aspect = decode(data, channels, least)
    except UnreadableImage as error:
        assert_says(error)
        return
    assert image.mode == {1: "L", 3: "RGB"}[channels] and 0 < aspect < np.inf
    assert squash(image, 4).shape == resize_and_crop(image, 4, 0.9).shape == (4, 4, channels)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("zip") / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for i in range(4):
            compression = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[i]
            file.writestr(f"train/c{i % 2}/{i}.bmp", encoded("BMP", "L"), compression)
            file.writestr(f"test/c{i % 2}/{i}.png", encoded("PNG", "L"), compression)
    return path, path.read_bytes()


@given(choices=st.data())
def test_damaged_zip_files(archive, choices):
    path, whole = archive
    path.write_bytes(choices.draw(damaged(whole)))
    try:
        dataset = open_dataset(f"folder:{path}")
    except ValueError as error:
        assert_says(error, str(path))
        return
    for split in (dataset.train, dataset.test):
        for i in range(len(split)):
            try:
                decode(split.read(i)[0], 1)
            except (OSError, UnreadableImage) as error:
                assert_says(error)
