import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from foreign import ViT

from lbpwht_jax import Freeze, LoRA, LowRank, LowRankDense, adapt, create_model, lp_l1, lp_linf
from lbpwht_jax.adaptation import AdaptedModule, resolve
from lbpwht_jax.adaptation.resolution import Resolution
from lbpwht_jax.ops.flops import product_flops

GRID, TOKENS = (4, 5), {"grid": (4, 5), "prefix_tokens": 1}
FULL, LOW = lp_linf(8), lp_l1(2)
DW_ONLY = lp_l1(2, dx="exact")


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


IMAGES = random(2, 16, 20, 3)
SHAPE = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
G = random(2, 3, seed=1)
VIT = ViT()
VARIABLES = jax.jit(VIT.init)(jax.random.key(0), IMAGES)
# every way in: Dense, the DenseGeneral layers of Flax's attention, a 1x1 Conv
ALL = r"block_\d/(attn/\w+|fc\d)$"


def rules(spec, pattern=ALL):
    return [LowRank(pattern, spec, **TOKENS), LowRank("^mix$", spec)]


def gradients(model, variables):
    grads = jax.jit(jax.grad(lambda v: (model.apply(v, IMAGES) * G).sum()))(variables)
    return traverse_util.flatten_dict(grads["params"], sep="/")


def differing(actual, expected):
    assert actual.keys() == expected.keys()
    # a hundredth of the usual gradient: far above rounding, far below what leaving out 17 of 20 functions does
    return {name for name in expected if float(jnp.abs(actual[name] - expected[name]).max()) > 1e-2}


@pytest.mark.parametrize("remat", [False, True])
def test_a_linen_model_of_others(remat):
    model = ViT(remat)
    adapted = {spec: adapt(model, rules(spec), SHAPE) for spec in (FULL, LOW, DW_ONLY)}
    expected = gradients(model, VARIABLES)
    # a 1x1 convolution sums in another order than a product
    chex.assert_trees_all_close(adapted[LOW].apply(VARIABLES, IMAGES), model.apply(VARIABLES, IMAGES), atol=2e-6, rtol=0)
    found = gradients(adapted[FULL], VARIABLES)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-4)
    matched = {f"block_{i}/attn/{n}/kernel" for i in range(2) for n in ("query", "key", "value", "out")}
    matched |= {f"block_{i}/fc{n}/kernel" for i in range(2) for n in (1, 2)} | {"mix/kernel"}
    assert differing(gradients(adapted[DW_ONLY], VARIABLES), expected) == matched
    assert {"embed/kernel", "cls_token", "block_0/norm1/scale"} <= differing(gradients(adapted[LOW], VARIABLES), expected)


def test_only_matched_layers_change():
    expected = gradients(VIT, VARIABLES)
    adapted = adapt(VIT, [LowRank("block_0/fc1", DW_ONLY, **TOKENS)], SHAPE)
    assert differing(gradients(adapted, VARIABLES), expected) == {"block_0/fc1/kernel"}


def test_it_is_used_as_the_model_is():
    adapted = adapt(VIT, [LoRA("fc1", spec=LOW, **TOKENS), *rules(LOW)], SHAPE, train=True)
    fresh = jax.jit(adapted.init)(jax.random.key(0), IMAGES)
    flat, plain = (traverse_util.flatten_dict(v["params"], sep="/") for v in (fresh, VARIABLES))
    assert flat.keys() - plain.keys() == {f"block_{i}/fc1/lora_{m}" for i in range(2) for m in "ab"}
    chex.assert_trees_all_equal({name: flat[name] for name in plain}, plain)
    assert hash(adapted) == hash(adapt(VIT, [LoRA("fc1", spec=LOW, **TOKENS), *rules(LOW)], SHAPE))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(variables, key):
        output, state = adapted.apply(variables, IMAGES, train=True, rngs={"dropout": key}, mutable=["intermediates"])
        assert state == {}
        return output

    one, again, other = (step(fresh, jax.random.key(seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-3
    jitted = jax.jit(jax.grad(lambda v: (adapted.apply(v, IMAGES) * G).sum()))(fresh)
    eager = jax.grad(lambda v: (adapted.apply(v, IMAGES) * G).sum())(fresh)
    chex.assert_trees_all_close(jitted, eager, atol=1e-5, rtol=1e-4)


def test_scanned_layers():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(layer, x, _):
                return layer(x), None

            scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scanned(nn.Dense(8, name="layer"), x, None)[0]

    x, stack = random(2, 20, 8), Stack()
    adapted = adapt(stack, [LoRA("layer", spec=FULL, grid=GRID)], x)
    fresh = adapted.init(jax.random.key(0), x)
    chex.assert_shape(fresh["params"]["layer"]["lora_a"], (3, 8, 8))
    plain = stack.init(jax.random.key(0), x)
    started = adapted.with_branches(jax.random.key(1), plain)
    chex.assert_trees_all_equal_shapes(started, fresh)
    started["params"]["layer"]["lora_b"] = random(3, 8, 8, seed=2)
    chex.assert_trees_all_close(adapted.apply(started, x), stack.apply(adapted.merge(started), x), rtol=1e-4, atol=1e-4)


def test_our_own_models_know_their_grids():
    model = create_model("vit_micro_patch4_28", num_classes=10)
    images = random(1, 28, 28, 1)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    by_rule = adapt(model, [LowRank(r"blocks_\d+/(attn/(qkv|proj)|mlp/fc[12])$", LOW)], images)
    by_plan = create_model("vit_micro_patch4_28", num_classes=10, spec=LOW)
    one, other = (jax.jit(jax.grad(lambda v, m=m: (m.apply(v, images) ** 2).sum()))(variables) for m in (by_rule, by_plan))
    chex.assert_trees_all_equal(one, other)
    assert {a.shown_grid for a in by_rule.resolution.adaptations} == {(7, 7)}
    assert {a.prefix_tokens for a in by_rule.resolution.adaptations} == {1}


def test_the_first_rule_that_matches_holds():
    ordered = [
        Freeze("block_0/fc1"),
        LoRA("fc1", rank=2, fused="block_1"),
        LowRank("block_1/fc", LOW, **TOKENS),
        Freeze("norm|^$"),
    ]
    resolution = resolve(VIT, ordered, SHAPE)
    found = {a.layer.path: (a.rank, a.alpha, a.spec) for a in resolution.adaptations}
    assert found == {"block_1/fc1": (6, 24, None), "block_1/fc2": (0, 0.0, LOW)}
    norms = {f"block_{i}/norm{n}" for i in range(2) for n in (1, 2)}
    assert resolution.frozen == {"", "block_0/fc1", "block_1/fc1"} | norms
    adapted = AdaptedModule(VIT, resolution)
    trained = {path for path in traverse_util.flatten_dict(VARIABLES["params"], sep="/") if adapted.trainable(path)}
    assert {"cls_token", "block_0/fc1/kernel", "block_1/fc1/bias", "block_0/norm1/scale"}.isdisjoint(trained)
    assert {"block_1/fc2/kernel", "head/bias", "block_0/fc2/kernel"} <= trained
    assert adapted.trainable("block_1/fc1/lora_a") and not adapted.trainable("block_0/fc1/lora_a")


def cells(resolution):
    """The rows of the printed table, without its lines."""
    lines = str(resolution).splitlines()
    assert len(set(map(len, lines))) == 1 and all(line[0] == line[-1] == "|" for line in lines)
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if not set(line) <= set("|- ")]


def test_the_table():
    rows = cells(resolve(VIT, [LoRA("block_0/attn", rank=2, spec=LOW, **TOKENS), *rules(LOW, "fc"), Freeze("norm")], SHAPE))
    assert rows[0] == ["path", "method", "grid", "rank", "trainable parameters"]
    assert ["block_0/attn/out", "LoRA + LowRank", "4x5", "2 + 3", "32"] in rows
    assert ["block_1/attn/out", "full", "", "", "72"] in rows
    assert ["block_1/fc1", "LowRank", "4x5", "3", "144"] in rows
    assert ["block_1/norm1", "frozen", "", "", "0"] in rows
    assert ["(top level)", "full", "", "", "8"] in rows
    assert rows[-1][0] == "total" and int(rows[-1][-1].replace(",", "")) == sum(int(row[-1]) for row in rows[1:-1])


def test_the_table_of_a_branch_beside_a_slower_layer():
    # 28 functions for 20 tokens: the products save nothing, and the transforms come on top
    slow = lp_l1(7, when="faster")
    rows = cells(
        resolve(VIT, [LoRA("block_0/fc1", rank=2, spec=slow, **TOKENS), LowRank("block_1/fc1", slow, **TOKENS)], SHAPE)
    )
    assert ["block_0/fc1", "LoRA + full: LowRank is slower", "4x5", "2", "48"] in rows
    assert ["block_1/fc1", "full: LowRank is slower", "4x5", "", "144"] in rows


def test_the_table_cuts_nothing():
    path = "/".join(["a_module_with_a_long_name"] * 12)
    resolution = Resolution((), frozenset(), ((path, 10**12),))
    assert cells(resolution)[1] == [path, "full", "", "", "1,000,000,000,000"]


def test_frozen_parameters_cost_nothing():
    adapted = adapt(VIT, [Freeze(r"^(?!head)")], SHAPE)
    grads = jax.grad(lambda v: (adapted.apply(v, IMAGES) * G).sum())(VARIABLES)["params"]
    assert all(not leaf.any() for leaf in jax.tree.leaves({k: v for k, v in grads.items() if k != "head"}))
    chex.assert_trees_all_equal(grads["head"]["bias"], G.sum(0))

    def flops(model, function):
        return product_flops(function(lambda v: (model.apply(v, IMAGES) * G).sum()), VARIABLES)

    # what is left of the backward pass is the head's weight gradient, of [2, 168] and [2, 3]
    assert flops(adapted, jax.value_and_grad) - flops(adapted, lambda f: f) == 2 * 2 * 168 * 3


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            LowRank("blok_0/fc1", LOW),
            r"LowRank\('blok_0/fc1'\) matches no dense layer or 1x1 convolution; the nearest paths: block_0/fc1, ",
        ),
        (LoRA("heads"), r"LoRA\('heads'\) matches no dense layer .* nearest paths: head, "),
        (Freeze("norm3"), r"Freeze\('norm3'\) matches no module with parameters; the nearest paths: block_[01]/norm"),
        (
            LowRank("embed", LOW),
            r"LowRank\('embed'\) matches embed, but no dense layer or 1x1 convolution, which alone it adapts",
        ),
        (
            LowRank("block_0/fc1", LOW),
            r"the token grid of block_0/fc1, a Dense on an input \[2, 21, 8\], cannot be known; say it in the rule: "
            r"LowRank\('block_0/fc1', \.\.\., grid=\(height, width\), prefix_tokens=\.\.\.\), or leave the layer out",
        ),
        (
            LoRA("attn/out", spec=LOW),
            r"the token grid of block_0/attn/out, a DenseGeneral on an input \[2, 21, 8\], cannot be known",
        ),
        (LowRank("head", LOW), r"the token grid of head, a Dense on an input \[2, 168\], cannot be known"),
        (
            LowRank("fc1", LOW, grid=(4, 5)),
            r"block_0/fc1: grid \(4, 5\) with 0 prefix tokens makes 20 tokens, but the input \[2, 21, 8\] has 21; "
            r"1 of them may be class or register tokens: prefix_tokens=1; change the rule LowRank\('fc1'\)\. "
            r"The same holds for block_1/fc1$",
        ),
        (
            LowRank("fc1", lp_l1(2, ndim=1), **TOKENS),
            r"block_0/fc1: the spec's functions have 1 axes and the grid \(4, 5\)",
        ),
    ],
)
def test_rules_that_do_not_fit(rule, message):
    with pytest.raises(ValueError, match="adapt: " + message):
        adapt(VIT, [rule], SHAPE)


def test_mistakes_in_rules():
    for make in (LowRank, LoRA, Freeze):
        with pytest.raises(ValueError, match=rf"{make.__name__}: 'fc\[' is no regular expression"):
            make("fc[", LOW) if make is LowRank else make("fc[")
    with pytest.raises(TypeError, match=r"LowRank\('fc'\): spec must be a LowRankSpec, such as lp_l1\(4\), got 4"):
        LowRank("fc", 4)
    with pytest.raises(TypeError, match=r"LoRA\('fc'\): spec must be a LowRankSpec"):
        LoRA("fc", spec="lp_l1-4")
    with pytest.raises(TypeError, match=r"LoRA\('fc'\): rank must be an integer, got 1\.5"):
        LoRA("fc", rank=1.5)
    with pytest.raises(ValueError, match=r"LoRA\('fc'\): rank and alpha must be positive, got rank=0"):
        LoRA("fc", rank=0)
    with pytest.raises(TypeError, match="rules are LowRank, LoRA, Freeze and Lean, got 'fc1'"):
        adapt(VIT, ["fc1"], SHAPE)
    with pytest.raises(TypeError, match="model must be a Linen or an NNX module, got function"):
        adapt(lambda x: x, [], SHAPE)


def test_products_of_their_own_are_left_alone():
    class Custom(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, dot_general=FULL.dot_general(grid=GRID), name="fc")(x)

    with pytest.raises(ValueError, match="fc has a dot_general of its own; leave it out"):
        adapt(Custom(), [LowRank("fc", LOW, grid=GRID)], random(2, 20, 8))
    # this library's layer is meant to be changed
    layer = adapt(LowRankDense(4, spec=FULL, grid=GRID), [LowRank("^$", LOW)], random(2, 20, 8))
    assert layer.resolution.adaptations[0].spec == LOW


def test_modules_made_by_jit_are_refused():
    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(nn.Dense)(4, name="fc")(x)

    with pytest.raises(ValueError, match=r"adapt: the model has a Dense made by nn\.jit, whose traces hide the paths inside"):
        adapt(Jitted(), [LoRA("fc")], random(2, 20, 8))
