"""DINOv3's vision transformers of reduced size; the comparison with timm is in parity/."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
from closeness import assert_close

from lbpwht_jax import LowRank, adapt, lp_l1
from lbpwht_jax.adaptation import with_loops
from lbpwht_jax.models import list_models, model_info
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.dinov3 import DinoV3, rotate, rotations
from lbpwht_jax.ops.residuals import RESIDUALS

tiny = functools.partial(DinoV3, num_classes=5, image_size=96, dim=16, depth=2, heads=2, biased=True)
IMAGES = np.random.default_rng(0).standard_normal((2, 96, 96, 3), np.float32)
LABELS = np.array([1, 3])
LAYERS = model_info("vit_small_patch16_dinov3").layers.low_rank


@functools.cache
def variables():
    """Every parameter away from its initial value."""
    shapes = jax.eval_shape(tiny().init, jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
        return np.float32(centre + 0.3 * rng.standard_normal(leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def logits_and_gradients(module):
    def loss(params):
        logits = module.apply({"params": params}, IMAGES, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables()["params"])
    return logits, gradients


def test_full_rank_gives_the_exact_gradients():
    """Of a plain model unrolled and of a looped one that keeps each array once; float32 rounding apart."""
    logits, exact = logits_and_gradients(tiny())
    module = tiny(settings=Settings(residuals=RESIDUALS["exact"]))
    adapted = adapt(module, [LowRank(LAYERS, lp_l1(15))], IMAGES)
    assert {(how.layer.prefix_tokens, how.grid) for how in adapted.resolution.adaptations} == {(5, (6, 6))}
    assert len(adapted.resolution.adaptations) == 8
    looped = with_loops(adapted, IMAGES)
    assert looped.module.settings.loops == ((("blocks_0",), ("blocks_1",)),)
    again, full = logits_and_gradients(looped)
    chex.assert_trees_all_close(again, logits, rtol=1e-5, atol=1e-5)
    assert_close(full, exact, 1e-4)


def test_rotations_tell_offsets_apart_and_nothing_else():
    """Products of rotated queries and keys are those of tokens as far from each other; lengths stay as they are."""
    grid = (5, 7)
    query, key = np.random.default_rng(2).standard_normal((2, 1, 1, 1, 16), np.float32)
    tokens = (1, 5 + 35, 1, 16)
    queries, keys = (np.asarray(rotate(np.broadcast_to(x, tokens), grid))[0, 5:, 0].reshape(5, 7, 16) for x in (query, key))
    near = [float(queries[i, j] @ keys[i + 1, j + 2]) for i, j in ((0, 0), (3, 4), (2, 1))]
    np.testing.assert_allclose(near, near[0], rtol=1e-5)
    assert abs(queries[0, 0] @ keys[1, 1] - near[0]) > 1e-3
    np.testing.assert_allclose((queries**2).sum(-1), (query**2).sum(), rtol=1e-5)


def test_tokens_in_front_are_not_rotated():
    sines, cosines = rotations((2, 3), 16)
    assert sines.shape == cosines.shape == (5 + 6, 16)
    assert not sines[:5].any()
    assert (cosines[:5] == 1).all()
    assert np.abs(sines[5:]).max(axis=1).min() > 0.01  # every patch is, if little


def test_names():
    assert list_models("*dinov3*") == [
        f"vit_{size}_patch16_dinov3{suffix}" for size in ("base", "large", "small") for suffix in ("", "_qkvb")
    ]
    with pytest.raises(ValueError, match="image_size must be a multiple of 16, got 100"):
        tiny(image_size=100).init(jax.random.key(0), np.zeros((1, 100, 100, 3), np.float32))
