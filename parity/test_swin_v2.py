"""Swin Transformer V2 against timm."""

import pytest
import timm
import torch

from lbpwht_jax.models import list_models
from parity import util

TINY = "swinv2_tiny_window8_256"
# At 224 pixels maps of 56, 28, 14 and 7 tokens: padded windows and a window smaller than the model's. At 120 also an odd
# map (15) to merge, and a window of 4: every kind of window occurs.
OTHER_SIZES = (224, 120)


def reference(name, image_size):
    """timm's model with every tensor at random, such that activations stay of order one and every entry matters."""
    model = timm.create_model(name, num_classes=util.CLASSES, img_size=image_size).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            normal = torch.randn(value.shape, generator=generator)
            if key.endswith("logit_scale"):
                # from 0 to above the clamp, which is at log(100) = 4.6
                value.copy_(5.5 * torch.rand(value.shape, generator=generator))
            elif key.endswith("cpb_mlp.2.weight"):
                value.copy_(0.1 * normal)
            elif value.ndim > 1:
                value.copy_(normal / value[0].numel() ** 0.5)
            else:
                value.copy_((1 if key.endswith("weight") else 0) + 0.3 * normal)
    return model


@pytest.mark.parametrize(
    ("name", "image_size"), [(name, 256) for name in list_models("swin*")] + [(TINY, size) for size in OTHER_SIZES]
)
def test_logits_and_round_trip(name, image_size):
    model = reference(name, image_size)
    util.check_logits(name, model, image_size)
    util.check_round_trip(name, model, image_size)


def test_gradients():
    util.check_gradients(TINY, reference(TINY, 120), 120)


def test_low_rank():
    util.check_low_rank(TINY, reference(TINY, 120), 120)
