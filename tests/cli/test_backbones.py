"""Today's backbones by the command line: narrow ones, from files in timm's layout, with and without a classifier."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lbpwht_jax.cli import main
from lbpwht_jax.models import model_info, plain_model, registry
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs.finished import load_run
from lbpwht_jax.weights import load_weights
from lbpwht_jax.weights.timm_keys import to_timm
from lbpwht_jax.weights.write import write_safetensors

NARROW = {
    "vit_small_patch14_reg4_dinov2": {"dim": 24, "depth": 2, "heads": 2},
    "convnextv2_tiny": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
}
SHORT = ["--epochs", "1", "--batch-size", "64", "--lr", "2e-3", "--warmup-steps", "2", "--dataset", "digits"]


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Makes a folder as the hub has it of a narrow model's random weights, without a classifier, for images of 56 pixels."""

    def make(name):
        info = model_info(name)
        monkeypatch.setitem(registry._MODELS, name, dataclasses.replace(info, arguments={**info.arguments, **NARROW[name]}))
        module = plain_model(name, num_classes=1, image_size=56)
        shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 56, 56, 3), np.float32))
        rng = np.random.default_rng(0)
        variables = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)
        state = to_timm(name, module, variables)
        state = {key: value for key, value in state.items() if not key.startswith("head.") or key.startswith("head.norm")}
        folder = tmp_path / "published"
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
        images = {"input_size": [3, 56, 56], "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2], "crop_pct": 1.0}
        (folder / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 0, "pretrained_cfg": images}))
        return folder, variables["params"]

    return make


def finetune(folder, run, *flags):
    assert main(["finetune", "--pretrained", str(folder), *SHORT, *flags, "--output", str(run)]) == 0
    return run_folder.read_config(run), load_weights(run / "weights.safetensors")[0]["params"]


@pytest.mark.heavy
def test_linear_probe(published, tmp_path):
    """The model's name and its images come from the configuration beside the weights; the head alone is trained."""
    folder, before = published("vit_small_patch14_reg4_dinov2")
    config, after = finetune(folder, tmp_path / "run", "--method", "full", "--train", "head")
    assert (config.model, config.image_size, config.mean) == ("vit_small_patch14_reg4_dinov2", 56, (0.4, 0.4, 0.4))
    np.testing.assert_array_equal(after["reg_token"], before["reg_token"])
    np.testing.assert_array_equal(after["blocks_1"]["mlp"]["fc2"]["kernel"], before["blocks_1"]["mlp"]["fc2"]["kernel"])
    assert after["head"]["kernel"].shape == (24, 10)
    assert np.abs(after["head"]["bias"]).max() > 0


@pytest.mark.heavy
@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("flags", [["--method", "lp_l1-4"], ["--method", "lora_all-2", "--residuals", "lean", "--scan-blocks"]])
def test_finetune_and_export(published, tmp_path, name, flags):
    folder, before = published(name)
    run = tmp_path / "run"
    _, after = finetune(folder, run, *flags)
    trained, given = (tree.get("stages_0", tree)["blocks_0"]["mlp"]["fc1"]["kernel"] for tree in (after, before))
    assert np.isfinite(trained).all()
    assert not np.array_equal(trained, given)
    assert main(["export", str(run), str(tmp_path / "timm.safetensors")]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert load_run(run).config.model == name
