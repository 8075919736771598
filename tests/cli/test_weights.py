"""The commands about weights, called as the command line does."""

import json
import os
import stat

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tyro

from lbpwht_jax import create_model
from lbpwht_jax.cli import main
from lbpwht_jax.cli.weights import Convert, Export
from lbpwht_jax.weights.pretrained import read_weights
from lbpwht_jax.weights.sources import class_names
from lbpwht_jax.weights.timm_keys import entries

NAME = "vit_micro_patch4_28"


@pytest.fixture
def timm_file(tmp_path):
    rng = np.random.default_rng(0)
    state = {e.key: rng.standard_normal(e.shape, np.float32) for e in entries(NAME, create_model(NAME, num_classes=10))}
    safetensors.numpy.save_file(state, tmp_path / "timm.safetensors")
    return tmp_path / "timm.safetensors", state


def test_there_and_back(timm_file, tmp_path, capsys):
    source, state = timm_file
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    tyro.cli(Convert, args=[NAME, str(source), str(ours)]).prepare()
    assert capsys.readouterr().out == f"{ours}: {NAME} for 10 classes at 28 pixels, flax layout\n"
    assert "params/blocks_5/mlp/fc2/kernel" in read_weights(ours)
    tyro.cli(Export, args=[NAME, str(ours), str(back)]).prepare()
    written = read_weights(back)
    assert written.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(written[key], value, strict=True, err_msg=key)
    with safetensors.safe_open(back, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_class_names_are_kept_with_the_head(timm_file, tmp_path):
    _, state = timm_file
    source, output = tmp_path / "named.safetensors", tmp_path / "a.safetensors"
    names = [f"class {i}" for i in range(10)]
    safetensors.numpy.save_file(state, source, {"classes": json.dumps(names)})
    for command, more, wanted in ((Convert, [], names), (Export, [], names), (Convert, ["--num-classes", "3"], None)):
        tyro.cli(command, args=[NAME, str(source), str(output), *more]).prepare()
        with safetensors.safe_open(output, "np") as file:
            assert json.loads(file.metadata().get("classes", "null")) == wanted
    safetensors.numpy.save_file(state, source, {"classes": '{"a": 1}'})
    with pytest.raises(ValueError, match=r"named\.safetensors: the header's classes must be a list of names"):
        class_names(source)


def test_new_head_and_image_size(timm_file, tmp_path):
    arguments = [NAME, str(timm_file[0]), str(tmp_path / "a.safetensors"), "--num-classes", "3", "--image-size", "40"]
    tyro.cli(Export, args=[*arguments, "--format", "flax"]).prepare()
    written = read_weights(tmp_path / "a.safetensors")
    assert written["params/head/kernel"].shape == (96, 3)
    assert written["params/pos_embed"].shape == (1, 101, 96)


def test_outputs_that_cannot_be(timm_file, tmp_path, capsys):
    source, _ = timm_file
    for output, code, message in (
        (tmp_path / "none" / "a.safetensors", 2, f"there is no folder {tmp_path / 'none'}; make it first"),
        ("/dev/full", 2, "cannot write /dev/full: it is there and is no regular file; name another"),
        (tmp_path, 2, f"cannot write {tmp_path}: it is there and is no regular file"),
        ("/proc/a.safetensors", 1, "cannot write /proc/a.safetensors: "),
    ):
        for command in (["convert", NAME], ["export", NAME]):
            assert main([*command, str(source), str(output)]) == code
            error = capsys.readouterr().err
            assert message in error and len(error.splitlines()) == 1
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    (tmp_path / "old.safetensors").write_bytes(source.read_bytes())
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "old.safetensors")
    assert main(["convert", NAME, str(source), str(tmp_path / "link.safetensors")]) == 0
    assert "params/blocks_5/mlp/fc2/kernel" in read_weights(tmp_path / "old.safetensors")
