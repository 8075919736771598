"""Damaged files of weights: each is read, or refused by name; nothing else happens."""

import json
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from damage import assert_says, damaged, edited
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lbpwht_jax import LoRA, adapt, create_model
from lbpwht_jax.weights import load_pretrained, load_weights
from lbpwht_jax.weights.peft import load_adapter, save_adapter
from lbpwht_jax.weights.timm_keys import entries
from lbpwht_jax.weights.torch_file import read_torch_file

FIXTURE = Path(__file__).parents[1] / "fixtures" / "torch_file.pth"
NAME = "vit_micro_patch4_28"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def read(function, path):
    """What a function makes of a file; None if it refuses the file by its name."""
    try:
        return function(path)
    except ValueError as error:
        assert_says(error, str(path))
        return None


STATE = {"a/kernel": np.ones((2, 3), np.float32), "a/bias": np.ones(3, jnp.bfloat16), "b": np.arange(4)}
SAFETENSORS = safetensors.numpy.save(STATE, {"model": '"m"', "classes": '["x", "y"]'})


@given(data=damaged(SAFETENSORS))
def test_damaged_safetensors(folder, data):
    path = folder / "a.safetensors"
    path.write_bytes(data)
    if (found := read(load_weights, path)) is not None:
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(found[0])) <= len(data)


@given(choices=st.data())
def test_headers_edited_by_hand(folder, choices):
    length = int.from_bytes(SAFETENSORS[:8], "little")
    header = choices.draw(edited(json.loads(SAFETENSORS[8 : 8 + length])))
    text = json.dumps(header).encode()
    path = folder / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + SAFETENSORS[8 + length :])
    read(load_weights, path)


@given(data=damaged(FIXTURE.read_bytes()))
def test_damaged_torch_files(folder, data):
    path = folder / "a.pth"
    path.write_bytes(data)
    if (found := read(read_torch_file, path)) is not None:
        assert sum(tensor.nbytes for tensor in found.values()) <= 16 * len(data) + 2**20


with zipfile.ZipFile(FIXTURE) as whole:
    MEMBERS = {member: whole.read(member) for member in whole.namelist()}


@given(choices=st.data())
def test_damaged_pickles(folder, choices):
    path = folder / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, choices.draw(damaged(content)) if name.endswith("data.pkl") else content)
    read(read_torch_file, path)


IMAGES = jnp.ones((3, 2))
ADAPTED = adapt(nn.Dense(2, name="fc"), [LoRA("", rank=1, alpha=4)], IMAGES)


@pytest.fixture(scope="module")
def adapter(folder):
    variables = jax.jit(ADAPTED.init)(jax.random.key(0), IMAGES)
    save_adapter(folder / "adapter", ADAPTED, variables)
    return folder / "adapter" / "adapter_config.json", variables


CONFIG = {"r": 1, "lora_alpha": 4, "alpha_pattern": {"fc|x.*": 4}, "use_rslora": False, "target_modules": ["fc"]}


@given(config=edited(CONFIG))
def test_adapters_edited_by_hand(adapter, config):
    path, variables = adapter
    path.write_text(json.dumps(config))
    read(lambda path: load_adapter(path.parent, ADAPTED, variables), path)


@given(data=damaged(json.dumps(CONFIG).encode()))
def test_damaged_adapters(adapter, data):
    path, variables = adapter
    path.write_bytes(data)
    read(lambda path: load_adapter(path.parent, ADAPTED, variables), path)


WANTED = {entry.key: np.zeros(entry.shape, np.float32) for entry in entries(NAME, create_model(NAME, num_classes=10))}


# few, for each traces the shapes of a model
@settings(max_examples=settings.default.max_examples // 20)
@given(choices=st.data())
def test_tensors_of_other_shapes(folder, choices):
    state = dict(WANTED)
    for key in choices.draw(st.lists(st.sampled_from(["head.weight", "head.bias", "pos_embed", *WANTED]), min_size=1)):
        dtype = choices.draw(st.sampled_from([np.float32, np.float16, np.int32, np.bool_]))
        state[key] = np.zeros(choices.draw(arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)), dtype)
    path = folder / "w.safetensors"
    safetensors.numpy.save_file(state, path)
    read(lambda path: load_pretrained(NAME, path), path)
