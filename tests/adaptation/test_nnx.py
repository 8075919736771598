import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign import Mixer

from lbpwht_jax import Freeze, LoRA, LowRank, adapt, lp_l1, lp_linf
from lbpwht_jax.adaptation import FrozenParam, merge, with_branches
from lbpwht_jax.adaptation.nnx_layers import AdaptedNNXProduct

GRID = (4, 5)
FULL, LOW = lp_linf(8), lp_l1(2)
DW_ONLY = lp_l1(2, dx="exact")


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


IMAGES = random(2, 16, 20, 3)
SHAPE = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
G = random(2, 3, seed=1)


def gradients(model):
    grads = nnx.grad(lambda m: (m(IMAGES) * G).sum())(model)
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(grads))}


def test_a_model_of_others():
    model = Mixer(nnx.Rngs(0))
    before = nnx.state(model)
    expected, output = gradients(model), model(IMAGES)

    def adapted(spec):
        return adapt(model, [LowRank(r"blocks/\d/fc", spec, grid=GRID), LowRank("mix", spec)], SHAPE)

    chex.assert_trees_all_close(adapted(LOW)(IMAGES), output, atol=1e-6, rtol=0)
    chex.assert_trees_all_close(gradients(adapted(FULL)), expected, atol=1e-5, rtol=1e-4)
    matched = {f"blocks/{i}/fc{n}/kernel" for i in range(2) for n in (1, 2)}
    found = gradients(adapted(DW_ONLY))
    # a hundredth of the usual gradient: far above rounding, far below what leaving out 17 of 20 functions does
    differing = {name for name in expected if float(jnp.abs(found[name] - expected[name]).max()) > 1e-2}
    # the mean over all tokens is all that the head's side of block 1's fc2 sees: its low-rank gradient is exact
    assert differing == {"mix/kernel", *matched} - {"blocks/1/fc2/kernel"}
    low = nnx.jit(lambda m: nnx.grad(lambda m: (m(IMAGES) * G).sum())(m))(adapted(LOW))
    assert float(jnp.abs(low.embed.kernel[...] - expected["embed/kernel"]).max()) > 1e-3
    chex.assert_trees_all_equal(before, nnx.state(model))


def test_lora_and_freeze():
    model = Mixer(nnx.Rngs(0))
    adapted = adapt(model, [LoRA("blocks/0/fc1", rank=2, spec=LOW, grid=GRID), LoRA("mix", rank=1), Freeze("norm")], IMAGES)
    chex.assert_trees_all_close(adapted(IMAGES), model(IMAGES), atol=1e-6, rtol=0)
    assert isinstance(adapted.blocks[0].fc1.kernel, FrozenParam) and isinstance(adapted.blocks[1].norm1.scale, FrozenParam)
    branches = {"blocks/0/fc1/dot_general", "mix/conv_general_dilated"}
    names = gradients(adapted).keys()
    assert {name for name in names if "lora" in name} == {f"{path}/lora_{m}" for path in branches for m in "ab"}
    assert not {"blocks/0/fc1/kernel", "blocks/0/fc1/bias", "mix/kernel", "blocks/1/norm1/scale"} & names
    assert {"blocks/0/fc2/kernel", "blocks/1/fc1/kernel", "embed/kernel"} <= names
    branch = adapted.blocks[0].fc1.dot_general
    branch.lora_b[...] = random(2, 16, seed=3)
    merged = nnx.clone(model)
    merged.blocks[0].fc1.kernel[...] += 4 * (branch.lora_a[...] @ branch.lora_b[...])
    chex.assert_trees_all_close(adapted(IMAGES), merged(IMAGES), rtol=1e-4, atol=1e-5)


RULES = [LoRA("blocks/0/fc1", rank=2, spec=LOW, grid=GRID), LoRA("mix|blocks/1/fc1", rank=2), Freeze("norm")]


def branches(model):
    """``A`` and ``B`` of each adapted layer."""
    return {
        path: (layer.lora_a[...], layer.lora_b[...])
        for path, layer in nnx.iter_graph(model, graph=True)
        if isinstance(layer, AdaptedNNXProduct)
    }


def test_each_branch_is_drawn_from_a_key_of_its_own():
    model = Mixer(nnx.Rngs(0))
    adapted = adapt(model, RULES, IMAGES)
    before = nnx.state(adapted)
    one, again, other = (with_branches(adapted, nnx.Rngs(params=seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(branches(one), branches(again))
    chex.assert_trees_all_equal(before, nnx.state(adapted))
    chex.assert_trees_all_equal_shapes_and_dtypes(branches(one), branches(adapted))
    drawn = [a for found in (adapted, one, other) for a, _ in branches(found).values()]
    # nine draws, among them two layers of the same shape
    assert len({tuple(map(float, a.ravel()[:4])) for a in drawn}) == 9
    # within PEFT's bounds, 1 / sqrt(inputs), and B at zero: the output is the model's
    assert all(float(jnp.abs(a).max()) <= a.shape[0] ** -0.5 for a in drawn)
    chex.assert_trees_all_close(one(IMAGES), model(IMAGES), atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [nnx.Rngs, jax.random.key, lambda seed: nnx.Rngs(params=seed), lambda seed: {"params": seed}])
def test_adapt_draws_branches_from_the_keys_given(make):
    model, rules = Mixer(nnx.Rngs(0)), [LoRA("blocks/0/fc1", rank=2, dropout=0.5), LoRA("mix|blocks/1/fc1", rank=2)]
    one, again, other = (adapt(model, rules, IMAGES, rngs=make(seed)) for seed in (1, 1, 2))
    plain = adapt(model, rules, IMAGES)
    chex.assert_trees_all_equal(nnx.state(one), nnx.state(again), nnx.state(with_branches(plain, make(1))))
    chex.assert_trees_all_equal(nnx.state(plain), nnx.state(adapt(model, rules, IMAGES, rngs=nnx.Rngs(0))))
    for path, (a, _) in branches(one).items():
        assert not any(jnp.array_equal(a, branches(found)[path][0]) for found in (plain, other))
    first, second = (found.blocks[0].fc1.dot_general.dropout.rngs.key[...] for found in (one, other))
    assert not jnp.array_equal(jax.random.key_data(first), jax.random.key_data(second))


def test_one_stream_serves_several_models():
    rngs, model = nnx.Rngs(1), Mixer(nnx.Rngs(0))
    first, second = (adapt(model, [LoRA("mix")], IMAGES, rngs=rngs).mix.conv_general_dilated.lora_a[...] for _ in range(2))
    assert not jnp.array_equal(first, second)


class Noisy(nnx.Module):
    """A model that is called with keys."""

    def __init__(self, rngs):
        self.fc = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x, rngs):
        return self.fc(x + jax.random.normal(rngs.noise(), x.shape))


def test_keys_for_the_call_alone():
    model, x = Noisy(nnx.Rngs(0)), random(2, 20, 6)
    adapted = adapt(model, [LoRA("fc")], x, rngs=nnx.Rngs(noise=1))
    drawn = adapted.fc.dot_general.lora_a[...]
    assert jnp.array_equal(drawn, adapt(model, [LoRA("fc")], x, rngs=nnx.Rngs(noise=2)).fc.dot_general.lora_a[...])
    both = adapt(model, [LoRA("fc")], x, rngs=nnx.Rngs(noise=1, params=1))
    assert not jnp.array_equal(drawn, both.fc.dot_general.lora_a[...])
    chex.assert_trees_all_close(both(x, nnx.Rngs(3)), model(x, nnx.Rngs(3)), atol=1e-6, rtol=0)


def test_keys_of_a_linen_model():
    with pytest.raises(TypeError, match=r"adapt: rngs is for NNX models; adapted\.with_branches\(key, variables\) draws"):
        adapt(nn.Dense(3), [LoRA("")], random(2, 6), rngs=jax.random.key(1))


def test_dropout_acts_while_training():
    x = random(4, 20, 6)
    adapted = adapt(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), [LoRA("", rank=2, dropout=0.5)], x)
    branch = adapted.dot_general
    branch.lora_b[...] = random(2, 6, seed=3)
    adapted.train()
    first, second = adapted(x), adapted(x)
    assert float(jnp.abs(first - second).max()) > 1e-2
    nnx.reseed(adapted, dropout=7)
    seventh = adapted(x)
    adapted(x)
    nnx.reseed(adapted, dropout=7)
    chex.assert_trees_all_equal(adapted(x), seventh)
    adapted.eval()
    expected = x @ adapted.kernel[...] + adapted.bias[...].reshape(1, 1, 6) + 4 * (x @ branch.lora_a[...] @ branch.lora_b[...])
    chex.assert_trees_all_close(adapted(x), expected, rtol=1e-5, atol=1e-5)


def test_merged_equals_unmerged():
    model = Mixer(nnx.Rngs(0))
    adapted = with_branches(adapt(model, RULES, IMAGES), nnx.Rngs(1))
    for layer in (adapted.blocks[0].fc1.dot_general, adapted.blocks[1].fc1.dot_general, adapted.mix.conv_general_dilated):
        layer.lora_b[...] = random(*layer.lora_b.shape, seed=3)
    expected, before = adapted(IMAGES), nnx.state(adapted)
    merged = merge(adapted)
    scale = float(jnp.abs(expected).max())
    assert float(jnp.abs(expected - model(IMAGES)).max()) > 0.1 * scale
    # the branch's product added to the kernel's instead of to the output's, in float32
    chex.assert_trees_all_close(nnx.jit(lambda m, x: m(x))(merged, IMAGES), expected, atol=1e-5 * scale, rtol=0)
    chex.assert_trees_all_equal(before, nnx.state(adapted))
    # what is merged fits the model that was adapted, and its kernels are trained
    assert jax.tree.structure(nnx.state(merged, nnx.Param)) == jax.tree.structure(nnx.state(model))
    nnx.update(model, nnx.state(merged))
    chex.assert_trees_all_close(model(IMAGES), expected, atol=1e-5 * scale, rtol=0)
    # the layers' backward passes stay
    assert merged.blocks[0].fc1.dot_general == LOW.dot_general(grid=GRID, name="blocks/0/fc1")


def test_a_model_without_branches():
    model = adapt(Mixer(nnx.Rngs(0)), [Freeze("norm")], IMAGES)
    with pytest.raises(ValueError, match="with_branches: the model has no LoRA branch; adapt it first with a LoRA rule"):
        with_branches(model, nnx.Rngs(0))
    assert isinstance(merge(model).blocks[0].norm1.scale, nnx.Param)


def test_errors():
    model = Mixer(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"the token grid of blocks/0/fc1, a Linear on an input \[2, 20, 8\], cannot be known"):
        adapt(model, [LowRank("blocks/0/fc1", LOW)], SHAPE)
    with pytest.raises(ValueError, match=r"LowRank\('fc3'\) matches no dense layer .* nearest paths: blocks/"):
        adapt(model, [LowRank("fc3", LOW)], SHAPE)
    model.head.dot_general = lambda *args, **kwargs: jax.lax.dot_general(*args)
    with pytest.raises(ValueError, match="head has a dot_general of its own"):
        adapt(model, [LoRA("head")], SHAPE)
