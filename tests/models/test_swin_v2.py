"""Swin Transformer V2 in a tiny configuration."""

import functools
import itertools

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from closeness import assert_close, difference

from lbpwht_jax import LowRank, LowRankDense, adapt, create_model, lp_l1
from lbpwht_jax.models import list_models, model_info
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.swin_v2 import Block, PatchMerging, SwinTransformerV2
from lbpwht_jax.models.windows import relative_coordinates

# Maps of 5x5 and 3x3 tokens: padded windows with and without a shift, an odd map to merge, one smaller than a window.
SIZE = 20
DEPTHS = (2, 1)
LAYERS = model_info("swinv2_tiny_window8_256").layers.low_rank


def tiny(image_size=SIZE, **fields):
    return SwinTransformerV2(5, image_size, window=4, dim=8, depths=DEPTHS, heads=(1, 2), **fields)


def images(size=SIZE, batch=2):
    return jnp.asarray(np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32))


def random_variables(module, x, **arguments):
    """Variables of a module for a call, every tensor drawn at random such that activations stay of order one."""
    generator = np.random.default_rng(0)

    def draw(path, shape):
        normal = generator.standard_normal(shape.shape, np.float32)
        if len(shape.shape) > 1:
            normal /= 0.3 * np.prod(shape.shape[:-1]) ** 0.5
        return jnp.asarray(0.3 * normal + (1 if path[-1].key == "scale" else 0))

    init = functools.partial(module.init, jax.random.key(0), **arguments)
    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, x))


@pytest.fixture(scope="module")
def variables():
    return random_variables(tiny(), images())


@pytest.fixture(scope="module")
def wanted(variables):
    """The logits in float32."""
    return jax.jit(tiny().apply)(variables, images())


def gradients(module, variables, **arguments):
    """Gradients of a fixed function of the logits, by parameter path."""
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5), np.float32))
    gradient = jax.jit(jax.grad(lambda v: (module.apply(v, images(), train=True, **arguments) * weights).sum()))
    return flax.traverse_util.flatten_dict(gradient(variables)["params"], sep="/")


def slow_attention(params, x, window, shift, heads):
    """Shifted-window attention of one map ``[height, width, channels]``, a pair of tokens at a time, in float64."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    height, width, channels = x.shape
    padding = [-n % w for n, w in zip((height, width), window, strict=True)]
    x = np.pad(np.roll(x, [-s for s in shift], (0, 1)), [(0, padding[0]), (0, padding[1]), (0, 0)])
    size = x.shape[:2]
    query, key, value = np.split(x @ params["qkv"]["kernel"], 3, axis=-1)
    query, value = query + params["q_bias"], value + params["v_bias"]
    table = (
        np.maximum(relative_coordinates(window) @ params["cpb_mlp_0"]["kernel"] + params["cpb_mlp_0"]["bias"], 0)
        @ params["cpb_mlp_2"]["kernel"]
    )
    table = (16 / (1 + np.exp(-table))).reshape(2 * window[0] - 1, 2 * window[1] - 1, heads)
    scale = np.minimum(np.exp(params["logit_scale"]), 100)[:, 0, 0]

    tokens = list(itertools.product(range(size[0]), range(size[1])))
    result = np.zeros_like(x)
    for head in range(heads):
        channel = slice(head * channels // heads, (head + 1) * channels // heads)
        for a in tokens:
            near = [b for b in tokens if all(i // w == j // w for i, j, w in zip(a, b, window, strict=True))]
            logits = []
            for b in near:
                q, k = query[a][channel], key[b][channel]
                cosine = q @ k / max(np.linalg.norm(q) * np.linalg.norm(k), 1e-12)
                offset = tuple(i - j + w - 1 for i, j, w in zip(a, b, window, strict=True))
                parted = any((i >= n - s) != (j >= n - s) for i, j, n, s in zip(a, b, size, shift, strict=True))
                logits.append(scale[head] * cosine + table[offset][head] - 100 * parted)
            weights = np.exp(np.array(logits) - max(logits))
            result[a][channel] = weights @ np.array([value[b][channel] for b in near]) / weights.sum()
    result = result @ params["proj"]["kernel"] + params["proj"]["bias"]
    return np.roll(result[:height, :width], shift, (0, 1))


def slow_norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


def slow_block(params, x, window, shift, heads):
    """A whole block on one map, in float64."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = x + slow_norm(params["norm1"], slow_attention(params["attn"], x, window, shift, heads))
    y = x @ params["mlp"]["fc1"]["kernel"] + params["mlp"]["fc1"]["bias"]
    y = y * (1 + scipy.special.erf(y / np.sqrt(2))) / 2
    return x + slow_norm(params["norm2"], y @ params["mlp"]["fc2"]["kernel"] + params["mlp"]["fc2"]["bias"])


@pytest.mark.parametrize(
    ("size", "shifted", "window", "shift"),
    [
        ((8, 8), True, (4, 4), (2, 2)),
        ((8, 8), False, (4, 4), (0, 0)),
        ((6, 9), True, (4, 4), (2, 2)),
        ((3, 7), True, (3, 4), (0, 2)),
    ],
)
def test_a_block_is_what_pairs_of_tokens_compute(size, shifted, window, shift):
    block = Block(heads=2, window=4, shifted=shifted)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, *size, 8), np.float32))
    variables = random_variables(block, x, train=False)
    # The second head's scale lies beyond the largest, log(100).
    variables["params"]["attn"]["logit_scale"] = jnp.asarray([1.0, 6.0]).reshape(2, 1, 1)
    wanted = slow_block(variables["params"], np.asarray(x[0], np.float64), window, shift, heads=2)
    # Cosines are rounded at 1e-7, times a scale of 100, before the softmax.
    assert difference(block.apply(variables, x, False)[0], jnp.asarray(wanted, jnp.float32)) < 1e-4


def test_a_block_begins_as_the_identity():
    block = Block(heads=2, window=4, shifted=True)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 6, 6, 8), np.float32))
    chex.assert_trees_all_equal(block.apply(block.init(jax.random.key(0), x, False), x, False), x)


def test_patch_merging_takes_neighbours_column_by_column():
    x = np.random.default_rng(3).standard_normal((2, 3, 4, 2), np.float32)
    variables = random_variables(PatchMerging(), jnp.asarray(x))
    params = jax.tree.map(np.asarray, variables["params"])
    padded = np.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)])
    merged = np.concatenate([padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
    wanted = slow_norm(params["norm"], merged @ params["reduction"]["kernel"])
    # Two sums of eight products, in float32.
    np.testing.assert_allclose(PatchMerging().apply(variables, jnp.asarray(x)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [SIZE, 32])
def test_the_same_variables_serve_every_image_size(variables, size):
    module = tiny(size)
    own = jax.eval_shape(module.init, jax.random.key(0), images(size))
    chex.assert_trees_all_equal_shapes_and_dtypes(own, variables)
    assert set(own) == {"params"}
    logits = jax.jit(module.apply)(variables, images(size))
    chex.assert_shape(logits, (2, 5))
    chex.assert_type(logits, jnp.float32)
    chex.assert_tree_all_finite(logits)


def low_rank(r):
    return adapt(tiny(), [LowRank(LAYERS, lp_l1(r))], images())


def dense_layers(module):
    """``{path: (grid, input's shape)}`` of the layers on token grids that one call reaches."""
    reached = {}

    def record(call, arguments, keywords, context):
        layer = context.module
        if isinstance(layer, LowRankDense):
            reached["/".join(layer.path)] = layer.grid, arguments[0].shape
        return call(*arguments, **keywords)

    with nn.intercept_methods(record):
        jax.eval_shape(module.init, jax.random.key(0), images())
    return reached


def test_the_default_choice_is_every_dense_layer():
    blocks = [f"layers_{stage}/blocks_{i}" for stage, depth in enumerate(DEPTHS) for i in range(depth)]
    wanted = {f"{block}/{layer}" for block in blocks for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")}
    wanted |= {"layers_1/downsample/reduction"}
    assert {adaptation.layer.path for adaptation in low_rank(2).resolution.adaptations} == wanted
    assert set(dense_layers(tiny())) == wanted


def test_layers_see_windows_and_maps():
    reached = dense_layers(tiny())
    assert reached["layers_0/blocks_1/attn/qkv"] == ((4, 4), (2, 4, 16, 8))
    assert reached["layers_0/blocks_1/attn/proj"] == ((4, 4), (2, 4, 16, 8))
    assert reached["layers_0/blocks_1/mlp/fc1"] == (None, (2, 5, 5, 8))
    assert reached["layers_1/downsample/reduction"] == (None, (2, 3, 3, 32))
    assert reached["layers_1/blocks_0/attn/proj"] == ((3, 3), (2, 1, 9, 16))
    assert reached["layers_1/blocks_0/mlp/fc2"] == (None, (2, 3, 3, 64))


def test_a_spec_for_another_number_of_axes_is_refused():
    with pytest.raises(ValueError, match=r"adapt: layers_0/blocks_0/attn/proj: the spec.s functions have 1 axes"):
        adapt(tiny(), [LowRank(LAYERS, lp_l1(2, ndim=1))], images())


def test_every_function_kept_gives_the_exact_gradients(variables):
    exact = gradients(tiny(), variables)
    full = gradients(low_rank(15), variables)
    low = gradients(low_rank(4), variables)
    # Only rounding differs. Padded windows are among them, whose keys must not be divided by a small length.
    assert_close(full, exact, 1e-3)
    # A projection does not blow up what it approximates.
    assert_close(low, exact, 10)
    assert difference(low["layers_0/blocks_0/mlp/fc1/kernel"], exact["layers_0/blocks_0/mlp/fc1/kernel"]) > 1e-2


def test_low_rank_layers_do_not_change_the_logits(variables, wanted):
    logits = jax.jit(low_rank(4).apply)(variables, images())
    assert_close(logits, wanted, 1e-6)


def test_remat_changes_no_gradient(variables):
    rngs = {"dropout": jax.random.key(3)}
    wanted = gradients(tiny(drop_path=0.5), variables, rngs=rngs)
    again = gradients(tiny(drop_path=0.5, settings=Settings(remat=True)), variables, rngs=rngs)
    # What drop path cut off is exactly zero in both.
    cut = {path for path, value in wanted.items() if not value.any()}
    chex.assert_trees_all_equal(*({path: tree[path] for path in cut} for tree in (again, wanted)))
    # Two compilations of the same sums.
    assert_close(*({path: tree[path] for path in tree if path not in cut} for tree in (again, wanted)), 1e-4)


def test_drop_path_is_for_training(variables, wanted):
    module = tiny(drop_path=0.9)
    chex.assert_trees_all_equal(jax.jit(module.apply)(variables, images()), wanted)
    train = jax.jit(lambda key: module.apply(variables, images(), train=True, rngs={"dropout": key}))
    one, other = train(jax.random.key(0)), train(jax.random.key(1))
    assert difference(one, wanted) > 1e-2
    assert difference(one, other) > 1e-2


def test_bfloat16_is_close_to_float32(variables, wanted):
    module = tiny(settings=Settings(jnp.bfloat16))
    # Flax's own norms and attention promote half precision to float32 implicitly.
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(module.init, jax.random.key(0), images())
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, variables)

        def loss(variables):
            logits = module.apply(variables, images(), train=True)
            return (logits * jnp.ones((2, 5), jnp.bfloat16)).sum(), logits

        gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(variables)
        assert logits.dtype == jnp.bfloat16
        # Eight bits of mantissa, through three blocks.
        assert difference(logits.astype(jnp.float32), wanted) < 0.05
    chex.assert_tree_all_finite(gradient)


def test_other_images_are_refused(variables):
    with pytest.raises(ValueError, match=r"images must be \[batch, 20, 20, channels\]"):
        tiny().apply(variables, images(40))
    with pytest.raises(ValueError, match="multiple of 4, got 38"):
        tiny(38).apply(variables, images(38))


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 28_347_154), ("small", 49_728_418), ("base", 87_918_816)])
def test_named_models_have_timms_parameter_count(size, parameters):
    names = list_models(f"swinv2_{size}_*")
    assert names == [f"swinv2_{size}_window16_256", f"swinv2_{size}_window8_256"]
    shape = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    for name in names:
        shapes = jax.eval_shape(create_model(name).init, jax.random.key(0), shape)
        assert sum(v.size for v in jax.tree.leaves(shapes)) == parameters
