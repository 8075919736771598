"""ViT and DeiT against timm. vit_large_patch16_224 is left out for its size; it differs from the others in numbers alone."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from lbpwht_jax import create_model
from lbpwht_jax.models import list_models
from lbpwht_jax.models.vit import resample_positions
from lbpwht_jax.weights.pretrained import export_weights, load_pretrained
from lbpwht_jax.weights.torch_file import read_torch_file
from parity import util

NAMES = sorted({*list_models("vit_*_224"), *list_models("deit_*")} - {"vit_large_patch16_224"})


def reference(name, image_size=224, num_classes=util.CLASSES):
    return util.randomise(timm.create_model(name, num_classes=num_classes, img_size=image_size))


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_round_trip(name):
    model = reference(name)
    util.check_logits(name, model)
    util.check_round_trip(name, model)


def test_epsilon_of_the_norms():
    """Embeddings so small that the first normalisation's epsilon decides; at order one it is lost in rounding."""
    model = reference("vit_tiny_patch16_224")
    with torch.no_grad():
        for parameter in (model.cls_token, model.pos_embed, *model.patch_embed.parameters()):
            parameter.mul_(1e-3)
    util.check_logits("vit_tiny_patch16_224", model)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_logits_at_another_size(name):
    util.check_logits(name, reference(name, 160), 160)


def test_gradients():
    util.check_gradients("deit_tiny_distilled_patch16_224", reference("deit_tiny_distilled_patch16_224"))


def test_low_rank():
    util.check_low_rank("vit_tiny_patch16_224", reference("vit_tiny_patch16_224"))


@pytest.mark.parametrize("size", [96, 192, 288, 384])
def test_resampled_positions(size):
    """Errors of a float32 interpolation of values up to about 5, against timm's own loading of another size."""
    model = reference("deit_tiny_distilled_patch16_224")
    target = timm.create_model("deit_tiny_distilled_patch16_224", img_size=size)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), target)
    module = create_model("deit_tiny_distilled_patch16_224", image_size=size)
    ours = resample_positions(util.state_of(model), module)
    np.testing.assert_allclose(ours["pos_embed"], filtered["pos_embed"].numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_files(tmp_path, suffix):
    """A file torch writes is read here without torch, and a file written here is read by timm."""
    name = "vit_tiny_patch16_224"
    model = reference(name)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        export_weights(name, create_model(name, num_classes=util.CLASSES), load_pretrained(name, save(model, tmp_path)), path)
        model.load_state_dict(load_file(path), strict=True)
    else:
        torch.save({"model": model.state_dict(), "epoch": 3}, path)
    variables = load_pretrained(name, path)
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], model.head.weight.detach().numpy().T)


def save(model, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_views_and_half_precision(tmp_path):
    """Views keep their strides, halves and bfloat16 their values."""
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "view": base[1:3, ::2].T,
        "parameter": torch.nn.Parameter(base),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "bool": base > 0,
    }
    torch.save({"state_dict": tensors}, tmp_path / "tensors.pth")
    read = read_torch_file(tmp_path / "tensors.pth")
    assert read.keys() == tensors.keys()
    for key, value in tensors.items():
        theirs = value.detach()
        assert read[key].dtype.name == str(theirs.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.asarray(read[key], np.float32), theirs.float().numpy())
