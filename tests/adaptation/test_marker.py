"""Variables with branches cannot be given to the model that does not ask for them."""

import copy
import functools
import pickle

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

from lbpwht_jax import LoRA, LowRank, adapt, load_adapter, lp_l1, save_adapter


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(not train)(nn.Dense(8, name="fc1")(x))
        return nn.Dense(4, name="fc2")(x).mean((1, 2))


MODEL = Model()
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
OWN = MODEL.init(jax.random.key(0), X)
ADAPTED = adapt(MODEL, [LoRA("fc1", rank=2)], X)
VARIABLES = ADAPTED.with_branches(jax.random.key(1), OWN)


@pytest.mark.parametrize(
    "variables",
    [
        lambda folder: VARIABLES,
        lambda folder: ADAPTED.init(jax.random.key(0), X),
        lambda folder: ADAPTED.unmerge(ADAPTED.merge(VARIABLES), VARIABLES),
        lambda folder: load_adapter(saved(folder), ADAPTED, OWN),
        lambda folder: jax.tree.map(lambda a: a + 1, VARIABLES),
        lambda folder: jax.jit(lambda variables: variables)(VARIABLES),
        lambda folder: {**VARIABLES, **ADAPTED.apply(VARIABLES, X, mutable=["batch_stats"])[1]},
        lambda folder: optax.apply_updates(VARIABLES, jax.tree.map(jnp.zeros_like, VARIABLES)),
        lambda folder: serialization.from_bytes(VARIABLES, serialization.to_bytes(VARIABLES)),
        lambda folder: pickle.loads(pickle.dumps(copy.deepcopy(VARIABLES))),
    ],
    ids=["added", "init", "unmerged", "loaded", "mapped", "jitted", "updated", "stepped", "serialised", "pickled"],
)
def test_the_model_refuses_branches_wherever_they_come_from(tmp_path, variables):
    variables = variables(tmp_path)
    call = functools.partial(MODEL.apply, mutable=["batch_stats"])
    for function in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=r"branches, which the model's own apply leaves out; call adapted\.apply"):
            function(variables, X)
    with pytest.raises(ValueError, match="have LoRA branches"):
        MODEL.bind(variables)
    chex.assert_trees_all_equal_structs(variables, VARIABLES)
    ADAPTED.apply(variables, X, mutable=["batch_stats"])


def saved(folder):
    save_adapter(folder, ADAPTED, VARIABLES)
    return folder


def test_the_model_takes_its_own_and_merged_variables():
    expected = ADAPTED.apply(VARIABLES, X, train=False)
    chex.assert_trees_all_close(MODEL.apply(ADAPTED.merge(VARIABLES), X, train=False), expected, atol=1e-6)
    low = adapt(MODEL, [LowRank("fc1", lp_l1(2))], X)
    chex.assert_trees_all_equal_structs(low.init(jax.random.key(0), X), OWN)
    chex.assert_trees_all_equal_structs(low.with_branches(jax.random.key(0), OWN), OWN)


@pytest.mark.parametrize("mutable", [True, ["batch_stats", "lora_branches"], nn.DenyList("params")])
def test_what_apply_returns_keeps_its_structure(mutable):
    """So that it can be carried through a loop of steps."""
    others = {name: tree for name, tree in VARIABLES.items() if name != "params"}
    _, updated = ADAPTED.apply(VARIABLES, X, mutable=mutable)
    updated.pop("params", None)
    chex.assert_trees_all_equal_structs(updated, others)
    assert list(ADAPTED.apply(VARIABLES, X, mutable=["batch_stats"])[1]) == ["batch_stats"]


def test_a_model_whose_rules_have_no_branch_refuses_them_too():
    low = adapt(MODEL, [LowRank("fc1", lp_l1(2))], X)
    with pytest.raises(ValueError, match="have LoRA branches"):
        low.apply(VARIABLES, X, train=False)
    low.apply(ADAPTED.merge(VARIABLES), X, train=False)


def test_parameters_alone_suffice_for_the_adapted_model():
    plain = {name: tree for name, tree in VARIABLES.items() if name != "lora_branches"}
    chex.assert_trees_all_equal(ADAPTED.apply(plain, X, train=False), ADAPTED.apply(VARIABLES, X, train=False))
