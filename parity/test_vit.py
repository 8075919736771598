"""ViT and those that differ from it little against timm.

Models of the base size and above, and those for large images, take long: ``pytest -m heavy parity/test_vit.py`` compares them
by hand, on a machine with 16 GB.
"""

import jax
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from lbpwht_jax import create_model
from lbpwht_jax.models import list_models
from lbpwht_jax.models.vit import resample_positions
from lbpwht_jax.weights.pretrained import export_weights, load_pretrained
from lbpwht_jax.weights.timm_keys import from_timm
from lbpwht_jax.weights.torch_file import read_torch_file
from parity import util

OURS = "vit_micro_patch4_28"  # which timm does not have
NAMES = sorted({*list_models("vit_*_patch*"), *list_models("deit*")} - {*list_models("*dinov3*"), OURS})
LARGE = {name for name in NAMES if "_large_" in name or "_huge_" in name or "_so400m_" in name}
SLOW = {name for name in NAMES if "_384" in name or "_patch8_" in name or name.startswith(("deit3_base", "deit3_medium"))}
SLOW |= {"vit_base_patch14_dinov2", "vit_base_patch14_reg4_dinov2"}
# One of each kind.
KINDS = {
    "vit_small_patch14_reg4_dinov2": 224,
    "vit_base_patch32_clip_quickgelu_224": 224,
    "vit_base_patch16_siglip_224": 96,
}


def reference(name, image_size=None, num_classes=util.CLASSES):
    fields = {} if image_size is None else {"img_size": image_size}
    return util.randomise(timm.create_model(name, num_classes=num_classes, **fields))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.heavy] * (name in LARGE | SLOW)) for name in NAMES])
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


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 160),
        ("deit_tiny_distilled_patch16_224", 160),
        ("deit3_small_patch16_224", 160),
        ("vit_small_patch14_dinov2", 224),
        ("vit_small_patch14_reg4_dinov2", 252),
        ("vit_base_patch32_clip_224", 160),
        ("vit_base_patch16_siglip_224", 96),
        ("vit_base_patch16_siglip_gap_224", 96),
    ],
)
def test_logits_at_another_size(name, size):
    util.check_logits(name, reference(name, size), size)


@pytest.mark.parametrize(("name", "size"), [("deit_tiny_distilled_patch16_224", 224), *KINDS.items()])
def test_gradients(name, size):
    util.check_gradients(name, reference(name, size), size)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_base_patch32_clip_224"])
def test_features(name):
    """timm's outputs without a classifier: a head that changes nothing shows ours."""
    model = reference(name, 224, num_classes=0)
    module = create_model(name, num_classes=model.num_features, image_size=224)
    head = {"head.weight": np.eye(model.num_features, dtype=np.float32), "head.bias": np.zeros(model.num_features, np.float32)}
    variables = from_timm(name, module, util.state_of(model) | head)
    images = util.images_for(name, 224)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert util.relative(jax.jit(module.apply)(variables, images), theirs) < util.LOGITS


def test_low_rank():
    util.check_low_rank("vit_tiny_patch16_224", reference("vit_tiny_patch16_224"))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("deit_tiny_distilled_patch16_224", size) for size in (96, 192, 288, 384)),
        ("vit_small_patch14_dinov2", 224),
        ("vit_small_patch14_reg4_dinov2", 224),
    ],
)
def test_resampled_positions(name, size):
    """Errors of a float32 interpolation of values up to about 5, against timm's own loading of another size."""
    model = reference(name)
    target = timm.create_model(name, img_size=size)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), target)
    module = create_model(name, image_size=size)
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


def test_metas_files_of_dinov2(tmp_path):
    """A file in Meta's layout is what timm makes of it."""
    name = "vit_small_patch14_reg4_dinov2"
    model = reference(name, 56)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    positions = torch.randn(1, 17, 384, generator=torch.Generator().manual_seed(0))
    state |= {"register_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, 384), "pos_embed": positions}
    torch.save(state, tmp_path / "meta.pth")
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(state), model), strict=True)
    ours = load_pretrained(name, tmp_path / "meta.pth", image_size=56)
    images = util.images_for(name, 56)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    module = create_model(name, num_classes=util.CLASSES, image_size=56)
    assert util.relative(jax.jit(module.apply)(ours, images), theirs) < util.LOGITS
