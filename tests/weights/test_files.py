import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import create_model
from lbpwht_jax.weights.files import BUNDLED, load_bundled, load_weights, replace_head, save_weights


def test_round_trip(tmp_path):
    variables = {"params": {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.arange(3, dtype=jnp.bfloat16)}}
    save_weights(tmp_path / "w.safetensors", variables, {"model": "m", "classes": ["x", "y"]})
    loaded, metadata = load_weights(tmp_path / "w.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert loaded["params"]["b"].dtype == jnp.bfloat16
    assert metadata == {"model": "m", "classes": ["x", "y"]}


@pytest.mark.parametrize("keep", [0, 7, 60])
def test_damaged_files(tmp_path, keep):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"params": {"a": np.ones((20, 3), np.float32)}}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"w\.safetensors: no complete safetensors file.*truncated"):
        load_weights(path)


def test_the_bundled_model_knows_what_it_learned():
    variables, metadata = load_bundled()
    assert metadata["model"] == BUNDLED and len(metadata["classes"]) == 10
    # its test accuracy on Fashion-MNIST, as its pretraining measured it
    assert metadata["test_accuracy"] > 0.8
    fresh = create_model(BUNDLED, num_classes=10).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, fresh)


def test_a_new_head_replaces_the_head_alone():
    fresh = create_model(BUNDLED, num_classes=3).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    variables, _ = load_bundled()
    merged = replace_head(variables, fresh)
    jax.tree.map(np.testing.assert_array_equal, merged["params"].pop("head"), fresh["params"]["head"])
    variables["params"].pop("head")
    jax.tree.map(np.testing.assert_array_equal, merged, variables)


def test_weights_of_another_model():
    variables, _ = load_bundled()
    fresh = jax.tree.map(np.array, variables)
    fresh["params"]["norm"]["scale"] = np.ones(7, np.float32)
    with pytest.raises(ValueError, match="not those of this model; they differ at params/norm/scale"):
        replace_head(variables, fresh)
    del fresh["params"]["norm"]["scale"]
    with pytest.raises(ValueError, match="differ at params/norm/scale"):
        replace_head(variables, fresh)
