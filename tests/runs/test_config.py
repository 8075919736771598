import copy
import json

import pytest

from lbpwht_jax.data import Augmentation
from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.runs.folder import read_config
from lbpwht_jax.train import Recipe

# As written before pydantic read it: lists for tuples, a whole number for a float, versions and device beside the run's own
WRITTEN = {
    "model": "vit_micro_patch4_28",
    "pretrained": "bundled",
    "image_size": 28,
    "channels": 1,
    "mean": [0.5],
    "std": [0.5],
    "interpolation": "bicubic",
    "crop": 1,
    "dataset": "digits",
    "data_dir": None,
    "classes": ["zero", "one"],
    "method": "lp_l1-4+lora_all-8",
    "train": "last_stage",
    "projection": "fitted",
    "when": "faster",
    "dtype": "float32",
    "remat": False,
    "recipe": {
        "epochs": 2,
        "lr": 1,
        "augmentation": {"crop_scale": [0.08, 1.0], "randaugment": [2, 9], "flip": True},
        "seed": 3,
    },
    "steps": 44,
    "versions": {"jax": "0.10.2"},
    "device": "cpu",
}


def folder(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_a_configuration_that_was_written_before_is_read(tmp_path):
    config = read_config(folder(tmp_path, WRITTEN))
    augmentation = Augmentation(crop_scale=(0.08, 1.0), randaugment=(2, 9.0), flip=True)
    assert config.recipe == Recipe(2, lr=1.0, augmentation=augmentation, seed=3)
    assert (config.mean, config.classes, config.crop) == ((0.5,), ("zero", "one"), 1.0)


def test_there_and_back(tmp_path):
    config = read_config(folder(tmp_path, WRITTEN))
    values = config.to_json()
    assert values["recipe"]["augmentation"]["crop_scale"] == [0.08, 1.0] and values["classes"] == ["zero", "one"]
    added = ["residuals", "scan_blocks", "validation", "lora_alpha", "lora_dropout", "extended", "plan"]
    assert list(values) == [*(key for key in WRITTEN if key not in ("steps", "versions", "device")), *added]
    assert RunConfig.from_json(json.dumps(values)) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", "28", "image_size must be a valid integer, got '28'"),
        ("remat", 1, "remat must be a valid boolean, got 1"),
        ("classes", ["zero", 1], "classes.1 must be a valid string, got 1"),
        ("dtype", "float64", "dtype must be 'float32' or 'bfloat16', got 'float64'"),
        ("train", "some", "train must be 'all', 'last_stage' or 'head', got 'some'"),
        ("model", "vit_tiny", "model: unknown model 'vit_tiny'; nearest: vit_tiny_patch16_224"),
        ("method", "lp_l2-3", "method: unknown method 'lp_l2-3'; write full, "),
        ("recipe.lr", "fast", "recipe.lr must be a valid number, got 'fast'"),
        ("recipe.epochs", 0, "recipe.epochs must be greater than 0, got 0"),
        ("recipe.epochs", 2.0, "recipe.epochs must be a valid integer, got 2.0"),
        ("recipe.seed", 2**64, "recipe.seed must be less than 4294967296, got 18446744073709551616"),
        ("recipe.augmentation.randaugment", [10**6, 5], "recipe.augmentation.randaugment.0 must be less than or equal to 100"),
        ("recipe.augmentation.mixup", float("inf"), "recipe.augmentation.mixup must be a finite number, got inf"),
        ("mean", "abc", "mean must be a valid "),
        ("mean", [0.5, 0.5], "mean must have 1 numbers, one per channel, got (0.5, 0.5)"),
        ("std", [0], "std.0 must be greater than 0, got 0"),
        ("crop", 0, "crop must be greater than 0, got 0"),
        ("interpolation", "nearest", "interpolation must be 'bicubic' or 'bilinear', got 'nearest'"),
        ("channels", 2, "channels must be 1 or 3, got 2"),
        ("classes", [], "classes: Tuple should have at least 1 item after validation, not 0, got []"),
        ("method", 5, "method must be a valid string, got 5"),
        ("method", "lp_l1-\uff14", "method: unknown method 'lp_l1-\uff14'; write full, "),
        ("validation", 1, "validation must be less than 1, got 1"),
        ("recipe.rate", 0.1, "recipe.rate: Unexpected keyword argument, got 0.1"),
        ("recipe.augmentation.crop_scale", [0.5], "recipe.augmentation.crop_scale.1 is missing"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(field, value, message, tmp_path):
    values = copy.deepcopy(WRITTEN)
    *parents, name = field.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    place[name] = value
    with pytest.raises(ValueError) as raised:
        read_config(folder(tmp_path, values))
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: no configuration of this version's: {message}")


def test_a_field_is_missing_or_the_file_is_cut_short(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: .*: method is missing$"):
        read_config(folder(tmp_path, {key: value for key, value in WRITTEN.items() if key != "method"}))
    for text in (b'{"model": "vit', b"[" * 100_000, b'{"model": ' * 5000, b"\xff\xfe{}", b""):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"config\.json: .*Invalid JSON"):
            read_config(tmp_path)
