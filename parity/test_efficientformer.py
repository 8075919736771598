"""Both EfficientFormer families against timm."""

import re

import numpy as np
import pytest
import timm
import torch
from timm.models.efficientformer import Attention

from lbpwht_jax import create_model
from lbpwht_jax.models import model_info
from parity import util

# Biases that add the same to a query's every logit, and so nothing to its softmax.
ZERO = r"/k/(conv|bn)/bias$|talking_head1/bias$"


@torch.no_grad()
def randomise(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Draws every tensor of a timm model so that none is trivial; running statistics become those of random images."""
    rng = np.random.default_rng(0)

    def uniform(low, high, shape):
        return torch.from_numpy(rng.uniform(low, high, tuple(shape)).astype(np.float32))

    for key, tensor in model.named_parameters():
        if key.endswith("talking_head2.bias"):  # counts once a key
            tensor.copy_(uniform(-0.01, 0.01, tensor.shape))
        elif key.endswith(("attention_biases", "bias")):
            tensor.copy_(uniform(-1, 1, tensor.shape))
        elif tensor.ndim == 1:  # layer scale and the factors of norms
            tensor.copy_(uniform(0.5, 1.5, tensor.shape))
        else:
            bound = (3 / np.prod(tensor.shape[1:])) ** 0.5
            tensor.copy_(uniform(-bound, bound, tensor.shape))
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0
    model.train()
    model(images)
    model.eval()


def reference(name, image_size=224):
    """timm's model in evaluation mode, every tensor at random."""
    model = timm.create_model(name, num_classes=util.CLASSES, img_size=image_size)
    if name.startswith("efficientformer_") and image_size != 224:
        # timm builds this family for 224 pixels only; its attention takes the size of its map, here of the other image
        for block in model.stages[-1].blocks:
            if hasattr(block, "token_mixer") and hasattr(block.token_mixer, "qkv"):
                block.token_mixer = Attention(block.token_mixer.qkv.in_features, resolution=-(-image_size // 32))
    randomise(model, torch.from_numpy(util.images_for(name, image_size, batch=4)).permute(0, 3, 1, 2))
    return model


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("efficientformer_l1", 224),
        ("efficientformer_l1", 256),
        ("efficientformer_l3", 224),
        ("efficientformer_l7", 224),
        ("efficientformerv2_s0", 224),
        ("efficientformerv2_s0", 216),
        ("efficientformerv2_s1", 224),
        ("efficientformerv2_s2", 224),
        ("efficientformerv2_s2", 256),
        ("efficientformerv2_l", 224),
    ],
)
def test_logits_and_round_trip(name, image_size):
    model = reference(name, image_size)
    util.check_logits(name, model, image_size)
    util.check_round_trip(name, model, image_size)


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformer_l7", "efficientformerv2_s0"])
def test_buffers_are_timms(name):
    info, module = model_info(name), create_model(name)
    expected = {k: v.numpy() for k, v in timm.create_model(name).state_dict().items() if re.search(info.files.buffers, k)}
    actual = info.files.make_buffers(module)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        np.testing.assert_array_equal(actual[key], value)


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_gradients(name):
    util.check_gradients(name, reference(name), zero=ZERO)


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_low_rank(name):
    util.check_low_rank(name, reference(name), zero=ZERO)
