"""Equal blocks as loops: the same numbers, names and kept bytes as one by one."""

import collections
import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LoRA, LowRank, adapt, create_model, lp_l1
from lbpwht_jax.adaptation import adapted_model, unrolled, with_loops
from lbpwht_jax.cost import backward_flops, layer_costs, residual_bytes
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.efficientformer import EfficientFormer
from lbpwht_jax.models.efficientformer_v2 import EfficientFormerV2
from lbpwht_jax.models.swin_v2 import SwinTransformerV2
from lbpwht_jax.models.vit import VisionTransformer
from lbpwht_jax.ops.residuals import RESIDUALS

CONVOLUTIONAL = {"num_classes": 5, "image_size": 64, "dims": (16, 16, 32, 32), "attention": 2}
# Models, the layers that are low-rank, and the loops they have: the number of steps and the first step's blocks.
FAMILIES = {
    "vit": (
        VisionTransformer(5, 28, 4, dim=32, depth=3, heads=2),
        r"(attn/(qkv|proj)|mlp/fc[12])$",
        [(3, ("blocks_0",))],
    ),
    "swin_v2": (
        SwinTransformerV2(5, 32, 4, dim=16, depths=(4, 1), heads=(1, 2)),
        r"(attn/(qkv|proj)|mlp/fc[12]|reduction)$",
        [(2, ("layers_0/blocks_0", "layers_0/blocks_1"))],
    ),
    "efficientformer": (
        EfficientFormer(**CONVOLUTIONAL, depths=(2, 1, 1, 3)),
        r"mlp/fc[12]$",
        [(2, ("stages_0/blocks_0",)), (2, ("stages_3/blocks_2",))],
    ),
    "efficientformer_v2": (
        EfficientFormerV2(**{**CONVOLUTIONAL, "image_size": 32}, mlp_ratios=((4, 4, 2), (2,), (2,), (2, 2))),
        r"fc[12]/conv$",
        [(2, ("stages_0/blocks_0",)), (2, ("stages_3/blocks_0",))],
    ),
}


def images(family, batch=4):
    size = FAMILIES[family][0].image_size
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, 3)), jnp.float32)


def model(family, **settings):
    module, pattern, _ = FAMILIES[family]
    return adapt(module.clone(settings=Settings(**settings)), [LowRank(pattern, lp_l1(3))], images(family)[:1])


def looped(adapted, family):
    return with_loops(adapted, images(family)[:1])


@functools.cache
def variables(family):
    """Variables in which every tensor is off its initial value."""
    rng = np.random.default_rng(1)

    def leaf(path, like):
        if path[-1].key in ("scale", "var", "gamma"):
            return jnp.asarray(rng.uniform(0.5, 1.5, like.shape), like.dtype)
        return jnp.asarray(rng.normal(size=like.shape) / np.sqrt(max(np.prod(like.shape[:-1]), 4)), like.dtype)

    shapes = jax.eval_shape(FAMILIES[family][0].init, jax.random.key(0), images(family))
    return jax.tree.map_with_path(leaf, shapes)


def gradient(model, values, x):
    others = {name: tree for name, tree in values.items() if name != "params"}

    def loss(params):
        logits, updated = model.apply({"params": params, **others}, x, train=True, mutable=list(others))
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 1]), (logits, updated)

    return jax.grad(loss, has_aux=True)(values["params"])


@pytest.mark.parametrize(
    ("family", "remat"),
    [
        ("vit", False),
        ("vit", True),
        pytest.param("swin_v2", False, marks=pytest.mark.heavy),
        pytest.param("efficientformer", False, marks=pytest.mark.heavy),
        pytest.param("efficientformer_v2", False, marks=pytest.mark.heavy),
    ],
)
def test_loops_give_the_same(family, remat):
    """Logits, gradients and running statistics, with what is kept rounded too."""
    one_by_one = model(family, residuals=RESIDUALS["lean"])
    in_loops = looped(model(family, residuals=RESIDUALS["lean"], remat=remat), family)
    loops = in_loops.module.settings.loops
    assert [(len(loop), loop[0]) for loop in loops] == FAMILIES[family][2]
    wanted, found = (jax.jit(functools.partial(gradient, m))(variables(family), images(family)) for m in (one_by_one, in_loops))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted[0]))
    # float32 rounding: two compilations of the same sums; a rounding border may lie between them, a step of 1 / 127 of a row
    chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("family", ["vit", pytest.param("swin_v2", marks=pytest.mark.heavy)])
def test_names_and_counts_are_those_of_single_blocks(family):
    one_by_one = model(family, residuals=RESIDUALS["lean"])
    in_loops = looped(one_by_one, family)
    x, shape = images(family)[:1], images(family).shape[1:]
    made = [jax.eval_shape(m.init, jax.random.key(0), x) for m in (one_by_one, in_loops)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*made)
    assert residual_bytes(in_loops, variables(family), shape) == residual_bytes(one_by_one, variables(family), shape)
    assert backward_flops(in_loops, variables(family), shape) == backward_flops(one_by_one, variables(family), shape)
    assert layer_costs(in_loops, variables(family), shape) == layer_costs(one_by_one, variables(family), shape)
    assert unrolled(in_loops) == one_by_one


@pytest.mark.heavy
def test_transformations():
    in_loops, values, x = looped(model("vit"), "vit"), variables("vit"), images("vit")
    wanted = jax.jit(functools.partial(gradient, model("vit")))(values, x)[0]
    eager = gradient(in_loops, values, x)[0]
    each = jax.vmap(lambda x: gradient(in_loops, values, x[None])[0])(x)
    mapped = jax.pmap(lambda x: gradient(in_loops, values, x)[0])(x.reshape(4, 1, *x.shape[1:]))
    mean = functools.partial(jax.tree.map, lambda leaf: leaf.mean(0))
    for found in (eager, mean(each), mean(mapped)):
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-6)  # sums in another order


def test_rules_that_tell_blocks_apart_split_a_loop():
    images = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    in_loops = create_model("vit_micro_patch4_28", num_classes=10, scan_blocks=True)
    assert [len(loop) for loop in in_loops.settings.loops] == [6]
    rules = [LowRank(r"blocks_2/mlp/fc1$", lp_l1(2)), LoRA(r"blocks_[45]/attn/qkv$", 2)]
    loops = adapt(in_loops, rules, images).module.settings.loops
    assert [[step[0] for step in loop] for loop in loops] == [["blocks_0", "blocks_1"], ["blocks_4", "blocks_5"]]
    trained = adapted_model("vit_micro_patch4_28", "lp_l1-2", "last_stage", 10, scan_blocks=True).module
    assert [len(loop) for loop in trained.settings.loops] == [5]
    assert create_model("vit_micro_patch4_28", spec=lp_l1(2), scan_blocks=True).module.settings.loops == in_loops.settings.loops


def test_within_another_module_blocks_run_one_by_one():
    """Rules may tell the blocks apart there, which are not looked at when that module is adapted."""

    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

    x = images("vit")
    in_loops = with_loops(FAMILIES["vit"][0], x)
    rules = [LowRank(r"inner/blocks_1/mlp/fc1$", lp_l1(2))]
    own = adapt(Outer(in_loops), rules, x)
    alone = adapt(FAMILIES["vit"][0], [LowRank(r"blocks_1/mlp/fc1$", lp_l1(2))], x)

    def kernels(model, inside):
        values = {"params": {"inner": variables("vit")["params"]}} if inside else variables("vit")
        grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x) ** 2)))(values["params"])
        return grads["inner"] if inside else grads

    chex.assert_trees_all_close(kernels(own, True), kernels(alone, False), rtol=1e-4, atol=1e-5)  # float32 rounding


def test_branches_run_in_loops():
    x = images("vit")
    adapted = adapt(FAMILIES["vit"][0], [LoRA(r"(attn/qkv|mlp/fc1)$", 2, spec=lp_l1(3))], x)
    values = adapted.with_branches(jax.random.key(0), variables("vit"))
    values = jax.tree.map(lambda leaf: leaf + 0.01, values)  # the branches start at zero
    assert [len(loop) for loop in with_loops(adapted, x).module.settings.loops] == [3]
    found, wanted = (jax.jit(functools.partial(gradient, m))(values, x)[0] for m in (with_loops(adapted, x), adapted))
    assert any(np.abs(leaf).max() > 1e-4 for path, leaf in jax.tree.leaves_with_path(wanted) if path[-1].key == "lora_b")
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_captured_intermediates_have_the_paths_of_single_blocks():
    one_by_one, x = FAMILIES["vit"][0], images("vit")
    in_loops = with_loops(one_by_one, x)
    captured = [
        jax.eval_shape(functools.partial(m.apply, capture_intermediates=True, mutable=["intermediates"]), variables("vit"), x)
        for m in (one_by_one, in_loops)
    ]
    chex.assert_trees_all_equal_shapes_and_dtypes(*captured)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_block_has_its_own_rate_of_drop_path(dtype):
    """Of two blocks the first never drops, the last drops each branch in 9 of 10 images: both in 81 of 100."""
    module = VisionTransformer(5, 28, 4, dim=32, depth=2, heads=2, drop_path=0.9, settings=Settings(dtype))
    x = jnp.broadcast_to(images("vit")[:1], (500, 28, 28, 3))
    in_loops = with_loops(module, x[:1])
    assert in_loops.settings.loops
    values = {"params": {k: v for k, v in variables("vit")["params"].items() if k != "blocks_2"}}
    logits = jax.jit(lambda x: in_loops.apply(values, x, train=True, rngs={"dropout": jax.random.key(0)}))(x)
    first = collections.Counter(np.asarray(logits.astype(jnp.float32))[:, 0].tolist())
    assert len(first) == 4
    assert abs(max(first.values()) / 500 - 0.81) < 0.08  # four standard deviations
    chex.assert_trees_all_equal(jax.jit(in_loops.apply)(values, x[:2]), jax.jit(in_loops.apply)(values, x[1:3]))


def test_what_a_compiled_step_holds_falls_with_what_is_kept():
    """On a CPU, whose compiler drops the barriers that keep single blocks from holding on to what they compute again."""
    x = images("vit", 64)
    module = dataclasses.replace(FAMILIES["vit"][0], depth=6, settings=Settings(residuals=RESIDUALS["lean"]))
    rules = [LowRank(FAMILIES["vit"][1], lp_l1(3))]
    one_by_one = adapt(module, rules, x[:1])
    values = jax.eval_shape(one_by_one.init, jax.random.key(0), x[:1])
    holds = [
        jax.jit(functools.partial(gradient, m)).lower(values, x).compile().memory_analysis().temp_size_in_bytes
        for m in (one_by_one, with_loops(one_by_one, x[:1]))
    ]
    assert holds[1] < 0.6 * holds[0]
