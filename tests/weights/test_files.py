import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lbpwht_jax import create_model
from lbpwht_jax.weights.files import BUNDLED, load_bundled, load_weights, read_safetensors, replace_head, save_weights


def test_round_trip(tmp_path):
    variables = {"params": {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.arange(3, dtype=jnp.bfloat16)}}
    save_weights(tmp_path / "w.safetensors", variables, {"model": "m", "classes": ["x", "y"]})
    loaded, metadata = load_weights(tmp_path / "w.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    chex.assert_trees_all_equal(loaded, variables)
    assert loaded["params"]["b"].dtype == jnp.bfloat16
    assert metadata == {"model": "m", "classes": ["x", "y"]}


@pytest.mark.parametrize("keep", [0, 7, 60])
def test_damaged_files(tmp_path, keep):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"params": {"a": np.ones((20, 3), np.float32)}}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"w\.safetensors: no complete safetensors file.*truncated"):
        load_weights(path)


def test_transposed_views_are_written_as_what_they_are(tmp_path):
    """safetensors alone writes the memory of a view as it lies."""
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_weights(tmp_path / "w.safetensors", {"params": {"a": matrix.T, "b": matrix[:, ::2], "c": np.float32(3)}}, {})
    loaded, _ = load_weights(tmp_path / "w.safetensors")
    np.testing.assert_equal(loaded, {"params": {"a": matrix.T, "b": matrix[:, ::2], "c": np.float32(3)}})


def written(path, dtype, shape, size, header=None):
    """A safetensors file, by hand."""
    fields = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}, **({"__metadata__": header} if header else {})}
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 4), ("F8_E5M2", 4), ("F8_E8M0", 4), ("F6_E2M3", 3), ("C64", 32)])
def test_dtypes_that_are_not_read_are_named(tmp_path, dtype, size):
    with pytest.raises(ValueError, match=rf"w\.safetensors: a is of dtype {dtype}, which is not read; convert the file to F32"):
        read_safetensors(written(tmp_path / "w.safetensors", dtype, [4], size))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "x: not a JSON value that can be read"),
        ("x", "x: not a JSON value"),
        ("9" * 5000, "x: not a JSON value"),
    ],
)
def test_headers_that_cannot_be_read(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"w\.safetensors: {message}"):
        load_weights(written(tmp_path / "w.safetensors", "F32", [1], 4, {"x": text}))


def test_one_path_inside_another(tmp_path):
    arrays = {"a/kernel": np.ones(2), "a/kernel/sub": np.ones(2), "a/kernels": np.ones(2)}
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: a/kernel cannot be an array and hold a/kernel/sub too"):
        load_weights(tmp_path / "w.safetensors")


def test_what_is_no_regular_file(tmp_path):
    with pytest.raises(ValueError, match="/dev/null: cannot be read: it is no regular file"):
        read_safetensors("/dev/null")
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "none.safetensors")


def test_the_bundled_model_knows_what_it_learned():
    variables, metadata = load_bundled()
    assert metadata["model"] == BUNDLED and len(metadata["classes"]) == 10
    # its test accuracy on Fashion-MNIST, as its pretraining measured it
    assert metadata["test_accuracy"] > 0.8
    fresh = jax.jit(create_model(BUNDLED, num_classes=10).init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    chex.assert_trees_all_equal_shapes(variables, fresh)


def test_a_new_head_replaces_the_head_alone():
    fresh = jax.jit(create_model(BUNDLED, num_classes=3).init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    variables, _ = load_bundled()
    merged = replace_head(variables, fresh)
    chex.assert_trees_all_equal(merged["params"].pop("head"), fresh["params"]["head"])
    variables["params"].pop("head")
    chex.assert_trees_all_equal(merged, variables)


def test_weights_of_another_model():
    variables, _ = load_bundled()
    fresh = jax.tree.map(np.array, variables)
    fresh["params"]["norm"]["scale"] = np.ones(7, np.float32)
    with pytest.raises(ValueError, match="not those of this model; they differ at params/norm/scale"):
        replace_head(variables, fresh)
    del fresh["params"]["norm"]["scale"]
    with pytest.raises(ValueError, match="differ at params/norm/scale"):
        replace_head(variables, fresh)
