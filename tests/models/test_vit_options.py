"""What some vision transformers have and the plain one has not, in models of reduced size; timm's numbers are in parity/."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_close, difference

from lbpwht_jax import LowRank, adapt, lp_l1
from lbpwht_jax.adaptation import with_loops
from lbpwht_jax.models import model_info
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.quick_gelu import quick_gelu
from lbpwht_jax.models.vit import VisionTransformer, resample_positions
from lbpwht_jax.models.vit_options import AttentionPool, Options
from lbpwht_jax.ops.residuals import RESIDUALS

tiny = functools.partial(VisionTransformer, num_classes=5, image_size=24, patch_size=4, dim=16, depth=2, heads=2)
KINDS = {
    "dinov2": ("vit_small_patch14_dinov2", 1),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", 1 + 4),
    "clip": ("vit_base_patch32_clip_quickgelu_224", 1),
    "siglip": ("vit_base_patch16_siglip_224", 0),
    "siglip, averaged": ("vit_base_patch16_siglip_gap_224", 0),
}
IMAGES = np.random.default_rng(0).standard_normal((2, 24, 24, 3), np.float32)
LABELS = np.array([1, 3])


def small(kind, **fields):
    return tiny(options=model_info(KINDS[kind][0]).arguments["options"], **fields)


@functools.cache
def variables(kind):
    """Every parameter away from its initial value."""
    shapes = jax.eval_shape(small(kind).init, jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
        return np.float32(centre + 0.3 * rng.standard_normal(leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def logits_and_gradients(module, values, images=IMAGES):
    def loss(params):
        logits = module.apply({"params": params}, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(values["params"])
    return logits, gradients


def low_rank(kind, rank, **settings):
    layers = model_info(KINDS[kind][0]).layers.low_rank
    return adapt(small(kind, settings=Settings(**settings)), [LowRank(layers, lp_l1(rank))], IMAGES)


@pytest.mark.parametrize("kind", ["dinov2 with registers", pytest.param("clip", marks=pytest.mark.heavy), "siglip"])
def test_full_rank_gives_the_exact_gradients(kind):
    """Of a plain model unrolled and of a looped one that keeps each array once; float32 rounding apart."""
    logits, exact = logits_and_gradients(small(kind), variables(kind))
    looped = with_loops(low_rank(kind, 15, residuals=RESIDUALS["exact"]), IMAGES)
    assert looped.module.settings.loops == ((("blocks_0",), ("blocks_1",)),)
    again, full = logits_and_gradients(looped, variables(kind))
    chex.assert_trees_all_close(again, logits, rtol=1e-5, atol=1e-5)
    assert_close(full, exact, 1e-4)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 with registers", "siglip, averaged"])
def test_one_function_is_exact_where_patches_are_alike(kind):
    """Patches that are all alike in every layer lie in the span of the constant function; the tokens in front, which differ
    from them, are not projected. Counting one of them among the patches, or a patch among them, breaks this."""
    values = jax.tree.map(np.copy, variables(kind))
    positions, images = values["params"]["pos_embed"], np.broadcast_to(IMAGES[:, :1, :1], IMAGES.shape)
    positions[:, positions.shape[1] - 36 :] = positions[:, -1:]
    adapted = low_rank(kind, 1)
    assert {how.layer.prefix_tokens for how in adapted.resolution.adaptations} == {KINDS[kind][1]}
    _, exact = logits_and_gradients(small(kind), values, images)
    _, low = logits_and_gradients(adapted, values, images)
    assert_close(low, exact, 1e-4)  # float32 rounding


@pytest.mark.heavy
def test_few_bits_turn_gradients_little():
    """What is kept of CLIP's activation is its slope in 8 bits."""
    _, exact = logits_and_gradients(low_rank("clip", 3), variables("clip"))
    _, lean = logits_and_gradients(low_rank("clip", 3, residuals=RESIDUALS["lean"]), variables("clip"))
    pairs = zip(jax.tree.leaves(lean), jax.tree.leaves(exact), strict=True)
    assert 0 < max(difference(a, b) for a, b in pairs) < 0.05  # 8 bits in every array of two blocks


def test_the_tokens_in_front():
    assert small("dinov2 with registers").prefix == {"cls_token": 1, "reg_token": 4}
    assert small("siglip").prefix == {}
    shapes = jax.eval_shape(small("dinov2 with registers").init, jax.random.key(0), IMAGES)["params"]
    assert shapes["reg_token"].shape == (1, 4, 16)
    assert shapes["pos_embed"].shape == (1, 36, 16)  # of the patches alone
    assert "bias" not in variables("clip")["params"]["patch_embed"]["proj"]


def test_positions_without_those_of_a_prefix_are_resampled():
    state = {"pos_embed": np.arange(144, dtype=np.float32).reshape(1, 144, 1)}
    assert resample_positions(state, small("dinov2 with registers"))["pos_embed"].shape == (1, 36, 1)
    with pytest.raises(ValueError, match="143 positions after 1 prefix tokens"):
        resample_positions(state, small("dinov2"))


def test_attention_pooling_without_a_query_averages():
    """All scores are equal then: what comes out is made from the mean of the values."""
    pool = AttentionPool(2, 32, Options(pooling="attention"), grid=(3, 4), prefix_tokens=0)
    x = np.random.default_rng(2).standard_normal((2, 12, 8), np.float32)
    params = pool.init(jax.random.key(0), x)["params"]
    params["latent"] = jnp.zeros_like(params["latent"])
    mean = np.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
    chex.assert_trees_all_close(pool.apply({"params": params}, x), pool.apply({"params": params}, mean), atol=1e-5)


def test_quick_gelu():
    x = np.linspace(-6, 6, 48, dtype=np.float32)
    wide = x.astype(np.float64)
    value, slope = jax.value_and_grad(lambda x: quick_gelu(x).sum())(x)
    expected = wide / (1 + np.exp(-1.702 * wide))
    assert float(value) == pytest.approx(expected.sum(), rel=1e-5)
    step = 1e-5
    central = [(wide + h) / (1 + np.exp(-1.702 * (wide + h))) for h in (step, -step)]
    wanted = (central[0] - central[1]) / (2 * step)
    np.testing.assert_allclose(slope, wanted, atol=1e-6)  # float32 rounding
    for bits, error in ((8, 0.003), (4, 0.06)):  # half a step, or half the widest distance between levels
        coded = jax.grad(lambda x, bits=bits: quick_gelu(x, bits).sum())(x)
        assert 0 < np.abs(coded - wanted).max() < error
    assert quick_gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_image_settings():
    """Those of the weights that timm gives to a name by default."""
    assert model_info("vit_small_patch14_dinov2").images.size == 518
    assert dataclasses.astuple(model_info("deit3_base_patch16_384").images)[0] == 384
    clip, openai = (model_info(f"vit_large_patch14_clip_{form}224").images for form in ("", "quickgelu_"))
    assert clip.mean == (0.5, 0.5, 0.5)
    assert openai.mean == (0.48145466, 0.4578275, 0.40821073)
