"""Adapter folders that others wrote or damaged; what ``save_adapter`` writes is tested with LoRA."""

import json
import shutil
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LoRA, adapt, lp_l1
from lbpwht_jax.weights import adapt_from, load_adapter, save_adapter

IMAGES = jnp.ones((3, 2))
ADAPTED = adapt(nn.Dense(2, name="fc"), [LoRA("", rank=1, alpha=4)], IMAGES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    variables = jax.jit(ADAPTED.init)(jax.random.key(0), IMAGES)
    save_adapter(folder, ADAPTED, variables)
    return folder, variables


@pytest.fixture
def edited(saved, tmp_path):
    """Loads the adapter after its configuration was changed: fields, or the whole text."""
    shutil.copytree(saved[0], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"

    def load(text=None, model=None, **fields):
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}) if text is None else text)
        if model is not None:
            return adapt_from(tmp_path / "adapter", model, IMAGES, variables=saved[1])
        return load_adapter(tmp_path / "adapter", ADAPTED, saved[1])

    return load


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object such as PEFT writes, got a list"),
        ("null", "must be a JSON object such as PEFT writes, got null"),
        ("3", "must be a JSON object such as PEFT writes, got a number"),
        ("", "not a JSON file: Expecting value"),
        ("[" * 100_000, "not a JSON file that can be read: maximum recursion depth"),
    ],
)
def test_configurations_that_are_none(edited, text, message):
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        edited(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object of alphas by module, got a list"),
        ({"alpha_pattern": "fc"}, "alpha_pattern must be an object of alphas by module, got a text"),
        ({"alpha_pattern": {"fc": "x"}}, "alpha_pattern 'fc' must be a number, got a text"),
        ({"lora_alpha": [4]}, "lora_alpha must be a number, got a list"),
        ({"lora_alpha": True}, "lora_alpha must be a number, got true or false"),
        ({"lora_alpha": None}, ".* has alpha None"),
        ({"alpha_pattern": {"(": 4}}, r"alpha_pattern: '\(' is no regular expression"),
        ({"alpha_pattern": {"[" * 100_000: 4}}, "alpha_pattern: a pattern of 100000 characters is longer"),
        ({"alpha_pattern": {"(.*)*x": 4}}, r"alpha_pattern: '\(\.\*\)\*x' may take for ever to match"),
    ],
)
def test_fields_that_mean_nothing(edited, fields, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        edited(**fields)
    assert time.process_time() - start < 5


def test_patterns_are_peft_s(edited, saved):
    assert jax.tree.structure(edited(alpha_pattern=None)) == jax.tree.structure(saved[1])
    with pytest.raises(ValueError, match="has alpha 5, "):
        edited(alpha_pattern={".*": 5, "weight": 6})
    np.testing.assert_equal(edited(alpha_pattern={"x.*": 5}), jax.tree.map(np.asarray, saved[1]))


LOW = {"layers": [""], "spec": {"bases": [[0, 0]], "block": 8}, "grid": None, "prefix_tokens": 0}


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (nn.Dense(2), {"use_dora": True}, "use_dora is set, and DoRA's magnitudes are not read"),
        (
            nn.Dense(2, name="fc"),
            {"lora_alpha": None},
            "the top level has alpha None; lora_alpha or alpha_pattern must",
        ),
        (nn.Dense(2), {"lora_alpha": 10**400}, r"must give a positive one, at most 1e\+09"),
        (nn.Sequential([nn.Dense(2)]), {}, r"branches of the top level, which are no dense layers .* are layers\.0, "),
        (nn.Dense(2), {"lbpwht_jax": 5}, "lbpwht_jax does not hold low-rank rules as save_adapter writes them"),
        (nn.Dense(2), {"lbpwht_jax": [{**LOW, "grid": ["a"]}]}, "lbpwht_jax does not hold low-rank rules"),
        (nn.Dense(2), {"lbpwht_jax": [{**LOW, "spec": {"bases": [[9, 9]]}}]}, "lbpwht_jax does not hold low-rank"),
        (nn.Dense(2), {"lbpwht_jax": [LOW]}, "the token grid of the top level, a Dense on an input .* cannot be known"),
    ],
)
def test_folders_that_tell_no_rules(edited, model, fields, message):
    with pytest.raises(ValueError, match=message):
        edited(model=model, **fields)


def test_the_rules_are_read_without_the_pretrained_variables(tmp_path):
    model, x = nn.Dense(2), jnp.ones((1, 4, 4, 3))
    adapted = adapt(model, [LoRA("", 2, 3, lp_l1(2), rslora=True, dropout=0.25)], x)
    variables = jax.jit(adapted.init)(jax.random.key(0), x)
    save_adapter(tmp_path, adapted, variables)
    again, loaded = adapt_from(tmp_path, model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert again == adapted
    # the frozen kernel is what init draws from key 0, which made these variables too
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    # from another key the kernel is another one, and the branch is the folder's
    _, other = adapt_from(tmp_path, model, x, rngs=jax.random.key(1))
    assert not np.array_equal(other["params"]["kernel"], variables["params"]["kernel"])
    np.testing.assert_array_equal(other["params"]["lora_a"], variables["params"]["lora_a"])
    with pytest.raises(TypeError, match="give variables or rngs, not both"):
        adapt_from(tmp_path, model, x, variables=variables, rngs=jax.random.key(1))


def test_variables_are_where_they_belong(tmp_path):
    with pytest.raises(TypeError, match=r"save_adapter: a Linen model needs its variables, .*, got NoneType"):
        save_adapter(tmp_path, ADAPTED)
    merged = ADAPTED.merge(jax.jit(ADAPTED.init)(jax.random.key(0), IMAGES))
    with pytest.raises(ValueError, match="save_adapter: the variables lack the LoRA branch of"):
        save_adapter(tmp_path, ADAPTED, merged)
