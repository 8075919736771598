"""Vision transformers of reduced size; the comparison with timm is in parity/."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_close, difference

from lbpwht_jax import LowRank, adapt, lp_l1
from lbpwht_jax.models import list_models, model_info
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.vit import VisionTransformer, resample_positions

tiny = functools.partial(VisionTransformer, num_classes=5, image_size=24, patch_size=4, dim=16, depth=3, heads=2)
IMAGES = np.random.default_rng(0).standard_normal((2, 24, 24, 3), np.float32)
LABELS = np.array([1, 3])
LAYERS = model_info("vit_tiny_patch16_224").layers.low_rank


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


@functools.cache
def exact_logits_and_gradients(distilled=False):
    return logits_and_gradients(tiny(distilled=distilled), variables(distilled))


@pytest.mark.parametrize("distilled", [False, True])
def test_full_rank_gives_the_exact_gradients_and_low_rank_others(distilled):
    """Float32 rounding apart; a 6x6 grid is no whole block of 8. (The last block's gradients are those of its class token.)"""
    logits, exact = exact_logits_and_gradients(distilled)
    (full_logits, full), (low_logits, low) = (
        logits_and_gradients(adapt(tiny(distilled=distilled), [LowRank(LAYERS, lp_l1(r))], IMAGES), variables(distilled))
        for r in (15, 3)
    )
    chex.assert_trees_all_equal(full_logits, low_logits, logits)
    assert_close(full, exact, 1e-4)
    chex.assert_tree_all_finite(low)
    for block in ("blocks_0", "blocks_1"):
        for layer in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")):
            a, b = (tree[block][layer[0]][layer[1]]["kernel"] for tree in (low, exact))
            assert difference(a, b) > 1e-2


def test_a_rule_reaches_the_layers_it_names_alone():
    """Below a low-rank layer gradients differ too, above it they are the same."""
    _, exact = exact_logits_and_gradients()
    _, low = logits_and_gradients(adapt(tiny(), [LowRank("blocks_1/mlp/fc1$", lp_l1(2))], IMAGES), variables())
    block = {k: (low["blocks_1"]["mlp"][k], exact["blocks_1"]["mlp"][k]) for k in ("fc1", "fc2")}
    assert difference(*(kernels["kernel"] for kernels in block["fc1"])) > 1e-2
    assert_close(*block["fc2"], 1e-4)


def test_default_layers_are_all_the_blocks_dense_layers():
    adapted = adapt(tiny(), [LowRank(LAYERS, lp_l1(4))], IMAGES)
    layers = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    assert {a.layer.path for a in adapted.resolution.adaptations} == {
        f"blocks_{i}/{layer}" for i in range(3) for layer in layers
    }


def test_distilled_models_average_their_heads():
    values = variables(distilled=True)
    apply = jax.jit(tiny(distilled=True).apply)
    both = apply(values, IMAGES)
    zero = jax.tree.map(np.zeros_like, values["params"]["head"])
    first, second = (apply({"params": {**values["params"], head: zero}}, IMAGES) for head in ("head_dist", "head"))
    chex.assert_trees_all_close(both, first + second, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_remat_changes_nothing():
    logits, gradients = exact_logits_and_gradients()
    again, recomputed = logits_and_gradients(tiny(settings=Settings(remat=True)), variables())
    chex.assert_trees_all_close(again, logits, rtol=1e-5, atol=1e-6)
    assert_close(recomputed, gradients, 1e-4)  # float32 rounding, differently fused


def test_bfloat16_keeps_float32_parameters():
    module = tiny(settings=Settings(jnp.bfloat16))
    logits, gradients = logits_and_gradients(module, variables())
    assert logits.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_dtypes(gradients, variables()["params"])
    chex.assert_tree_all_finite(gradients)
    # 8 bits of mantissa through three blocks, on logits of order one
    chex.assert_trees_all_close(logits.astype(jnp.float32), tiny().apply(variables(), IMAGES), atol=0.2)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(module.init, jax.random.key(0), IMAGES), variables())


def test_drop_path_draws_while_training_alone():
    module = tiny(drop_path=0.9)
    quiet = module.apply(variables(), IMAGES)
    chex.assert_trees_all_equal(quiet, tiny().apply(variables(), IMAGES))
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
    assert model_info("vit_tiny_patch16_224").files.resample is resample_positions
    assert result["norm.bias"] is state["norm.bias"]
    np.testing.assert_array_equal(result["pos_embed"][:, :2], prefix)
    grid = result["pos_embed"][0, 2:, 0].reshape(6, 6)
    np.testing.assert_allclose(grid[2:4], np.broadcast_to([[4.5], [6.5]], (2, 6)), atol=1e-5)
    same = {"pos_embed": result["pos_embed"]}
    assert resample_positions(same, module)["pos_embed"] is same["pos_embed"]


def test_preprocessing():
    """timm's: ViT's checkpoints were trained on inputs in [-1, 1], DeiT's and DINO's on ImageNet's statistics."""
    plain = {name for size in (224, 384) for name in list_models(f"vit_*_patch*_{size}") if name.count("_") == 3}
    assert len(plain) == 17
    for name in [*plain, *list_models("deit*_224"), *list_models("deit*_384")]:
        images, size = model_info(name).images, int(name[-3:])
        half = name.startswith("vit") and name != "vit_small_patch8_224"
        assert images.mean == ((0.5, 0.5, 0.5) if half else (0.485, 0.456, 0.406))
        assert images.std == ((0.5, 0.5, 0.5) if half else (0.229, 0.224, 0.225))
        assert (images.crop, images.interpolation) == (0.9 if size == 224 else 1.0, "bicubic")
        assert (images.size, images.channels) == (size, 3)
