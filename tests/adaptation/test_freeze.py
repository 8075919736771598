import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lbpwht_jax import Freeze, LoRA, LowRank, adapt, low_rank_matmul, lp_l1
from lbpwht_jax.adaptation.partition import join_params, split_params
from lbpwht_jax.adaptation.presets import parse_method
from lbpwht_jax.cost.backward import backward_flops, residual_bytes
from lbpwht_jax.data import ArraySplit, Batch, Dataset
from lbpwht_jax.models import model_info
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.efficientformer import EfficientFormer
from lbpwht_jax.models.info import Images, ModelInfo
from lbpwht_jax.models.vit import VisionTransformer
from lbpwht_jax.ops.flops import product_flops
from lbpwht_jax.ops.projection import projection_matrices
from lbpwht_jax.train import Placement, Recipe, Snapshot, Trainer

LOW = lp_l1(2)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_frozen_kernel_keeps_and_computes_nothing():
    x, w, g = shape(2, 49, 6), shape(6, 5), shape(2, 49, 5)

    def matmul(x, w):
        return low_rank_matmul(x, w, LOW, (7, 7))

    def residuals(function, *primals):
        return sorted(leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *primals)))

    coefficients, product = 2 * 2 * 3 * 49, 2 * 2 * 3 * 6 * 5
    assert residuals(matmul, x, w) == [(2, 3, 6), (6, 5)]
    # without the kernel's gradient only the kernel is needed, without the input's only the input's coefficients
    assert residuals(lambda x: matmul(x, jnp.ones((6, 5))), x) == [(6, 5)]
    assert residuals(lambda w: matmul(jnp.ones((2, 49, 6)), w), w) == [(2, 3, 6)]

    def stopped(x, w, g):
        return jax.vjp(lambda x: matmul(x, jax.lax.stop_gradient(w)), x)[1](g)[0]

    assert product_flops(stopped, x, w, g) == coefficients * (5 + 6) + product
    frozen_input = product_flops(lambda x, w, g: jax.vjp(lambda w: matmul(x, w), w)[1](g)[0], x, w, g)
    assert frozen_input == coefficients * (6 + 5) + product


@pytest.mark.parametrize("transform", ["jit", "remat", "vmap", "scan"])
def test_frozen_kernels_under_transforms(transform):
    x, w, g = random(2, 49, 6), random(6, 5, seed=1), random(2, 49, 5, seed=2)
    analysis, synthesis = projection_matrices(LOW, (7, 7))
    expected = synthesis @ (analysis @ g) @ w.T

    def loss(x, w, g):
        return (low_rank_matmul(x, jax.lax.stop_gradient(w), LOW, (7, 7)) * g).sum()

    if transform == "vmap":
        dx, dw = jax.vmap(jax.grad(loss, (0, 1)), (0, None, 0))(x, w, g)
    else:
        inner = {
            "jit": jax.jit(loss),
            "remat": jax.checkpoint(loss),
            "scan": lambda x, w, g: jax.lax.scan(lambda c, t: (c + loss(t[0], w, t[1]), None), jnp.zeros(()), (x, g))[0],
        }[transform]
        dx, dw = jax.grad(inner, (0, 1))(x, w, g)
    chex.assert_trees_all_close(dx, jnp.asarray(expected, jnp.float32), rtol=1e-4, atol=1e-5)
    assert not dw.any()


@pytest.mark.parametrize("spec", [None, LOW])
def test_lora_needs_no_weight_gradient_of_the_kernel(spec):
    x = shape(2, 49, 6)
    tokens = {"grid": (7, 7)} if spec else {}
    adapted = adapt(nn.Dense(5, use_bias=False), [LoRA("^$", rank=2, spec=spec, **tokens)], x)
    variables = jax.eval_shape(adapted.init, jax.random.key(0), x)

    def loss(variables, x):
        return adapted.apply(variables, x)

    def backward(variables, x, g):
        return jax.vjp(loss, variables, x)[1](g)

    count = 49 if spec is None else 3
    dense, branch = 2 * 2 * count * 6 * 5, 2 * 2 * count * 2 * (6 + 5)
    # projections of x, x A, the cotangent (for the layer and for B), that of x A; expansions of both dx and of x A's
    transforms = 0 if spec is None else 2 * 2 * 3 * 49 * (6 + 2 + 2 * 5 + 2 + 2 * 6 + 2)
    # dx of the kernel alone, dx and dw of the branch's two products, and the product x A, which B's gradient needs
    forward = 2 * 2 * 49 * 6 * 2
    assert product_flops(backward, variables, x, shape(2, 49, 5)) == dense + 2 * branch + forward + transforms


VIT = VisionTransformer(num_classes=4, image_size=28, patch_size=4, dim=64, depth=4, heads=2)
INFO = model_info("vit_micro_patch4_28")
INFO = dataclasses.replace(INFO, layers=dataclasses.replace(INFO.layers, last_stage=r"^(blocks_3|norm|head)(/|$)"))
FORMER = EfficientFormer(4, 64, dims=(4, 8, 8, 16), depths=(1, 1, 1, 2), attention=1, settings=Settings(frozen_batch_norm=True))
FORMER_INFO = ModelInfo(EfficientFormer, {}, Images(64), model_info("efficientformer_l1").layers)
MODELS = {"vit": (VIT, INFO), "efficientformer": (FORMER, FORMER_INFO)}
RECIPE = Recipe(epochs=3, batch_size=4, lr=1e-2)


def trainer(name, method, train):
    model, info = MODELS[name]
    images = jnp.zeros((1, *info.images.shape))
    adapted = adapt(model, parse_method(method).rules(info, train), images)
    data = Dataset("noise", *[noise(info)] * 2, tuple("abcd"))
    one = Placement(devices=jax.devices()[:1])
    variables = jax.jit(adapted.init)(jax.random.key(0), images)
    return Trainer(adapted, info, data, RECIPE, info.images.size, adapted.trainable, one), variables


def noise(info, count=4):
    rng = np.random.default_rng(0)
    edge = info.images.size
    images = rng.integers(0, 255, (count, edge, edge, info.images.channels)).astype(np.uint8)
    return ArraySplit(images, rng.integers(0, 4, count).astype(np.int32))


@pytest.mark.parametrize(
    ("name", "method", "train"),
    [
        ("vit", "lp_l1-2", "last_stage"),
        pytest.param("vit", "lp_l1-2+lora_all-4", "all", marks=pytest.mark.heavy),
        ("vit", "lora-4", "head"),
        pytest.param("efficientformer", "lp_l1-2+lora-4", "last_stage", marks=pytest.mark.heavy),
    ],
)
def test_frozen_arrays_stay_bit_for_bit(name, method, train):
    training, variables = trainer(name, method, train)
    adapted = training.model
    *_, last = training.fit(training.initial_state(variables))
    assert isinstance(last, Snapshot) and int(last.state.step) == 3
    state = last.state
    before, after = (traverse_util.flatten_dict(v, sep="/") for v in (variables, state.variables))
    assert before.keys() == after.keys()
    changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    trained = {path for path in before if path.startswith("params/") and adapted.trainable(path.removeprefix("params/"))}
    assert changed == trained
    # the optimiser keeps two moments of what is trained, and nothing of the rest
    moments = [leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(moments) == 2 * sum(before[path].size for path in trained if before[path].ndim)


def step_costs(name, method, train):
    """FLOPs of a whole training step as XLA counts them, those of the backward pass's products as traced, and bytes kept."""
    training, variables = trainer(name, method, train)
    info, data = training.info, noise(training.info, 8)
    batch = Batch(jnp.asarray(data.images), jnp.asarray(data.labels), jnp.ones(8, bool), jnp.ones(8))
    compiled = training.train_step.lower(training.initial_state(variables), batch).compile()
    shape = info.images.shape
    traced = 8 * backward_flops(training.model, variables, shape)
    return compiled.cost_analysis()["flops"], traced, residual_bytes(training.model, variables, shape)


@pytest.mark.heavy
def test_the_compiled_step_saves_what_the_count_says():
    flops, traced, kept = step_costs("vit", "full", "all")
    for method, train in (("full", "last_stage"), ("lp_l1-2", "last_stage"), ("lora-4", "last_stage"), ("full", "head")):
        part = step_costs("vit", method, train)
        # besides the products, the optimiser's and the other element-wise work of what is frozen is saved (about a tenth)
        assert 1 <= (flops - part[0]) / (traced - part[1]) < 1.15
        assert part[2] < kept / 3


def test_nothing_flows_below_the_lowest_trained_layer():
    tokens, dim = 50, 64
    layer = 2 * tokens * dim * dim
    one_block = 12 * layer  # qkv 3, proj 1, fc1 4, fc2 4
    attention = 4 * 2 * tokens * tokens * dim
    training, variables = trainer("vit", "full", "last_stage")
    info = training.info
    adapted = adapt(VIT, parse_method("full").rules(info, "last_stage"), jnp.zeros((1, 28, 28, 1)))
    head = 2 * 2 * dim * 4
    # of the last block all products twice: the trained norm in front of its first layer asks for that layer's dx
    assert backward_flops(adapted, variables, (28, 28, 1)) == 2 * one_block + attention + head
    lower = adapt(VIT, [Freeze(r"^(?!blocks_3/mlp/fc2|head)")], jnp.zeros((1, 28, 28, 1)))
    assert backward_flops(lower, variables, (28, 28, 1)) == 4 * layer + head
    low = adapt(VIT, [LowRank("blocks_3/mlp/fc2", LOW), Freeze("^(?!head)")], jnp.zeros((1, 28, 28, 1)))
    # one class token and three functions: one product, and the transforms of x and g
    rows, transforms = 4, 2 * 4 * tokens * (4 * dim + dim)
    assert backward_flops(low, variables, (28, 28, 1)) == 2 * rows * 4 * dim * dim + transforms + head


def test_parameters_are_split_and_joined():
    params = {"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}}
    trained, frozen = split_params(params, lambda path: path.startswith("a/k") or path == "b/kernel")
    assert (trained, frozen) == ({"a": {"kernel": 1}, "b": {"kernel": 3}}, {"a": {"bias": 2}})
    assert join_params(trained, frozen) == params
    assert split_params(params, lambda path: True) == (params, {})
    with pytest.raises(ValueError, match="every parameter is frozen, so there is nothing to train"):
        split_params(params, lambda path: False)
