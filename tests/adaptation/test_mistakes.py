"""What people get wrong in rules, example calls and variables: each is an error that says how to put it right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from structures import IMAGES, Mixer, NNXMixer, Partitioned, Stacked

from lbpwht_jax import Freeze, LoRA, LowRank, adapt, create_model, lp_l1

LOW = lp_l1(2)
X = jnp.ones(IMAGES)


class Tokens(nn.Module):
    """Four dense layers on 16 x 14 tokens and a class token."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (2, 2), (2, 2), name="embed")(images)
        x = jnp.pad(x.reshape(x.shape[0], -1, 4), [(0, 0), (1, 0), (0, 0)])
        for i in range(4):
            x = nn.Dense(4, name=f"fc{i}")(x)
        return nn.Dense(4, name="head")(x[:, 0])


MODEL, TALL = Tokens(), jax.ShapeDtypeStruct((1, 32, 28, 3), jnp.float32)
HERE = {"grid": (16, 14), "prefix_tokens": 1}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [Freeze("^(?!head)"), LoRA("fc")],
            r"LoRA\('fc'\) is left nothing: all that it matches, fc0, fc1, fc2, fc3, is held by "
            r"Freeze\('\^\(\?!head\)'\) before",
        ),
        (
            [LowRank("fc0", LOW, **HERE), LoRA("fc", spec=LOW, **HERE), LoRA("fc[01]")],
            r"LoRA\('fc\[01\]'\) is left nothing: .* held by LowRank\('fc0'\), LoRA\('fc'\) before it; put it first or "
            r"change a pattern\. A layer has one rule; LoRA takes a spec for its backward pass: LoRA\(\.\.\., spec=\.\.\.\)$",
        ),
        (
            [Freeze("."), Freeze("head")],
            r"Freeze\('head'\) is left nothing: all that it matches, head, is held by Freeze\('\.'\)",
        ),
        (
            [LowRank("fc", LOW, grid=(14, 16), prefix_tokens=1)],
            r"fc0: the model has no map of \(14, 16\), but embed returns one of \(16, 14\); height comes first: write "
            r"grid=\(16, 14\) in LowRank\('fc'\)\. The same holds for fc1, fc2, fc3$",
        ),
        (
            [LowRank("fc[23]", LOW, grid=(16, 14)), LowRank("fc[01]", LOW)],
            r"the token grid of fc0, .* cannot be known; .*\. The same holds for fc1\nadapt: fc2: grid \(16, 14\) with 0 "
            r"prefix tokens makes 224 tokens, but the input \[1, 225, 4\] has 225; 1 of them may be class or register tokens: "
            r"prefix_tokens=1; .*\. The same holds for fc3$",
        ),
        ([LoRA("all-linear"), Freeze("fc")], r"Freeze\('fc'\) is left nothing: all .* held by LoRA\('all-linear'\)"),
        (
            [LowRank("embed", LOW)],
            r"LowRank\('embed'\) matches embed, but no dense layer .*, if the example call reaches it outside nnx\.bridge",
        ),
    ],
)
def test_rules(rules, message):
    with pytest.raises(ValueError, match="adapt: " + message):
        adapt(MODEL, rules, TALL)


def test_a_rule_that_is_held_in_part_holds_for_the_rest():
    adapted = adapt(MODEL, [Freeze("fc0|embed"), LoRA("all-linear", 2)], TALL)
    assert [adaptation.layer.path for adaptation in adapted.resolution.branches] == ["fc1", "fc2", "fc3"]
    assert adapted.trainable("head/kernel") and not adapted.trainable("fc0/kernel")


def test_a_bare_rule():
    with pytest.raises(TypeError, match=r"adapt: rules must be a list of rules, such as \[LowRank\(\.\.\.\)\], got LoRA\("):
        adapt(MODEL, LoRA("fc"), TALL)


def test_the_example_call():
    variables = jax.eval_shape(MODEL.init, jax.random.key(0), TALL)
    with pytest.raises(
        TypeError, match=r"the example call holds variables; give the model's inputs: adapt\(model, rules, images"
    ):
        adapt(MODEL, [LoRA("fc")], variables)
    with pytest.raises(TypeError, match=r"the model is adapted already; give all rules at once, with its \.module"):
        adapt(adapt(MODEL, [LoRA("fc")], TALL), [LoRA("head")], TALL)


def test_a_model_that_asks_for_values():
    class Flagged(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(4, name="fc")(x)
            return x * 2 if train else x

    adapt(Flagged(), [LoRA("fc")], X, train=True)
    with pytest.raises(ValueError, match=r"cannot be traced on shapes, as jax\.jit would, .* Give flags as Python values"):
        adapt(Flagged(), [LoRA("fc")], X, train=jnp.array(True))


def test_all_layers_with_products_of_their_own():
    class Custom(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = nn.Dense(4, dot_general=LOW.dot_general() if i else None, name=f"fc{i}")(x)
            return x

    with pytest.raises(ValueError, match=r"adapt: fc1 has a dot_general of its own; leave it out .* The same holds for fc2$"):
        adapt(Custom(), [LoRA("fc")], X)


def test_variables():
    model = Partitioned()
    adapted = adapt(model, [LoRA("fc", 2)], X)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    started = adapted.with_branches(jax.random.key(1), variables)
    merged = adapted.merge(started)
    wanted = 'variables must be a dictionary with "params", as init returns it, got '
    for call, error, message in [
        (
            lambda: adapted.with_branches(jax.random.key(1), variables["params"]),
            TypeError,
            f"with_branches: {wanted}keys embed",
        ),
        (
            lambda: adapted.with_branches(jax.random.key(1), started),
            ValueError,
            "have branches already, such as fc's; give the",
        ),
        (lambda: adapted.with_branches(variables, jax.random.key(1)), TypeError, f"with_branches: {wanted}"),
        (lambda: adapted.with_branches(jax.random.key(1), {"params": {}}), ValueError, "the variables have no fc/kernel"),
        (
            lambda: adapted.merge(merged),
            ValueError,
            "merge: the variables lack the LoRA branch of fc: they are the model's own",
        ),
        (lambda: adapted.unmerge(started, started), ValueError, "unmerge: the variables have the branch of fc beside"),
        (lambda: adapted.unmerge(merged, merged), ValueError, "unmerge: the variables lack the LoRA branch of fc"),
        (
            lambda: adapted.apply(variables, X),
            ValueError,
            r"apply: the variables lack .*; with_branches\(key, variables\) adds",
        ),
        (lambda: adapted.apply(started["params"], X), TypeError, f"apply: {wanted}"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_our_own_model_is_adapted_whole():
    images = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    adapted = adapt(create_model("vit_micro_patch4_28", num_classes=10), [LoRA("all-linear", 2, rslora=True)], images)
    assert "head" not in {adaptation.layer.path for adaptation in adapted.resolution.branches}
    assert {adaptation.scale for adaptation in adapted.resolution.branches} == {8 / 2**0.5}


def test_the_count_is_peft_s_line():
    adapted = adapt(Stacked(), [LoRA("blocks/fc1", 2), Freeze("^(?!head)")], X)
    # three branches of 2 x (4 + 8), the head's 4 x 3 + 3; and besides: the embedding 52, three blocks of 84
    text = "trainable params: 87 || all params: 391 || trainable%: 22.2506"
    assert str(adapted.trainable_parameters()) == text
    assert f"<p>{text}</p>" in adapted.resolution._repr_html_()
    assert adapted.resolution._repr_html_().count("<tr>") == len(str(adapted.resolution).splitlines()) - 2


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_layer_across_tokens(kind):
    """Six channels and six tokens: only where the tokens come from tells the two apart."""
    images = jnp.ones((1, 4, 6, 3))
    model = Mixer() if kind == "linen" else NNXMixer(nnx.Rngs(0))
    adapt(model, [LowRank("^fc", LOW, grid=(2, 3))], images)
    for pattern in ("^tokens", "^tokens2", "tokens2|fc"):
        with pytest.raises(ValueError, match=r"adapt: tokens2?(, tokens2)? mixes tokens: along the axis of its input"):
            adapt(model, [Freeze("head"), LowRank(pattern, LOW, grid=(2, 3))], images)
