"""Models of the structures that others' models have: forward unchanged, exact at full rank, merged, saved, under transforms."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, traverse_util
from structures import IMAGES, LINEN, NNXBlock, NNXMixer, NNXNormalised, NNXStacked, Towers

from lbpwht_jax import Freeze, LoRA, LowRank, adapt, lp_l1, lp_linf
from lbpwht_jax.adaptation import merge, resolution_of, unmerge, with_branches
from lbpwht_jax.weights import adapt_from, load_adapter, save_adapter


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def difference(actual, expected):
    """The largest difference, in units of the largest expected value; NumPy's, for which nothing is compiled."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.abs(actual - expected).max() / np.abs(expected).max()


def unboxed(variables):
    return nn.meta.unbox(variables)


def filled(variables, seed=7):
    """The variables with every LoRA ``B`` random."""

    def drawn(path, leaf):
        return random(*leaf.shape, seed=seed) / 10 if path[-1] == jax.tree_util.DictKey("lora_b") else leaf

    return jax.tree.map_with_path(drawn, variables)


@pytest.fixture(params=LINEN)
def structure(request):
    return LINEN[request.param]


def test_a_structure(structure, tmp_path):
    model, shape, pattern, grid, merges, has_low = structure
    x = random(*shape)
    functions = lp_linf(8, ndim=len(grid or (0, 0)))
    low = adapt(model, [LowRank(pattern, functions, grid)] if has_low else [], x)
    frozen = "norm|embed" if has_low else "depthwise"
    lora = adapt(model, [LoRA(pattern, 2, 4, functions if has_low else None, grid), Freeze(frozen)], x)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    started = lora.with_branches(jax.random.key(1), variables)
    trained = filled(started)

    def gradient(model, variables, remat=False):
        def loss(variables):
            return (model.apply(variables, x) ** 2).sum()

        return unboxed(jax.grad(jax.checkpoint(loss) if remat else loss)(variables))

    @jax.jit
    def compute(variables, started, trained):
        outputs = {"model": model.apply(variables, x), "low": low.apply(variables, x), "started": lora.apply(started, x)}
        outputs["trained"] = lora.apply(trained, x)
        gradients = {"model": gradient(model, variables), "low": gradient(low, variables)}
        return outputs, gradients, gradient(lora, trained), gradient(lora, trained, remat=True)

    outputs, gradients, of_branches, rematerialised = jax.device_get(compute(variables, started, trained))
    # a 1x1 convolution sums in another order than a product; every function is kept, but computed with
    assert difference(outputs["low"], outputs["model"]) < 1e-5 and difference(outputs["started"], outputs["model"]) < 1e-5
    chex.assert_trees_all_close(gradients["low"], gradients["model"], atol=2e-5, rtol=1e-4)
    chex.assert_trees_all_close(rematerialised, of_branches, atol=1e-5, rtol=1e-5)
    assert difference(outputs["trained"], outputs["model"]) > 1e-3
    changed = {path for path, leaf in traverse_util.flatten_dict(of_branches["params"], sep="/").items() if leaf.any()}
    assert {path.rpartition("/")[2] for path in changed if path.startswith(tuple(lora_paths(lora)))} == {"lora_a", "lora_b"}
    # the table counts every layer of a stack
    sizes = traverse_util.flatten_dict(unboxed(started)["params"], sep="/")
    counted = sum(leaf.size for path, leaf in sizes.items() if lora.trainable(path))
    assert lora.trainable_parameters() == (counted, sum(leaf.size for leaf in sizes.values()))

    save_adapter(tmp_path, lora, trained)
    loaded = load_adapter(tmp_path, lora, variables)
    chex.assert_trees_all_equal(loaded, jax.tree.map(np.asarray, trained))
    again, loaded = adapt_from(tmp_path, model, x, variables=variables)
    assert again == lora
    chex.assert_trees_all_equal(loaded, jax.tree.map(np.asarray, trained))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), started)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms compute in float32
        output, back = jax.eval_shape(jax.value_and_grad(lambda v: lora.apply(v, x.astype(jnp.bfloat16)).sum()), half)
    assert output.dtype == jnp.bfloat16 and {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype(jnp.bfloat16)}

    if not merges:
        with pytest.raises(ValueError, match="merge: fc, mix computes its kernel from the stored one before it is used"):
            lora.merge(trained)
        return
    merged = lora.merge(trained)
    chex.assert_trees_all_equal_shapes(merged, variables)
    assert difference(jax.jit(model.apply)(merged, x), outputs["trained"]) < 1e-5
    chex.assert_trees_all_close(lora.unmerge(merged, trained), trained, atol=1e-6, rtol=0)


def lora_paths(adapted):
    return [adaptation.layer.path for adaptation in adapted.resolution.branches]


def test_each_intermediate_result_is_captured_once():
    model, shape, pattern, *_ = LINEN["a map and a vector"]
    x = random(*shape)
    adapted = adapt(model, [LoRA(pattern, 2, spec=lp_l1(2))], x)
    started = adapted.with_branches(jax.random.key(1), jax.jit(model.init)(jax.random.key(0), x))
    _, expected = model.apply({"params": started["params"]}, x, capture_intermediates=True)
    for mutable in (False, ["intermediates"], True):
        _, state = adapted.apply(started, x, capture_intermediates=True, mutable=mutable)
        chex.assert_trees_all_equal_structs(state["intermediates"], expected["intermediates"])
    chex.assert_trees_all_close(state["intermediates"], expected["intermediates"], atol=1e-5)


def test_adapters_by_name():
    model, shape, pattern, *_ = LINEN["scan, parameters along axis 1"]
    x = random(*shape)
    adapted = adapt(model, [LoRA(pattern, 2), Freeze("embed|norm")], x)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    adapters = {}
    for seed, name in enumerate(("pets", "cars")):
        adapters[name] = filled(adapted.with_branches(jax.random.key(seed), variables), seed)
        adapters[name]["params"]["head"] = jax.tree.map(lambda leaf, s=seed: leaf + s + 1, variables["params"]["head"])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(variables):
        return adapted.apply(variables, x)

    pets, cars = (forward(adapters[name]) for name in ("pets", "cars"))
    assert difference(pets, cars) > 1e-2
    for only, weights in {"pets": {"pets": 1.0}, "cars": {"cars": 1.0, "pets": 0.0}}.items():
        chex.assert_trees_all_close(
            adapted.merge_weighted(variables, adapters, weights), adapted.merge(adapters[only]), atol=1e-6
        )
    halves = adapted.merge_weighted(variables, adapters, {"pets": 0.25, "cars": 0.5})
    mean = jax.tree.map(
        lambda w, one, other: w + 0.25 * (one - w) + 0.5 * (other - w), variables, *map(adapted.merge, adapters.values())
    )
    chex.assert_trees_all_close(halves, mean, atol=1e-6)
    with pytest.raises(ValueError, match="merge_weighted: no adapter is called 'dogs'; there are 'pets'"):
        adapted.merge_weighted(variables, adapters, {"pets": 1.0, "dogs": 1.0})
    adapters["cars"]["params"]["head"]["bias"] = jnp.ones(4)
    with pytest.raises(ValueError, match=r"head/bias is \(3,\) in the model and \(4,\) in the adapter 'cars'; adapters of"):
        adapted.merge_weighted(variables, adapters, {"cars": 1.0})


def test_other_methods_than_call():
    model, x = Towers(), random(*IMAGES)
    adapted = adapt(model, [LoRA("fc", 2, spec=lp_l1(2))], x, method="encode")
    started = adapted.with_branches(jax.random.key(1), model.init(jax.random.key(0), x, method="encode"))
    for method in ("encode", Towers.encode):
        expected = model.apply({"params": started["params"]}, x, method=method)
        assert difference(adapted.apply(started, x, method=method), expected) < 1e-5


NNX_RULES = [LoRA("blocks/fc1", 2, 4, lp_linf(8), (4, 5)), Freeze("embed|unused"), LowRank("fc2", lp_linf(8), (4, 5))]


def nnx_stacked():
    model, x = NNXStacked(nnx.Rngs(0)), random(*IMAGES)
    adapted = with_branches(adapt(model, NNX_RULES, x), nnx.Rngs(1))
    adapted.blocks.fc1.dot_general.lora_b[...] = random(3, 2, 8, seed=7) / 10
    return model, adapted, x


def test_a_scanned_nnx_model(tmp_path):
    model, adapted, x = nnx_stacked()
    plain = merge(adapted)
    forward = nnx.jit(lambda model: model(x))
    expected = forward(adapted)
    assert difference(expected, forward(model)) > 1e-3
    assert difference(forward(plain), expected) < 1e-5
    assert jax.tree.structure(nnx.state(plain)) == jax.tree.structure(nnx.state(model))
    back = unmerge(plain, adapted)
    chex.assert_trees_all_close(nnx.state(back), nnx.state(adapted), atol=1e-6)
    # three layers of two branches, and all but what is frozen
    count = sum(leaf[...].size for _, leaf in nnx.iter_graph(adapted) if isinstance(leaf, nnx.Param))
    assert adapted.resolution.trainable_parameters().trainable == count
    save_adapter(tmp_path, adapted)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.blocks.fc1.lora_A.weight"].shape == (3, 2, 4)
    assert "base_model.model.embed.weight" not in tensors and "base_model.model.head.weight" in tensors
    fresh = adapt(model, NNX_RULES, x)
    before = nnx.state(fresh)
    chex.assert_trees_all_equal(nnx.state(load_adapter(tmp_path, fresh)), nnx.state(adapted))
    chex.assert_trees_all_equal(before, nnx.state(fresh))
    again = adapt_from(tmp_path, model, x)
    assert again.resolution == adapted.resolution
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(adapted))


def test_nnx_calls_with_keys_are_traced():
    model, x = NNXBlock(nnx.Rngs(0)), random(2, 20, 4)
    adapted = adapt(model, [LowRank("fc1", lp_linf(8), (4, 5))], x, rngs=nnx.Rngs(1))
    assert difference(adapted(x, rngs=nnx.Rngs(2)), model(x, rngs=nnx.Rngs(2))) < 1e-5


def test_an_nnx_convolution(tmp_path):
    model, x = NNXMixer(nnx.Rngs(0)), random(1, 4, 6, 3)
    adapted = adapt(model, [LoRA("embed", 2)], x)
    adapted.embed.conv_general_dilated.lora_b[...] = random(2, 6, seed=7)
    forward = nnx.jit(lambda model: model(x))
    assert difference(forward(adapted), forward(model)) > 1e-2
    assert difference(forward(merge(adapted)), forward(adapted)) < 1e-5
    save_adapter(tmp_path, adapted)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.embed.lora_A.weight"].shape == (2, 3, 2, 2)
    assert tensors["base_model.model.embed.lora_B.weight"].shape == (6, 2, 1, 1)
    chex.assert_trees_all_equal(nnx.state(adapt_from(tmp_path, model, x)), nnx.state(adapted))


def test_an_nnx_kernel_that_is_computed():
    model, x = NNXNormalised(nnx.Rngs(0)), random(*IMAGES)
    adapted = adapt(model, [LoRA("fc", 2)], x)
    assert adapted.resolution == 8 and resolution_of(adapted).branches[0].layer.path == "fc/layer_instance"
    assert difference(adapted(x), model(x)) < 1e-5
    with pytest.raises(ValueError, match="merge: fc/layer_instance computes its kernel"):
        merge(adapted)
    with pytest.raises(ValueError, match="adapt: the model is adapted already; give all rules at once"):
        adapt(adapted, [LowRank("head", lp_l1(2))], x)
    with pytest.raises(ValueError, match="the model is not adapted, or merged"):
        merge(model)


def test_bridged_modules():
    """What is outside is adapted; what is inside is frozen in a Linen model."""

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nnx.bridge.ToLinen(NNXBlock, args=(), name="inner")(x))

    x = random(2, 20, 4)
    linen = adapt(Outer(), [LowRank("head", lp_linf(8), (4, 5)), Freeze("inner")], x)
    variables = Outer().init(jax.random.key(0), x)
    assert difference(linen.apply(variables, x), Outer().apply(variables, x)) < 1e-5
    gradient = jax.grad(lambda v: (linen.apply(v, x) ** 2).sum())(variables)["params"]
    assert gradient["head"]["kernel"].any() and not gradient["inner"]["fc1"]["kernel"].any()
    with pytest.raises(
        ValueError, match=r"matches inner/fc1, but no dense layer .*, if the example call reaches it outside nnx"
    ):
        adapt(Outer(), [LoRA("inner/fc1")], x)

    class NNXOuter(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.bridge.ToNNX(nn.Dense(4), rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.inner(x))

    model = nnx.bridge.lazy_init(NNXOuter(nnx.Rngs(0)), x)
    adapted = adapt(model, [LowRank("head", lp_linf(8), (4, 5))], x)
    assert difference(adapted(x), model(x)) < 1e-5
    with pytest.raises(ValueError, match=r"adapt: inner/\w+ belongs to a Linen module inside .*, so it cannot be frozen"):
        adapt(model, [Freeze("inner")], x)


def test_what_the_example_call_does_not_reach():
    model, x = NNXStacked(nnx.Rngs(0)), random(*IMAGES)
    with pytest.raises(ValueError, match=r"LoRA\('unused'\) matches unused, which the example call does not reach"):
        adapt(model, [LoRA("unused")], x)
