"""Evaluation images are timm's: the same resizing and centre crop, to the byte."""

import io

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms_factory import create_transform

from lbpwht_jax.data.decode import decode, resize_and_crop
from lbpwht_jax.models import list_models, model_info

SIZES = [(500, 375), (375, 500), (32, 32), (224, 224), (301, 640), (1000, 200), (233, 235), (224, 300)]


def photo(width, height):
    """A JPEG of noise at several scales."""
    rng = np.random.default_rng(width * height)
    layers = [rng.integers(0, 256, (max(height // k, 1), max(width // k, 1), 3)).astype(np.uint8) for k in (2, 7, 40)]
    images = [np.asarray(Image.fromarray(layer).resize((width, height)), np.float32) for layer in layers]
    file = io.BytesIO()
    Image.fromarray(np.mean(images, 0).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


CROPS = sorted({(info.images.size, info.images.crop, info.images.interpolation) for info in map(model_info, list_models())})


@pytest.mark.parametrize(("image_size", "crop", "interpolation"), [*CROPS, (224, 0.875, "bilinear")])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_evaluation_images(width, height, image_size, crop, interpolation):
    data = photo(width, height)
    theirs = create_transform(image_size, is_training=False, crop_pct=crop, interpolation=interpolation, normalize=False)
    ours = resize_and_crop(decode(data, 3)[0], image_size, crop, interpolation)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(theirs(image.convert("RGB")))
    np.testing.assert_array_equal(ours.transpose(2, 0, 1), wanted)
