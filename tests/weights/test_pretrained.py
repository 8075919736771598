"""Weights from files into variables, and the errors of files that are not what they should be."""

import json
import logging
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lbpwht_jax import create_model
from lbpwht_jax.weights.files import read_safetensors
from lbpwht_jax.weights.pretrained import export_weights, load_pretrained, number_of_classes, read_weights
from lbpwht_jax.weights.timm_keys import entries, to_timm

NAME = "vit_micro_patch4_28"
KEYS = Path(__file__).parents[1] / "fixtures" / "keys"


def random_state(name=NAME, num_classes=10, **options):
    rng = np.random.default_rng(0)
    module = create_model(name, num_classes=num_classes, **options)
    return {entry.key: rng.standard_normal(entry.shape, np.float32) for entry in entries(name, module)}


def save(path, state):
    safetensors.numpy.save_file(state, path)
    return path


@pytest.fixture
def weights(tmp_path):
    """A file of 10 classes, and its state dict."""
    state = random_state()
    return save(tmp_path / "weights.safetensors", state), state


def assert_same(variables, state, **options):
    back = to_timm(NAME, create_model(NAME, **options), variables)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, strict=True, err_msg=key)


def test_timm_file(weights):
    path, state = weights
    assert_same(load_pretrained(NAME, path), state, num_classes=10)
    assert_same(load_pretrained(NAME, str(path), num_classes=10), state, num_classes=10)


def test_folder(tmp_path):
    state = random_state()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_pretrained(NAME, tmp_path)
    save(tmp_path / "model.safetensors", state)
    assert_same(load_pretrained(NAME, tmp_path), state, num_classes=10)


@pytest.mark.parametrize("format", ["timm", "flax"])
def test_save_and_load(tmp_path, weights, format):
    path, state = weights
    variables = load_pretrained(NAME, path)
    names = [f"class {i}" for i in range(10)]
    export_weights(NAME, create_model(NAME, num_classes=10), variables, tmp_path / "saved.safetensors", format, names)
    written = read_weights(tmp_path / "saved.safetensors")
    assert json.loads(read_safetensors(tmp_path / "saved.safetensors")[1]["classes"]) == names
    if format == "timm":
        assert written.keys() == state.keys()
    else:
        np.testing.assert_array_equal(
            written["params/blocks_0/attn/qkv/kernel"], state["blocks.0.attn.qkv.weight"].T, strict=True
        )
    assert_same(load_pretrained(NAME, tmp_path / "saved.safetensors"), state, num_classes=10)


def test_saving_errors(tmp_path, weights):
    variables = load_pretrained(NAME, weights[0])
    with pytest.raises(ValueError, match="format must be 'timm' or 'flax', got 'npz'"):
        export_weights(NAME, create_model(NAME, num_classes=10), variables, tmp_path / "a", "npz")
    with pytest.raises(ValueError, match="do not fit the module"):
        export_weights(NAME, create_model(NAME, num_classes=11), variables, tmp_path / "a", "flax")
    with pytest.raises(ValueError, match=r"1 classes are named, and .* has 10 outputs"):
        export_weights(NAME, create_model(NAME, num_classes=10), variables, tmp_path / "a", classes=["one"])
    assert not (tmp_path / "a").exists()


def test_new_head_is_zeros_and_said(weights, caplog):
    path, state = weights
    caplog.set_level(logging.INFO, "lbpwht_jax")
    variables = load_pretrained(NAME, path, num_classes=7)
    assert "a new head for 7 classes, zeros; the file's has 10: head.bias, head.weight" in caplog.text
    state |= {"head.weight": np.zeros((7, 96), np.float32), "head.bias": np.zeros(7, np.float32)}
    assert_same(variables, state, num_classes=7)
    assert number_of_classes(NAME, variables) == 7


def test_kept_head_says_nothing(weights, caplog):
    caplog.set_level(logging.INFO, "lbpwht_jax")
    load_pretrained(NAME, weights[0], num_classes=10)
    assert "new head" not in caplog.text


def test_files_without_a_head(tmp_path):
    state = random_state()
    del state["head.weight"], state["head.bias"]
    path = save(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match=r"2 missing\n  - head\.bias \[1000\]\n  - head\.weight \[1000, 96\]\n.*num_classes"):
        load_pretrained(NAME, path)
    assert not load_pretrained(NAME, path, num_classes=3)["params"]["head"]["kernel"].any()


def test_both_heads_of_distilled_models_are_replaced(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    path = save(tmp_path / "a.safetensors", random_state(name))
    params = load_pretrained(name, path, num_classes=3)["params"]
    for head in ("head", "head_dist"):
        np.testing.assert_array_equal(params[head]["kernel"], np.zeros((192, 3), np.float32), strict=True)


def test_another_image_size_resamples_the_grid_alone(weights, caplog):
    path, state = weights
    caplog.set_level(logging.INFO, "lbpwht_jax")
    variables = load_pretrained(NAME, path, image_size=40)
    assert "resampled pos_embed [1, 50, 96] to [1, 101, 96]" in caplog.text
    positions = variables["params"].pop("pos_embed")
    assert positions.shape == (1, 101, 96)
    np.testing.assert_array_equal(positions[:, 0], state["pos_embed"][:, 0])
    assert not np.array_equal(positions[:, 1:50], state["pos_embed"][:, 1:])
    np.testing.assert_array_equal(variables["params"]["norm"]["scale"], state["norm.weight"])


def test_half_precision_files(tmp_path, weights):
    _, state = weights
    halves = {key: value.astype(np.float16) for key, value in state.items()}
    assert_same(
        load_pretrained(NAME, save(tmp_path / "half.safetensors", halves)),
        {key: value.astype(np.float32) for key, value in halves.items()},
        num_classes=10,
    )
    data = np.arange(4).astype(jnp.bfloat16)
    header = b'{"a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}'
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data.tobytes())
    np.testing.assert_array_equal(read_weights(tmp_path / "b.safetensors")["a"], data, strict=True)


def test_transformers_names(tmp_path):
    """Full-size keys of transformers' files, from the fixture."""
    shapes = json.loads((KEYS / "transformers" / "vit_tiny_patch16_224.json").read_text())
    rng = np.random.default_rng(0)
    state = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    params = load_pretrained("vit_tiny_patch16_224", save(tmp_path / "model.safetensors", state))["params"]
    np.testing.assert_array_equal(params["head"]["kernel"], state["classifier.weight"].T, strict=True)
    prefix = "vit.encoder.layer.11.attention.attention."
    for i, part in enumerate(("query", "key", "value")):
        kernel = params["blocks_11"]["attn"]["qkv"]["kernel"][:, 192 * i : 192 * (i + 1)]
        np.testing.assert_array_equal(kernel, state[f"{prefix}{part}.weight"].T, strict=True)


def test_loaded_variables_run(weights):
    variables = load_pretrained(NAME, weights[0], image_size=20)
    logits = create_model(NAME, num_classes=10, image_size=20).apply(variables, jnp.zeros((1, 20, 20, 1)))
    assert logits.shape == (1, 10)
    assert bool(jnp.isfinite(logits).all())
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("kept", [5, 100, -1])
def test_truncated_safetensors(weights, kept):
    path, _ = weights
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"weights\.safetensors: no complete safetensors file"):
        load_pretrained(NAME, path)


def test_pickle_with_code(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "a.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match=r"a\.bin: no complete zip archive"):
        load_pretrained(NAME, tmp_path / "a.bin")


def test_another_models_weights(tmp_path):
    path = save(tmp_path / "a.safetensors", {"stem.conv1.weight": np.zeros((24, 3, 3, 3), np.float32)})
    with pytest.raises(ValueError, match=rf"load_pretrained\('{NAME}', '.*a\.safetensors'\): the file does not fit") as caught:
        load_pretrained(NAME, path)
    assert "  - blocks.0.attn.proj.bias [96]" in str(caught.value)
    assert "1 unexpected\n  + stem.conv1.weight [24, 3, 3, 3]" in str(caught.value)


def test_another_size_of_model(tmp_path):
    path = save(tmp_path / "a.safetensors", random_state("deit_tiny_patch16_224"))
    with pytest.raises(
        ValueError, match=r"  - blocks\.0\.attn\.proj\.bias \[384\]\n  \+ blocks\.0\.attn\.proj\.bias \[192\]\n"
    ):
        load_pretrained("deit_small_patch16_224", path)


def test_mis_shaped_entry(tmp_path):
    state = random_state()
    state["blocks.2.mlp.fc1.weight"] = state["blocks.2.mlp.fc1.weight"].T.copy()
    with pytest.raises(
        ValueError, match=r"1 of another shape or dtype\n  - blocks\.2\.mlp\.fc1\.weight \[384, 96\]\n  \+ .*\[96, 384\]"
    ):
        load_pretrained(NAME, save(tmp_path / "a.safetensors", state))


def test_positions_of_no_square_grid(tmp_path):
    state = random_state()
    state["pos_embed"] = state["pos_embed"][:, :-1].copy()
    with pytest.raises(ValueError, match=r"pos_embed \[1, 49, 96\] holds 48 positions after 1 prefix tokens"):
        load_pretrained(NAME, save(tmp_path / "a.safetensors", state))


def test_unknown_name(weights):
    with pytest.raises(ValueError, match="unknown model 'vit_mikro_patch4_28'; nearest: vit_micro_patch4_28"):
        load_pretrained("vit_mikro_patch4_28", weights[0])


@pytest.mark.parametrize("source", ["missing.safetensors", "folder/missing.pth", "./missing", "a/b/c", "nothing"])
def test_missing_file(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder, nor a hub id such as"):
        load_pretrained(NAME, source)


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.npz: weights are read from files ending in \.safetensors"):
        load_pretrained(NAME, tmp_path / "a.npz")


def test_hub_cache_offline(tmp_path, monkeypatch):
    """The hub's cache is read without the network; what is not there is an error."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--vit_micro"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"timm/vit_micro: the hub's local cache has neither model\.safetensors nor"):
        load_pretrained(NAME, "timm/vit_micro", offline=True)
    state = random_state()
    save(folder / "snapshots" / ("0" * 40) / "model.safetensors", state)
    for source in ("timm/vit_micro", "hf-hub:timm/vit_micro"):
        assert_same(load_pretrained(NAME, source, offline=True), state, num_classes=10)


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'lbpwht_jax\[hub\]'"):
        load_pretrained(NAME, "timm/vit_micro")


def test_heads_and_shapes_that_fit_nothing(tmp_path):
    state = random_state()
    for key, value in (
        ("head.weight", np.float32(1)),
        ("pos_embed", np.float32(1)),
        ("pos_embed", np.ones(5, np.float32)),
        ("blocks.0.attn.qkv.weight", np.ones((2, 2, 2), np.float32)),
        ("head.weight", np.ones((10, 96), np.complex64).real.astype(np.int32)),
    ):
        path = save(tmp_path / "a.safetensors", {**state, key: np.asarray(value)})
        with pytest.raises(ValueError, match=rf"the file does not fit the model(.|\n)*{key}"):
            load_pretrained(NAME, path)
    path = save(tmp_path / "a.safetensors", {**state, "pos_embed": np.ones((2, 26, 96), np.float32)})
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        load_pretrained(NAME, path, image_size=32)


def test_two_tensors_of_one_name(tmp_path):
    ours = {"params/blocks_0/norm1/scale": np.ones(96, np.float32), "params/blocks.0/norm1/scale": np.ones(96, np.float32)}
    with pytest.raises(ValueError, match="2 tensors have only 1 names in timm's layout"):
        load_pretrained(NAME, save(tmp_path / "a.safetensors", ours))
    theirs = {f"{prefix}embeddings.cls_token": np.ones((1, 1, 96), np.float32) for prefix in ("", "vit.")}
    with pytest.raises(ValueError, match=r"a\.safetensors: .*in the transformers ViT or DeiT layout two tensors are timm's"):
        load_pretrained(NAME, save(tmp_path / "a.safetensors", theirs))


def test_parts_that_cannot_be_joined(tmp_path):
    parts = {f"vit.encoder.layer.0.attention.attention.{part}.weight": np.float32(1) for part in ("query", "key", "value")}
    parts["vit.embeddings.cls_token"] = np.float32(1)
    with pytest.raises(ValueError, match=r"a\.safetensors: the tensors do not fit together"):
        load_pretrained(NAME, save(tmp_path / "a.safetensors", {key: np.asarray(value) for key, value in parts.items()}))
