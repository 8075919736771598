import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import parameterized
from flax import traverse_util
from foreign import ViT

from lbpwht_jax import Freeze, LoRA, LowRank, LowRankDense, adapt, lp_l1, lp_linf
from lbpwht_jax.adaptation.lora import init_a
from lbpwht_jax.models import model_info
from lbpwht_jax.models.blocks import Part
from lbpwht_jax.models.conv_blocks import convolution
from lbpwht_jax.models.info import Images, ModelInfo, TimmFiles
from lbpwht_jax.models.norms import joined_norm
from lbpwht_jax.models.vit import VisionTransformer
from lbpwht_jax.ops.projection import projection_matrices
from lbpwht_jax.weights.peft import load_adapter, save_adapter

TOKENS = {"grid": (4, 5), "prefix_tokens": 1}
LOW, FULL = lp_l1(2), lp_linf(8)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(variables, seed=5):
    """The variables with every LoRA ``B`` random."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(variables))))

    def drawn(path, leaf):
        key = next(keys)
        return 0.1 * jax.random.normal(key, leaf.shape) if path[-1] == jax.tree_util.DictKey("lora_b") else leaf

    return jax.tree.map_with_path(drawn, variables)


class Convolutions(Part):
    @nn.compact
    def __call__(self, x, train=False):
        x = joined_norm(self, convolution(self, "conv1", 8, 3, 2), "norm1", x, train, "gelu")
        x = joined_norm(self, convolution(self, "conv2", 8, 5, depthwise=True), "norm2", x, train, "gelu")
        return nn.Dense(5, name="head")(joined_norm(self, convolution(self, "conv3", 6, 3), "norm3", x, train).mean((1, 2)))


VIT_INFO = model_info("vit_micro_patch4_28")
OURS = VisionTransformer(num_classes=5, image_size=20, patch_size=4, dim=12, depth=2, heads=2)
FOREIGN = ViT()
# a fused qkv, a Dense; a 1x1 Conv, the DenseGeneral layers of Flax's attention
MODELS = {
    "ours": (OURS, [LoRA("attn/(qkv|proj)|fc1", rank=3, spec=LOW, fused="qkv"), LowRank("fc2", LOW)], (2, 20, 20, 1)),
    "convolutions": (Convolutions(), [LoRA("conv[13]", rank=3)], (2, 12, 12, 3)),
    "foreign": (FOREIGN, [LoRA("attn|fc1", rank=2, alpha=5, spec=LOW, **TOKENS), LoRA("mix|fc2", rank=3)], (2, 16, 20, 3)),
}


def made(name):
    model, rules, shape = MODELS[name]
    images = random(*shape)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    adapted = adapt(model, rules, images)
    return adapted, variables, adapted.with_branches(jax.random.key(1), variables), images


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_at_first_unchanged(name):
    adapted, variables, started, images = made(name)
    # a 1x1 convolution sums in another order than a product
    chex.assert_trees_all_close(adapted.apply(started, images), adapted.module.apply(variables, images), atol=1e-6, rtol=0)
    changed = adapted.apply(filled(started), images)
    assert float(jnp.abs(changed - adapted.apply(started, images)).max()) > 1e-2


def test_the_branches_start_as_peft_s():
    a = init_a(jax.random.key(0), (400, 50))
    # torch's kaiming_uniform_ with a = sqrt(5), which PEFT draws A with, is uniform within 1 / sqrt(inputs)
    assert float(jnp.abs(a).max()) <= 1 / 20
    assert float(a.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    _, _, started, _ = made("ours")
    flat = traverse_util.flatten_dict(started["params"], sep="/")
    assert not flat["blocks_0/attn/qkv/lora_b"].any()
    assert flat["blocks_0/attn/qkv/lora_a"].shape == (12, 9) and flat["blocks_0/attn/proj/lora_b"].shape == (3, 12)
    assert (flat["blocks_0/attn/qkv/lora_a"] != flat["blocks_1/attn/qkv/lora_a"]).any()


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged(name):
    adapted, variables, started, images = made(name)
    trained = filled(started)
    merged = adapted.merge(trained)
    chex.assert_trees_all_equal_shapes(merged, variables)
    expected = adapted.apply(trained, images)
    scale = float(jnp.abs(expected).max())
    chex.assert_trees_all_close(adapted.module.apply(merged, images), expected, atol=1e-5 * scale, rtol=0)
    back = adapted.unmerge(merged, trained)
    chex.assert_trees_all_close(back, trained, atol=1e-6, rtol=0)


class GradientsOfABranch(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=True)
    @parameterized.named_parameters(("exact", None), ("full_rank", FULL), ("low_rank", LOW))
    def test_against_the_chain_rule(self, spec):
        """Both products of the branch are projected as the layer's own."""
        x, w, a, b, g = (random(*shape, seed=i) for i, shape in enumerate([(2, 21, 6), (6, 7), (6, 3), (3, 7), (2, 21, 7)]))
        adapted = adapt(nn.Dense(7), [LoRA("^$", rank=3, alpha=2, spec=spec, **(TOKENS if spec else {}))], x)

        @self.variant
        def backward(params, x, g):
            y, pullback = jax.vjp(lambda p, x: adapted.apply({"params": p}, x), params, x)
            return y, *pullback(g)

        y, grads, dx = backward({"kernel": w, "bias": jnp.ones(7), "lora_a": a, "lora_b": b}, x, g)
        chex.assert_trees_all_close(y, x @ w + 2 / 3 * (x @ a @ b) + 1, rtol=1e-5, atol=1e-5)
        project, expand = (np.eye(21), np.eye(21)) if spec is None else projection_matrices(spec, TOKENS["grid"], 1)
        project, expand = jnp.asarray(project, jnp.float32), jnp.asarray(expand, jnp.float32)
        px, pg = project @ x, project @ g
        dz = expand @ (2 / 3 * pg @ b.T)
        expected = {
            "lora_b": 2 / 3 * jnp.einsum("brc,brd->cd", project @ (x @ a), pg),
            "lora_a": jnp.einsum("brc,brd->cd", px, project @ dz),
            "kernel": jnp.zeros_like(w),
            "bias": jnp.zeros(7),
        }
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, expected)
        # sums of up to 42 products of numbers around 10, in float32
        chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_close(dx, expand @ (pg @ w.T) + expand @ (project @ dz @ a.T), rtol=1e-4, atol=1e-4)


def test_the_exact_directions_of_a_branch():
    """With an exact backward pass, and with every function kept, the gradients are those of finite differences."""
    x, w, a, b = (random(*shape, seed=i) for i, shape in enumerate([(1, 21, 3), (3, 2), (3, 2), (2, 2)]))
    for spec in (None, FULL):
        adapted = adapt(nn.Dense(2, use_bias=False), [LoRA("^$", rank=2, spec=spec, **(TOKENS if spec else {}))], x)

        def output(b, a, x, adapted=adapted):
            return adapted.apply({"params": {"kernel": w, "lora_a": a, "lora_b": b}}, x)

        # linear in each argument, so that wide differences are exact but for rounding; chex multiplies atol by b.size
        chex.assert_numerical_grads(output, (b, a, x), order=1, atol=1e-2 / b.size, rtol=1e-2, eps=1e-1, modes=["rev"])


RATE = 0.4


def masks(model, x, key, names):
    """What each layer's dropout does to an input of ones: the layers' outputs where kernels are zero, branches the identity."""
    adapted = adapt(model, [LoRA("", rank=6, alpha=6, dropout=RATE)], x)
    eye = {"kernel": jnp.zeros((6, 6)), "lora_a": jnp.eye(6), "lora_b": jnp.eye(6)}
    params = dict.fromkeys(names, eye) if names else eye
    return adapted.apply({"params": params}, jnp.ones_like(x), rngs={"dropout": key})


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return [nn.Dense(6, use_bias=False, name=name)(x) for name in ("one", "other")]


def test_each_layer_and_key_draws_its_own_dropout():
    x, names = random(8, 21, 6), ("one", "other")
    first, second = masks(TwoLayers(), x, jax.random.key(0), names)
    for found in (first, second):
        assert set(np.unique(found)) == {0, np.float32(1 / (1 - RATE))}
        # of 1,008 draws; their standard deviation is 1.5 %
        assert float((found == 0).mean()) == pytest.approx(RATE, abs=0.06)
    assert (first != second).any()
    again, other = (masks(TwoLayers(), x, jax.random.key(seed), names)[0] for seed in (0, 1))
    chex.assert_trees_all_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("spec", [None, FULL], ids=["exact", "every_function_kept"])
def test_gradients_under_dropout_are_those_of_the_masked_branch(spec):
    x, w, a, b, g = (random(*shape, seed=i) for i, shape in enumerate([(2, 21, 6), (6, 6), (6, 3), (3, 6), (2, 21, 6)]))
    key = jax.random.key(3)
    mask = masks(nn.Dense(6, use_bias=False), x, key, ())
    rule = LoRA("^$", rank=3, alpha=2, spec=spec, dropout=RATE, **(TOKENS if spec else {}))
    adapted = adapt(nn.Dense(6, use_bias=False), [rule], x)
    params = {"kernel": w, "lora_a": a, "lora_b": b}

    def formula(params, x, mask):
        return x @ w + 2 / 3 * ((x * mask) @ params["lora_a"] @ params["lora_b"])

    y, pullback = jax.vjp(lambda p, x: adapted.apply({"params": p}, x, rngs={"dropout": key}), params, x)
    wanted, expected = jax.vjp(lambda p, x: formula(p, x, mask), params, x)
    # sums of up to 42 products of numbers around 10, in float32
    chex.assert_trees_all_close(y, wanted, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(pullback(g), expected(g), rtol=1e-4, atol=1e-4)
    # an evaluation has none
    chex.assert_trees_all_close(adapted.apply({"params": params}, x), formula(params, x, 1.0), rtol=1e-4, atol=1e-4)


def test_dropout_that_cannot_be():
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"dropout must be from 0 to less than 1, got"):
            LoRA("fc", dropout=rate)
    x = random(2, 20, 6)
    adapted = adapt(Odd(), [LoRA("layer", rank=3, dropout=RATE)], x)
    with pytest.raises(ValueError, match=r"'dropout' does not reach layer, whose branch has dropout; the nn.scan"):
        adapted.apply(adapted.init(jax.random.key(0), x), x, rngs={"dropout": jax.random.key(0)})


@pytest.mark.parametrize("name", MODELS)
def test_the_file_round_trips(name, tmp_path):
    adapted, variables, started, _ = made(name)
    info = VIT_INFO if name == "ours" else None
    trained = jax.tree.map(lambda leaf: leaf + 0.1, filled(started))
    # frozen parameters are not trained, and not in the file
    flat = traverse_util.flatten_dict(trained["params"], sep="/")
    frozen = traverse_util.flatten_dict(variables["params"], sep="/")
    flat = {path: leaf if adapted.trainable(path) else frozen[path] for path, leaf in flat.items()}
    trained = {**trained, "params": traverse_util.unflatten_dict(flat, sep="/")}
    save_adapter(tmp_path / "new" / "folder", adapted, trained, info)
    for base in (variables, started):
        loaded = load_adapter(tmp_path / "new" / "folder", adapted, base, info)
        chex.assert_trees_all_equal(loaded, trained)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


class Odd(nn.Module):
    """What no timm model has: a stack of scanned layers, a norm's scale beside a kernel, an integer variable, bfloat16."""

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return layer(x), None

        scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x = scanned(nn.Dense(6, name="layer"), x, None)[0]
        steps = self.variable("counters", "steps", lambda: jnp.int32(2**24 + 1))
        scaled = nn.WeightNorm(nn.Dense(6, name="own"), variable_filter={"kernel"})
        half = nn.Dense(6, param_dtype=jnp.bfloat16, dtype=jnp.float32, name="own_1")
        return scaled(x) + half(x) + 0 * steps.value.astype(jnp.float32)


def test_any_model_round_trips(tmp_path):
    x = random(2, 20, 6)
    adapted = adapt(Odd(), [LoRA("layer", rank=3, spec=LOW, grid=(4, 5))], x)
    fresh = adapted.init(jax.random.key(0), x)
    trained = filled(fresh)
    save_adapter(tmp_path, adapted, trained)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.layer.lora_A.weight"].shape == (2, 3, 6)
    assert len(tensors) == len(jax.tree.leaves(fresh)) - 2  # all but the frozen kernel and bias of the stack
    loaded = load_adapter(tmp_path, adapted, fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, trained)
    chex.assert_trees_all_equal(loaded, trained)


def test_names_that_would_share_a_key(tmp_path):
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale, kernel = (self.param(name, nn.initializers.ones, (2,)) for name in ("scale", "kernel"))
            return nn.Dense(2, name="fc")(x) * (scale + kernel).reshape(1, 2)

    x = random(3, 2)
    adapted = adapt(Both(), [LoRA("fc", rank=1)], x)
    trained = filled(adapted.init(jax.random.key(0), x))
    trained["params"]["kernel"] = jnp.array([3.0, 4.0])
    save_adapter(tmp_path, adapted, trained)
    loaded = load_adapter(tmp_path, adapted, adapted.init(jax.random.key(0), x))
    chex.assert_trees_all_equal(loaded, trained)
    keys = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {"base_model.model.params.kernel", "base_model.model.params.scale"} <= keys


def test_the_file_is_laid_out_as_peft_s(tmp_path):
    rules = [LoRA("attn/(qkv|proj)", rank=3, alpha=6, fused="qkv", dropout=0.1), Freeze(r"^(?!head)")]
    adapted = adapt(OURS, rules, random(1, 20, 20, 1))
    trained = filled(adapted.init(jax.random.key(0), random(1, 20, 20, 1)))
    save_adapter(tmp_path, adapted, trained, "vit_micro_patch4_28")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    shapes = {}
    for i in range(2):
        for layer, rank, outputs in (("qkv", 9, 36), ("proj", 3, 12)):
            shapes[f"base_model.model.blocks.{i}.attn.{layer}.lora_A.weight"] = (rank, 12)
            shapes[f"base_model.model.blocks.{i}.attn.{layer}.lora_B.weight"] = (outputs, rank)
    shapes |= {"base_model.model.head.weight": (5, 12), "base_model.model.head.bias": (5,)}
    assert {key: tensor.shape for key, tensor in tensors.items()} == shapes
    own = trained["params"]["blocks_1"]["attn"]["proj"]["lora_a"]
    np.testing.assert_array_equal(tensors["base_model.model.blocks.1.attn.proj.lora_A.weight"], own.T)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 3 and config["lora_alpha"] == 6
    assert config["lora_dropout"] == 0.1
    assert config["target_modules"] == sorted(f"blocks.{i}.attn.{layer}" for i in range(2) for layer in ("qkv", "proj"))
    assert config["rank_pattern"] == {rf"blocks\.{i}\.attn\.qkv": 9 for i in range(2)}
    assert config["alpha_pattern"] == {rf"blocks\.{i}\.attn\.qkv": 18 for i in range(2)}
    assert config["modules_to_save"] == ["head"]


class Normalised(nn.Module):
    """1x1 convolutions kept as matrices, and batch normalisation."""

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(2):
            x = LowRankDense(4, spec=None, name=f"conv_{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"norm_{i}")(x)
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def test_running_statistics_and_pointwise_convolutions(tmp_path):
    info = ModelInfo(Normalised, {}, Images(4), files=TimmFiles(pointwise=r"conv_\d/kernel"))
    x, model = random(2, 4, 4, 3), Normalised()
    adapted = adapt(model, [LoRA("conv_0", rank=2), Freeze("norm_0")], x)
    variables = adapted.init(jax.random.key(0), x)
    _, state = adapted.apply(variables, x, train=True, mutable=["batch_stats"])
    trained = filled({**variables, **state})
    save_adapter(tmp_path, adapted, trained, info)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model."): tensor.shape for key, tensor in tensors.items()} == {
        "conv.0.lora_A.weight": (2, 3, 1, 1),
        "conv.0.lora_B.weight": (4, 2, 1, 1),
        "conv.1.weight": (4, 4, 1, 1),
        "conv.1.bias": (4,),
        "norm.1.weight": (4,),
        "norm.1.bias": (4,),
        "norm.1.running_mean": (4,),
        "norm.1.running_var": (4,),
        "head.weight": (2, 4),
        "head.bias": (2,),
    }
    loaded = load_adapter(tmp_path, adapted, variables, info)
    stats = {"norm_0": variables["batch_stats"]["norm_0"], "norm_1": trained["batch_stats"]["norm_1"]}
    chex.assert_trees_all_equal(loaded, {**trained, "batch_stats": stats})


def test_files_that_do_not_fit(tmp_path):
    adapted, variables, started, images = made("ours")
    save_adapter(tmp_path, adapted, started, VIT_INFO)

    def load(rules, folder=tmp_path):
        return load_adapter(folder, adapt(OURS, rules, images), variables, VIT_INFO)

    with pytest.raises(ValueError, match=r"does not fit the model and its rules .*\n.*of another shape"):
        load([LoRA("attn/(qkv|proj)|fc1", rank=2, fused="qkv")])
    with pytest.raises(ValueError, match=r"missing\n  - base_model\.model\.blocks\.0\.mlp\.fc2\.lora_A\.weight \[3, 48\]"):
        load([LoRA("attn/(qkv|proj)|fc1|fc2", rank=3, fused="qkv")])
    with pytest.raises(ValueError, match=r"unexpected\n  \+ base_model\.model\.blocks\.0\.attn\.proj\.lora_A\.weight"):
        load([LoRA("attn/qkv|fc1", rank=3, fused="qkv")])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj has alpha 8, .* the model's rule has alpha 16"):
        load([LoRA("attn/(qkv|proj)|fc1", rank=3, alpha=16, fused="qkv")])
    with pytest.raises(FileNotFoundError):
        load(MODELS["ours"][1], tmp_path / "elsewhere")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not a JSON file"):
        load(MODELS["ours"][1])
