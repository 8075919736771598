"""The rule Lean on norms, convolutions and attention that this library did not write."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lbpwht_jax import Freeze, Lean, LoRA, LowRank, Residuals, adapt, lp_l1
from lbpwht_jax.cost import residual_bytes

TOKENS, CHANNELS = 16, 32


class Block(nn.Module):
    masked: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.LayerNorm(name="norm1")(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.masked else None
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=self.dropout, deterministic=not train, name="attn")
        x = x + attention(y, y, mask=mask)
        y = nn.gelu(nn.Dense(2 * CHANNELS, name="fc1")(nn.BatchNorm(use_running_average=not train, name="norm2")(x)))
        return x + nn.Dense(CHANNELS, name="fc2")(y)


class Model(nn.Module):
    masked: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(CHANNELS, (2, 2), (2, 2), name="embed")(images)
        x = x.reshape(x.shape[0], -1, CHANNELS)
        for i in range(2):
            x = Block(self.masked, name=f"block_{i}")(x, train)
        return nn.Dense(3, name="head")(x.mean(1))


class Maps(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(CHANNELS, (3, 3), (2, 2), name="conv_stem")(images)
        x = nn.Conv(CHANNELS, (3, 3), feature_group_count=CHANNELS, use_bias=False, name="conv_depthwise")(x)
        x = nn.gelu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Conv(CHANNELS, (3, 3), padding="CIRCULAR", name="conv_circular")(x)
        x = nn.Conv(CHANNELS, (2, 2), (2, 2), name="conv_patches")(x)
        return nn.Dense(3, name="head")(nn.Conv(CHANNELS, (1, 1), name="pointwise")(x).mean((1, 2)))


@pytest.fixture(scope="module", params=[Model(), Model(masked=True), Maps()], ids=["unmasked", "masked", "maps"])
def setting(request):
    model, images = request.param, jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    rng = np.random.default_rng(1)  # scales of ones and biases of zeros would hide mistakes
    return model, jax.tree.map(lambda a: a + jnp.asarray(rng.normal(0, 0.1, a.shape), a.dtype) ** 2, variables), images


@functools.partial(jax.jit, static_argnums=(0, 3))
def step(model, variables, images, train):
    def loss(params):
        logits, new = model.apply({**variables, "params": params}, images, train=train, mutable=["batch_stats"])
        return jnp.sum(logits**2), new

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


RULE = r"norm|attn$|embed|conv"


@pytest.mark.parametrize("train", [False, True])
def test_exact_changes_nothing(setting, train):
    model, variables, images = setting
    adapted = adapt(model, [Lean(RULE, "exact")], images)
    # the same sums in other orders
    chex.assert_trees_all_close(
        step(adapted, variables, images, train), step(model, variables, images, train), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("train", [False, True])
def test_lean_changes_gradients_little_and_the_forward_pass_not(setting, train):
    model, variables, images = setting
    (loss, new), gradients = step(adapt(model, [Lean(RULE)], images), variables, images, train)
    (exact_loss, exact_new), exact = step(model, variables, images, train)
    # activations are about 1, and a convolution's sums are taken in another order
    chex.assert_trees_all_close((loss, new), (exact_loss, exact_new), rtol=1e-5, atol=1e-7)
    both = jax.tree.map(lambda a, b: (np.ravel(a), np.ravel(b)), gradients, exact)
    for a, b in jax.tree.leaves(both, is_leaf=lambda x: isinstance(x, tuple)):
        if np.linalg.norm(b) > 1e-4:  # a key's bias has no gradient but rounding
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


@pytest.mark.parametrize("setting", [Model(), Model(masked=True)], ids=["unmasked", "masked"], indirect=True)
def test_it_keeps_fewer_bytes(setting):
    model, variables, images = setting

    def kept(*rules):
        return residual_bytes(
            adapt(model, [*rules, LowRank(r"fc\d|attn/", lp_l1(2), grid=(4, 4))], images), variables, (8, 8, 3)
        )

    scores = 2 * 2 * TOKENS * TOKENS * 4  # blocks, heads: at least the weights, in float32
    norms = 4 * TOKENS * CHANNELS * 4
    assert kept() - kept(Lean("attn$")) > scores
    assert kept() - kept(Lean("norm")) > 0.7 * norms
    assert kept(Lean(RULE)) < kept(Lean(RULE, "exact")) < kept()


@pytest.mark.parametrize("setting", [Maps()], ids=["maps"], indirect=True)
def test_convolutions_keep_a_byte_for_each_number_and_their_scales(setting):
    model, variables, images = setting

    def kept(*rules):
        return residual_bytes(adapt(model, rules, images), variables, (8, 8, 3))

    inputs = (4 * 4 + 6 * 6 + 4 * 4) * CHANNELS  # depthwise, circular and patches, which nothing else keeps
    assert kept() - kept(Lean("conv_[dcp]")) > 2.5 * inputs
    assert kept(Lean("conv_[dcp]", Residuals(norm_bits=4))) < kept(Lean("conv_[dcp]")) - 0.4 * inputs


def test_compiled_or_not_and_under_remat(setting):
    model, variables, images = setting
    adapted = adapt(model, [Lean(RULE)], images)

    def loss(params):
        return adapted.apply({**variables, "params": params}, images).sum()

    compiled = jax.jit(jax.grad(loss))(variables["params"])
    for gradient in (jax.grad(loss), jax.jit(jax.grad(jax.checkpoint(loss)))):
        chex.assert_trees_all_close(gradient(variables["params"]), compiled, rtol=1e-3, atol=1e-4)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Conv(CHANNELS, (3, 3), name="conv")(nn.LayerNorm(name="norm")(x)), None


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "intermediates": 0}
        scanned = nn.scan(nn.remat(Step), variable_axes=axes, split_rngs={"params": True}, length=3)
        return scanned(name="steps")(x, None)[0]


def test_in_a_loop():
    model, x = Loop(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, CHANNELS)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    models = [model, *(adapt(model, [Lean("conv|norm", setting)], x) for setting in ("exact", "lean"))]
    plain, exact, lean = (jax.jit(jax.grad(lambda v, m=m: jnp.sum(jnp.sin(m.apply(v, x)))))(variables) for m in models)
    chex.assert_trees_all_close(exact, plain, rtol=1e-4, atol=1e-4)  # the same sums in other orders
    for a, b in zip(jax.tree.leaves(lean), jax.tree.leaves(plain), strict=True):
        assert np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_what_is_captured_is_captured_once(setting):
    model, variables, images = setting
    models = [model, adapt(model, [Lean(RULE, "exact")], images)]
    expected, captured = (m.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])[1] for m in models)
    chex.assert_trees_all_close(captured, expected, rtol=1e-4, atol=1e-5)


def test_it_goes_beside_other_rules_and_the_table_says_so():
    model, images = Model(), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    adapted = adapt(model, [Freeze("norm1"), LowRank("attn/", lp_l1(2), grid=(4, 4)), Lean(RULE)], images)
    rows = {row[0]: row[1] for row in (line.strip("| ").split("|") for line in str(adapted.resolution).splitlines())}
    rows = {path.strip(): method.strip() for path, method in rows.items()}
    assert rows["block_0/norm1"] == "frozen + lean"
    assert rows["block_1/norm2"] == "full + lean"
    assert rows["block_0/attn/query"] == "LowRank"
    assert rows["block_0/attn"] == "lean attention"
    assert not adapted.trainable("block_0/norm1/scale") and adapted.trainable("block_0/norm2/scale")


def test_the_first_rule_holds():
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    lean = dict(adapt(Model(), [Lean("block_0/norm1", Residuals(norm_bits=4)), Lean("norm1")], images).resolution.lean)
    assert {path: setting.norm_bits for path, setting in lean.items()} == {"block_0/norm1": 4, "block_1/norm1": 8}


EINSUMS = {f"{name}_einsum_cls": lambda: jnp.einsum for name in ("qk_attn_weights", "attn_weights_value")}


class Negated(nn.LayerNorm):
    @nn.compact
    def __call__(self, x):
        return -super().__call__(x)


class NegatedConv(nn.Conv):
    @nn.compact
    def __call__(self, x):
        return -super().__call__(x)


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), name="line")(nn.Conv(8, (3, 3), kernel_dilation=(1, 2), name="dilated")(x))
        x = nn.Conv(8, (1, 1), conv_general_dilated_cls=lambda: jax.lax.conv_general_dilated, name="product")(x)
        x = NegatedConv(8, (1, 1), name="negative")(x)
        x = nn.LayerNorm(use_bias=False, name="no_bias")(x)
        x = nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1), name="two_axes")(x)
        x = nn.BatchNorm(True, axis_name="devices", name="devices")(x)
        x = Negated(name="derived")(nn.LayerNorm(use_fast_variance=False, name="two_passes")(x))
        x = nn.MultiHeadDotProductAttention(2, **EINSUMS, name="einsum")(x)
        x = nn.MultiHeadDotProductAttention(2, attention_fn=lambda q, k, v: v, name="own")(x)
        return nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, name="dropout")(x, deterministic=False)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("no_bias", r"matches no_bias, a LayerNorm that must stay as it is: it lacks a scale or a bias; leave no_bias out"),
        ("two_axes", r"it normalises other axes than the last"),
        ("devices", r"its statistics are taken over devices"),
        ("two_passes", r"it computes its variance in two passes"),
        ("derived", r"derived, a Negated that must stay as it is: its class may compute something else"),
        ("einsum", r"it has products of its own"),
        ("dilated", r"dilated, a Conv that must stay as it is: it is dilated"),
        ("line", r"it is no convolution of maps, which have two axes"),
        ("product", r"product, a Conv .*: it has a product of its own"),
        ("negative", r"negative, a NegatedConv .*: its class may compute something else"),
        ("own", r"own, a MultiHeadDotProductAttention .*: it has an attention_fn of its own"),
        (
            "missing",
            r"Lean\('missing'\) matches no LayerNorm, BatchNorm, Conv or MultiHeadDotProductAttention; the nearest paths: ",
        ),
    ],
)
def test_what_must_stay_as_it_is_is_an_error(pattern, message):
    with pytest.raises(ValueError, match=message):
        adapt(Odd(), [Lean(pattern)], jnp.ones((2, 4, 8)))


@pytest.mark.parametrize("rule", [LowRank("pointwise", lp_l1(1)), LoRA("pointwise|conv_stem", 2)])
def test_a_convolution_that_another_rule_adapts_is_an_error(rule):
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"Lean\('conv\|pointwise'\) matches \w+, which L.* adapts: .*; leave .*pointwise"):
        adapt(Maps(), [rule, Lean("conv|pointwise")], images)
    adapt(Maps(), [Freeze("conv|pointwise"), Lean("conv|pointwise")], images)


def test_dropout_is_an_error():
    x = jnp.ones((2, 4, 8))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = Odd().init(rngs, x)
    with pytest.raises(ValueError, match=r"adapt: dropout has dropout, which Lean does not take; leave it out"):
        adapt(Odd(), [Lean("dropout")], jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)).apply(variables, x, rngs=rngs)


def test_plain_and_nnx_are_errors():
    with pytest.raises(ValueError, match="'plain' changes nothing"):
        Lean("norm", "plain")
    with pytest.raises(ValueError, match=r"must be one of plain, exact, lean, tiny"):
        Lean("norm", "thin")
    with pytest.raises(ValueError, match=r"Lean\('norm'\) is for Linen models alone"):
        adapt(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Lean("norm")], jnp.ones((2, 4)))
