"""Vision transformers of reduced size; the comparison with timm is in parity/."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbpwht_jax import lp_l1
from lbpwht_jax.models import create_model, list_models, model_info
from lbpwht_jax.models.blocks import Plan
from lbpwht_jax.models.vit import VisionTransformer, resample_positions

tiny = functools.partial(VisionTransformer, num_classes=5, image_size=24, patch_size=4, dim=16, depth=3, heads=2)
IMAGES = np.random.default_rng(0).standard_normal((2, 24, 24, 3), np.float32)
LABELS = np.array([1, 3])


@functools.cache
def variables(distilled=False):
    """Every parameter away from its initial value."""
    shapes = jax.eval_shape(tiny(distilled=distilled).init, jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return np.float32(centre + 0.3 * rng.standard_normal(leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def logits_and_gradients(module, values, **options):
    def loss(params):
        logits = module.apply({"params": params}, IMAGES, train=True, **options)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(values["params"])
    return logits, gradients


def largest_difference(a, b):
    """Over all tensors, of the largest difference to the largest value of the tensor."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))), a, b)))


@pytest.mark.parametrize("distilled", [False, True])
def test_full_rank_gives_the_exact_gradients_and_low_rank_others(distilled):
    """Float32 rounding apart; a 6x6 grid is no whole block of 8. (The last block's gradients are those of its class token.)"""
    logits, exact = logits_and_gradients(tiny(distilled=distilled), variables(distilled))
    full_logits, full = logits_and_gradients(tiny(distilled=distilled, plan=Plan(lp_l1(15), "")), variables(distilled))
    low_logits, low = logits_and_gradients(tiny(distilled=distilled, plan=Plan(lp_l1(3), "")), variables(distilled))
    np.testing.assert_array_equal(full_logits, logits)
    np.testing.assert_array_equal(low_logits, logits)
    assert largest_difference(full, exact) < 1e-4
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(low))
    for block in ("blocks_0", "blocks_1"):
        for layer in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")):
            a, b = (tree[block][layer[0]][layer[1]]["kernel"] for tree in (low, exact))
            assert largest_difference(a, b) > 1e-2


def test_the_plan_reaches_the_layers_it_names_alone():
    """Below a low-rank layer gradients differ too, above it they are the same."""
    _, exact = logits_and_gradients(tiny(), variables())
    _, low = logits_and_gradients(tiny(plan=Plan(lp_l1(2), "blocks_1/mlp/fc1$")), variables())
    block = {k: largest_difference(low["blocks_1"]["mlp"][k], exact["blocks_1"]["mlp"][k]) for k in ("fc1", "fc2")}
    assert block["fc1"] > 1e-2
    assert block["fc2"] < 1e-4


def test_default_layers_are_all_the_blocks_dense_layers():
    info = model_info("vit_tiny_patch16_224")
    model = create_model("vit_tiny_patch16_224", spec=lp_l1(4))
    paths = [f"blocks_{i}/{layer}" for i in (0, 11) for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")]
    assert all(model.plan(path) == lp_l1(4) for path in paths)
    assert model.plan("head") is None
    assert model.plan("patch_embed/proj") is None
    assert info.resample is resample_positions


def test_distilled_models_average_their_heads():
    values = variables(distilled=True)
    both = tiny(distilled=True).apply(values, IMAGES)
    zero = jax.tree.map(np.zeros_like, values["params"]["head"])
    first = tiny(distilled=True).apply({"params": {**values["params"], "head_dist": zero}}, IMAGES)
    second = tiny(distilled=True).apply({"params": {**values["params"], "head": zero}}, IMAGES)
    np.testing.assert_allclose(both, first + second, rtol=1e-5, atol=1e-6)


def test_remat_changes_nothing():
    logits, gradients = logits_and_gradients(tiny(), variables())
    again, recomputed = logits_and_gradients(tiny(remat=True), variables())
    np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-6)
    assert largest_difference(recomputed, gradients) < 1e-4


def test_bfloat16_keeps_float32_parameters():
    module = tiny(dtype=jnp.bfloat16)
    logits, gradients = logits_and_gradients(module, variables())
    assert logits.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(logits.astype(jnp.float32), tiny().apply(variables(), IMAGES), atol=0.2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(module.init(jax.random.key(0), IMAGES)))


def test_drop_path_draws_while_training_alone():
    module = tiny(drop_path=0.9)
    quiet = module.apply(variables(), IMAGES)
    np.testing.assert_array_equal(quiet, tiny().apply(variables(), IMAGES))
    draw = functools.partial(module.apply, variables(), IMAGES, train=True)
    one, two = (draw(rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
    assert not np.allclose(one, two)


def test_image_size_errors():
    with pytest.raises(ValueError, match="image_size must be a multiple of 4, got 26"):
        tiny(image_size=26).init(jax.random.key(0), np.zeros((1, 26, 26, 3), np.float32))
    with pytest.raises(ValueError, match=r"images must be \[batch, 24, 24, channels\], got \[1, 28, 28, 3\]"):
        tiny().init(jax.random.key(0), np.zeros((1, 28, 28, 3), np.float32))


def test_resampled_positions():
    """A constant stays what it is; the prefix and an equal grid are untouched; a linear ramp stays linear inside."""
    module = tiny(distilled=True)
    edge = np.arange(12, dtype=np.float32)
    ramp = np.broadcast_to(edge.reshape(12, 1, 1), (12, 12, 1)).reshape(1, 144, 1)
    prefix = np.array([7.0, 9.0], np.float32).reshape(1, 2, 1)
    state = {"pos_embed": np.concatenate([prefix, ramp], axis=1), "norm.bias": np.ones(1)}
    result = resample_positions(state, module)
    assert result["norm.bias"] is state["norm.bias"]
    np.testing.assert_array_equal(result["pos_embed"][:, :2], prefix)
    grid = result["pos_embed"][0, 2:, 0].reshape(6, 6)
    np.testing.assert_allclose(grid[2:4], np.broadcast_to([[4.5], [6.5]], (2, 6)), atol=1e-5)
    same = {"pos_embed": result["pos_embed"]}
    assert resample_positions(same, module)["pos_embed"] is same["pos_embed"]


def test_preprocessing():
    """timm's: ViT's checkpoints were trained on inputs in [-1, 1], DeiT's on ImageNet's statistics."""
    for name in [*list_models("vit_*_224"), *list_models("deit_*")]:
        info = model_info(name)
        half = name.startswith("vit")
        assert info.mean == ((0.5, 0.5, 0.5) if half else (0.485, 0.456, 0.406))
        assert info.std == ((0.5, 0.5, 0.5) if half else (0.229, 0.224, 0.225))
        assert (info.crop, info.interpolation, info.image_size, info.channels) == (0.9, "bicubic", 224, 3)
