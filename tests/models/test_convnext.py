"""ConvNeXt of reduced size; the comparison with timm is in parity/."""

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
from lbpwht_jax.models import list_models, model_info
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.convnext import ConvNeXt, response_norm
from lbpwht_jax.ops.residuals import RESIDUALS
from lbpwht_jax.weights import replace_head

tiny = functools.partial(ConvNeXt, num_classes=5, image_size=72, dims=(8, 8, 16, 16), depths=(1, 2, 1, 1))
IMAGES = np.random.default_rng(0).standard_normal((2, 72, 72, 3), np.float32)
LABELS = np.array([1, 3])
LAYERS = model_info("convnext_tiny").layers.low_rank


@functools.cache
def variables(second):
    """Every parameter away from its initial value."""
    shapes = jax.eval_shape(tiny(response_norm=second).init, jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
        return np.float32(centre + 0.3 * rng.standard_normal(leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def logits_and_gradients(module, values):
    def loss(params):
        logits = module.apply({"params": params}, IMAGES, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(values["params"])
    return logits, gradients


def low_rank(second, rank, residuals="plain"):
    module = tiny(response_norm=second, settings=Settings(residuals=RESIDUALS[residuals]))
    return adapt(module, [LowRank(LAYERS, lp_l1(rank))], IMAGES)


@pytest.mark.parametrize("second", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_full_rank_gives_the_exact_gradients(second):
    """Of a plain model unrolled and of a looped one that keeps each array once; float32 rounding apart. Maps of 18, 9, 4 and 2
    tokens along each axis fill no whole number of blocks."""
    logits, exact = logits_and_gradients(tiny(response_norm=second), variables(second))
    adapted = low_rank(second, 15, "exact")
    paths = {
        f"stages_{i}/blocks_{j}/mlp/{layer}" for i, n in enumerate((1, 2, 1, 1)) for j in range(n) for layer in ("fc1", "fc2")
    }
    assert {how.layer.path for how in adapted.resolution.adaptations} == paths
    looped = with_loops(adapted, IMAGES)
    assert looped.module.settings.loops == ((("stages_1/blocks_0",), ("stages_1/blocks_1",)),)
    again, full = logits_and_gradients(looped, variables(second))
    chex.assert_trees_all_close(again, logits, rtol=1e-4, atol=1e-4)
    assert_close(full, exact, 1e-4)


@pytest.mark.heavy
def test_few_functions_and_bits():
    """Low rank changes the dense layers' gradients, and few bits change all of them a little more."""
    _, exact = logits_and_gradients(tiny(response_norm=True), variables(True))
    _, low = logits_and_gradients(low_rank(True, 3), variables(True))
    _, lean = logits_and_gradients(low_rank(True, 3, "lean"), variables(True))
    kernels = [tree["stages_0"]["blocks_0"]["mlp"]["fc1"]["kernel"] for tree in (low, exact)]
    assert difference(*kernels) > 1e-2
    pairs = zip(jax.tree.leaves(lean), jax.tree.leaves(low), strict=True)
    assert max(difference(a, b) for a, b in pairs) < 0.1  # 8 bits in every array of five blocks


def test_response_norm_by_hand():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, 4, 5), np.float32)
    scale, bias = rng.standard_normal((2, 5), np.float32)
    norms = np.array([[sum(x[b, i, j, c] ** 2 for i in range(3) for j in range(4)) ** 0.5 for c in range(5)] for b in range(2)])
    wanted = np.empty_like(x)
    for b, i, j, c in np.ndindex(*x.shape):
        share = norms[b, c] / (norms[b].sum() / 5 + 1e-6)
        wanted[b, i, j, c] = x[b, i, j, c] + scale[c] * x[b, i, j, c] * share + bias[c]
    np.testing.assert_allclose(response_norm(x, scale, bias), wanted, rtol=1e-5, atol=1e-6)


def test_response_norm_of_a_channel_of_zeros():
    x = np.random.default_rng(3).standard_normal((1, 2, 2, 3), np.float32)
    x[..., 1] = 0
    gradients = jax.grad(lambda *args: response_norm(*args).sum(), argnums=(0, 1, 2))(x, np.ones(3), np.ones(3))
    chex.assert_tree_all_finite(gradients)


def test_a_new_head_keeps_the_norm_before_it():
    """timm has that norm within its head."""
    values = variables(False)
    fresh = jax.tree.map(jnp.zeros_like, values)
    params = replace_head(values, fresh)["params"]
    chex.assert_trees_all_equal(params["norm"], values["params"]["norm"])
    assert not params["head"]["kernel"].any()


def test_sizes():
    assert list_models("convnext*") == [
        *(f"convnext_{size}" for size in ("atto", "base", "small", "tiny")),
        "convnextv2_atto",
        "convnextv2_tiny",
    ]
    images = np.zeros((1, 24, 24, 3), np.float32)
    with pytest.raises(ValueError, match="image_size must be at least 32"):
        tiny(image_size=24).init(jax.random.key(0), images)
