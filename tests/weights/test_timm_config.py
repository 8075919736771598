"""The ``config.json`` that timm writes beside weights."""

import json

import pytest

from lbpwht_jax.models import Images, model_info
from lbpwht_jax.weights.sources import hub_id
from lbpwht_jax.weights.timm_config import timm_config, timm_model

NAME = "vit_base_patch16_clip_224"
# As on the hub, cut.
CONFIG = {
    "architecture": NAME,
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "openai_ft_in1k",
        "input_size": [3, 240, 240],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
    },
}


def folder(path, config):
    (path / "model.safetensors").write_bytes(b"")
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_images_are_those_of_the_weights(tmp_path):
    folder(tmp_path, CONFIG)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        images = timm_config(source).over(model_info(NAME).images)
        assert images == Images(240, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bilinear", 0.9)
        assert timm_model(source) == NAME


def test_what_is_not_said_is_the_tables(tmp_path):
    like = model_info(NAME).images
    assert timm_config(folder(tmp_path, {**CONFIG, "pretrained_cfg": {}})).over(like) == like


@pytest.mark.parametrize("config", [{"model_type": "vit"}, {"model": "a run's"}, [], "3"])
def test_what_is_not_timms_is_left_alone(tmp_path, config):
    assert timm_config(folder(tmp_path, config)) is None
    assert timm_model(tmp_path) is None


def test_no_config(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert timm_config(tmp_path / "a.safetensors") is None
    with pytest.raises(FileNotFoundError, match="no such file or folder, nor a hub id"):
        timm_config("nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": [3, 224, 240]}, "input_size must be that of square images of 3 channels"),
        ({"input_size": [1, 224, 224]}, "input_size must be that of square images of 3 channels"),
        ({"input_size": 224}, "input_size must be like"),
        ({"mean": [0.5]}, "mean must be like"),
        ({"std": [0.5, 0.5, 0]}, "std must be like"),
        ({"crop_pct": "all"}, "crop_pct must be like"),
        ({"interpolation": "nearest"}, "interpolation must be bicubic or bilinear, got 'nearest'"),
    ],
)
def test_values_that_images_cannot_have(tmp_path, change, message):
    config = timm_config(folder(tmp_path, {**CONFIG, "pretrained_cfg": CONFIG["pretrained_cfg"] | change}))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        config.over(model_info(NAME).images)


@pytest.mark.parametrize(("text", "message"), [("{", "not a JSON file"), ('{"pretrained_cfg": 3}', "architecture must be")])
def test_damaged_configs(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        timm_config(folder(tmp_path, text))


def test_names_of_weights(tmp_path, monkeypatch):
    """``NAME.TAG`` is timm's repository of that name; its configuration is read from the hub's cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert (
        hub_id(f"{NAME}.openai")
        == hub_id(f"timm/{NAME}.openai")
        == hub_id(f"hf-hub:timm/{NAME}.openai")
        == f"timm/{NAME}.openai"
    )
    assert hub_id("resnet50.a1_in1k") == "resnet50.a1_in1k"
    assert timm_model(f"{NAME}.openai", offline=True) == NAME
    assert timm_config(f"{NAME}.openai", offline=True) is None
    cached = tmp_path / f"models--timm--{NAME}.openai"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    folder(cached / "snapshots" / ("0" * 40), CONFIG)
    assert timm_config(f"{NAME}.openai", offline=True).images == CONFIG["pretrained_cfg"]
