"""What the four families keep for the backward pass, by setting: the gradients that follow, and every array that is kept."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lbpwht_jax import LowRank, Residuals, adapt, create_model, lp_l1
from lbpwht_jax.data import open_dataset
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.efficientformer import EfficientFormer
from lbpwht_jax.models.efficientformer_v2 import EfficientFormerV2
from lbpwht_jax.models.swin_v2 import SwinTransformerV2
from lbpwht_jax.models.vit import VisionTransformer
from lbpwht_jax.ops.residuals import RESIDUALS
from lbpwht_jax.weights import load_bundled

BATCH = 11
CONVOLUTIONAL = {"num_classes": 5, "image_size": 64, "dims": (16, 16, 32, 32), "attention": 1}
FAMILIES = {
    "vit": (VisionTransformer(5, 28, 4, dim=32, depth=2, heads=2), r"(attn/(qkv|proj)|mlp/fc[12])$"),
    "swin_v2": (SwinTransformerV2(5, 32, 4, dim=16, depths=(2, 1), heads=(1, 2)), r"(attn/(qkv|proj)|mlp/fc[12]|reduction)$"),
    "efficientformer": (EfficientFormer(**CONVOLUTIONAL, depths=(1, 1, 1, 2)), r"mlp/fc[12]$"),
    "efficientformer_v2": (EfficientFormerV2(**CONVOLUTIONAL, mlp_ratios=((8,), (2,), (2,), (2,))), r"fc[12]/conv$"),
}
# 1 - cosine of each parameter's gradient with the plain one's, at most, from random weights: twice what was found in lean. In
# EfficientFormerV2 a gradient passes three rounded norms per block, and 4 bits turn some of them far.
EXACT = 1e-9
TURNED = {
    "lean": {"vit": 6e-5, "swin_v2": 2e-4, "efficientformer": 1.2e-3, "efficientformer_v2": 2.4e-3},
    "tiny": {"vit": 0.01, "swin_v2": 0.01, "efficientformer": 0.06, "efficientformer_v2": 0.35},
}


def model(family, residuals, frozen_batch_norm=True):
    """A family's model, its layers low-rank, under a setting."""
    plain, pattern = FAMILIES[family]
    module = plain.clone(settings=Settings(frozen_batch_norm=frozen_batch_norm, residuals=RESIDUALS[residuals]))
    return adapt(module, [LowRank(pattern, lp_l1(3))], images(family)[:1])


def images(family, batch=4):
    size = FAMILIES[family][0].image_size
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, 3)), jnp.float32)


@functools.cache
def shapes(family):
    """The shapes of a family's variables."""
    return jax.eval_shape(FAMILIES[family][0].init, jax.random.key(0), images(family))


def draw(family):
    """Variables in which every tensor is off its initial value."""
    target = shapes(family)
    rng = np.random.default_rng(1)

    def leaf(path, like):
        if path[-1].key in ("scale", "var", "gamma"):
            return jnp.asarray(rng.uniform(0.5, 1.5, like.shape), like.dtype)
        return jnp.asarray(rng.normal(size=like.shape) / np.sqrt(max(np.prod(like.shape[:-1]), 4)), like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, target)


def split(variables):
    return variables["params"], {name: tree for name, tree in variables.items() if name != "params"}


def loss(model, params, others, x, train=True):
    logits, updated = model.apply(
        {"params": params, **others}, x, train=train, rngs={"dropout": jax.random.key(0)}, mutable=list(others)
    )
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 1]), (logits, updated)


def gradient(model, params, others, x):
    return jax.grad(lambda params: loss(model, params, others, x)[0])(params)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def plain(family):
    """Variables, and what the model gives and its gradient is where JAX keeps what it likes."""
    params, others = split(draw(family))
    step = jax.jit(jax.value_and_grad(lambda p: loss(model(family, "plain", False), p, others, images(family)), has_aux=True))
    return params, others, step(params)


@pytest.mark.parametrize("residuals", ["exact", *TURNED])
def test_gradients(family, plain, residuals):
    params, others, ((_, wanted), exact) = plain
    own = model(family, residuals, frozen_batch_norm=False)
    step = jax.jit(jax.value_and_grad(lambda p: loss(own, p, others, images(family)), has_aux=True))
    (_, found), gradients = step(params)
    chex.assert_trees_all_close(found, wanted, atol=2e-5, rtol=2e-5)  # logits and running statistics: sums in another order
    gradients, exact = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in (gradients, exact))
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(exact))
    for (path, a), b in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(exact), strict=True):
        norms = np.linalg.norm(a), np.linalg.norm(b)
        if min(norms) < 1e-5 * largest:  # a bias before batch normalisation has no gradient but rounding
            continue
        cosine = np.vdot(a, b) / (norms[0] * norms[1])
        assert cosine > 1 - (TURNED[residuals][family] if residuals in TURNED else EXACT), jax.tree_util.keystr(path)
        if residuals == "exact":
            assert np.linalg.norm(a - b) <= 1e-5 * max(norms[1], 1e-2 * largest), jax.tree_util.keystr(path)


def test_gradients_of_a_trained_model():
    """Whole layers' gradients on digits: cosines with those of "plain"."""
    variables, _ = load_bundled()
    digits = open_dataset("digits").train
    x = jnp.asarray(np.stack([digits.images[i] for i in range(48)]), jnp.float32) / 127.5 - 1
    x, labels = jax.image.resize(x, (48, 28, 28, 1), "cubic"), jnp.asarray(digits.labels[:48])

    def gradients(residuals):
        own = create_model("vit_micro_patch4_28", num_classes=10, spec=lp_l1(4), residuals=residuals, scan_blocks=True)

        def smoothed(params):
            scores = jax.nn.log_softmax(own.apply({"params": params}, x, train=True))
            return -jnp.mean(0.9 * scores[jnp.arange(48), labels] + 0.1 * scores.mean(-1))

        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.jit(jax.grad(smoothed))(variables["params"]))

    exact = gradients("plain")
    for residuals, least in (("lean", 0.999), ("tiny", 0.98)):
        for (path, a), b in zip(jax.tree.leaves_with_path(gradients(residuals)), jax.tree.leaves(exact), strict=True):
            cosine = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
            assert cosine > least, (residuals, jax.tree_util.keystr(path), cosine)


@functools.cache
def kept(family, residuals):
    """The arrays that the backward pass keeps of a batch of 11: those whose first axis that divides."""
    own, (params, others) = model(family, residuals), split(shapes(family))
    x = jax.ShapeDtypeStruct((BATCH, *images(family).shape[1:]), jnp.float32)

    def forward(params, others, x):
        return jax.vjp(lambda p: loss(own, p, others, x)[0], params)[1]

    arrays = jax.tree.leaves(jax.eval_shape(forward, params, others, x))
    return [array for array in arrays if array.shape and array.shape[0] % BATCH == 0]


@pytest.mark.parametrize("residuals", ["lean", "tiny"])
def test_no_array_as_large_as_the_hidden_activations_is_kept(family, residuals):
    """None has more bytes than 0.26 of them in float32, and none with as many elements is floating point."""
    hidden = {"vit": 50 * 128, "swin_v2": 64 * 64, "efficientformer": 256 * 64, "efficientformer_v2": 256 * 128}[family]
    for array in kept(family, residuals):
        elements = array.size // BATCH
        if array.shape[-1] == 3 or array.shape[-1] == 1024:  # images; and values of EfficientFormerV2's attention, kept whole
            continue
        assert elements * array.dtype.itemsize <= 0.26 * 4 * hidden, array
        assert elements < hidden or not jnp.issubdtype(array.dtype, jnp.floating), array


def test_each_setting_keeps_less_than_the_one_before(family):
    sizes = [sum(array.size * array.dtype.itemsize for array in kept(family, residuals)) for residuals in RESIDUALS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.5 * sizes[0]


@pytest.mark.heavy
def test_transformations():
    """Under vmap, remat, scan, pmap and shard_map the gradients of "lean" are those without."""
    family = "vit"
    params, others = split(draw(family))
    own, x = model(family, "lean"), images(family)
    expected = jax.jit(lambda p, x: gradient(own, p, others, x))(params, x)
    each = jax.vmap(lambda x: gradient(own, params, others, x[None]))(x)
    tolerance = {"atol": 1e-6, "rtol": 1e-4}  # sums over images in another order

    def mean(tree):
        return jax.tree.map(lambda leaf: leaf.mean(0), tree)

    chex.assert_trees_all_close(mean(each), expected, **tolerance)
    looped = jax.lax.scan(lambda _, x: (None, gradient(own, params, others, x[None])), None, x)[1]
    chex.assert_trees_all_close(mean(looped), expected, **tolerance)
    mapped = jax.pmap(lambda x: gradient(own, params, others, x))(x.reshape(4, 1, *x.shape[1:]))
    chex.assert_trees_all_close(mean(mapped), expected, **tolerance)
    checkpointed = jax.jit(jax.grad(jax.checkpoint(lambda p: loss(own, p, others, x)[0])))(params)
    chex.assert_trees_all_close(checkpointed, expected, **tolerance)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(params, x):
        shared = jax.lax.pcast(params, "batch", to="varying")
        return jax.lax.pmean(gradient(own, shared, others, x), "batch")

    sharded = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P()))
    chex.assert_trees_all_close(sharded(params, x), expected, **tolerance)


def test_attention_may_keep_its_scores():
    module = FAMILIES["vit"][0]
    settings = dataclasses.replace(RESIDUALS["lean"], attention_bits=None, recompute_scores=False)
    own, (params, others) = module.clone(settings=Settings(residuals=settings)), split(shapes("vit"))
    pull = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(own, p, others, images("vit"))[0], p)[1], params)
    assert [array for array in jax.tree.leaves(pull) if array.shape[-2:] == (50, 50)]
    assert not [array for array in kept("vit", "lean") if array.shape[-2:] == (50, 50)]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            "lena",
            ValueError,
            "vit_micro_patch4_28: residuals must be one of plain, exact, lean, tiny or a Residuals, got 'lena'",
        ),
        (8, TypeError, "residuals must be a name or a Residuals, got int"),
    ],
)
def test_unknown_settings(value, error, message):
    with pytest.raises(error, match=message):
        create_model("vit_micro_patch4_28", residuals=value)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"slope_bits": 5}, ValueError, "slope_bits must be one of 2, 3, 4, 8 or None, got 5"),
        ({"norm_bits": True}, ValueError, "norm_bits must be one of 4, 8 or None, got True"),
        ({"attention_bits": 2}, ValueError, "attention_bits must be one of 4, 8 or None, got 2"),
        ({"attention_bits": 8, "recompute_scores": False}, ValueError, "attention_bits=8 needs recompute_scores=True"),
        ({"recompute_scores": 1}, TypeError, "recompute_scores must be True or False, got 1"),
    ],
)
def test_bits_that_there_are_not(fields, error, message):
    with pytest.raises(error, match=message):
        Residuals(**fields)
