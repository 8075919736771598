"""Both EfficientFormer families at a few channels: what low-rank backprop reaches, batch normalisation, sizes, weight files."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close, difference
from flax.traverse_util import flatten_dict

from lbpwht_jax import LowRank, LowRankSpec, adapt, create_model, lp_l1, lp_linf
from lbpwht_jax.models import model_info
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.conv_blocks import offset_index
from lbpwht_jax.models.efficientformer import EfficientFormer
from lbpwht_jax.models.efficientformer_v2 import EfficientFormerV2
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.ops.dtypes import accumulation_dtype

FIRST = EfficientFormer(num_classes=5, image_size=64, dims=(8, 8, 16, 16), depths=(1, 1, 1, 2), attention=1, mlp_ratio=2)
SECOND = EfficientFormerV2(num_classes=5, image_size=64, dims=(8, 8, 16, 16), mlp_ratios=((2,), (2,), (2,), (2,)), attention=1)
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)

CONVOLUTIONS = [f"stages_{stage}/blocks_0/mlp/fc{i}" for stage in range(4) for i in (1, 2)]
LOW_RANK = {
    "efficientformer_l1": {
        *CONVOLUTIONS,
        *(f"stages_3/blocks_2/{layer}" for layer in ("mlp/fc1", "mlp/fc2", "token_mixer/qkv", "token_mixer/proj")),
    },
    "efficientformerv2_s0": {
        *(f"{layer}/conv" for layer in CONVOLUTIONS),
        *(f"stages_{stage}/blocks_0/token_mixer/{layer}/conv" for stage in (2, 3) for layer in ("q", "k", "v", "proj")),
        *(f"stages_{stage}/blocks_0/token_mixer/talking_head{i}" for stage in (2, 3) for i in (1, 2)),
        *(f"stages_3/downsample/attn/{layer}/conv" for layer in ("q/proj", "k", "v", "proj")),
    },
}


def draw(module) -> dict:
    """Variables of a module, every tensor off its initial value."""
    target = jax.eval_shape(module.init, jax.random.key(0), IMAGES)
    rng = np.random.default_rng(0)

    def leaf(path, like):
        if path[-1].key in ("scale", "var", "gamma"):
            value = rng.uniform(0.5, 1.5, like.shape)
        else:
            value = rng.normal(size=like.shape) / np.sqrt(max(np.prod(like.shape[:-1]), 4))
        return jnp.asarray(value, like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, target)


@dataclasses.dataclass(frozen=True)
class Case:
    """A small module of a family, the family's description, variables, the evaluation and its logits, exact gradients."""

    info: ModelInfo
    low_rank: set[str]
    module: Any
    variables: Any
    apply: Callable[..., jax.Array]
    logits: jax.Array
    gradients: dict[str, jax.Array]


@pytest.fixture(scope="module", params=[("efficientformer_l1", FIRST), ("efficientformerv2_s0", SECOND)], ids=["v1", "v2"])
def case(request):
    name, module = request.param
    variables, apply = draw(module), jax.jit(module.apply)
    gradients = train(module, variables)[1]
    return Case(model_info(name), LOW_RANK[name], module, variables, apply, apply(variables, IMAGES), gradients)


def train(module, variables, spec=None, layers="", dtype=None, images=IMAGES) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits and gradients of a cross-entropy by parameter path, training with frozen batch normalisation."""
    module = module.clone(settings=dataclasses.replace(module.settings, dtype=dtype, frozen_batch_norm=True))
    if spec is not None:
        module = adapt(module, [LowRank(layers, spec)], images)

    @jax.jit
    def grad(params):
        def loss(params):
            logits = module.apply({**variables, "params": params}, images, train=True)
            scores = logits.astype(accumulation_dtype(logits.dtype))
            return -jax.nn.log_softmax(scores)[:, 0].mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    gradients, logits = grad(variables["params"])
    return logits, flatten_dict(gradients, sep="/")


def vanishes(path: str) -> bool:
    """Whether a parameter adds the same to every logit of a query, and so has a gradient of rounding errors alone."""
    return path.endswith(("k/conv/bias", "k/bn/bias", "talking_head1/bias"))


def assert_gradients_close(gradients, expected, tolerance=1e-4) -> None:
    """Equal to rounding, float32's by default, in sums that compilers order differently."""
    assert gradients.keys() == expected.keys()
    assert_close(*({path: tree[path] for path in tree if not vanishes(path)} for tree in (gradients, expected)), tolerance)


def test_logits_are_the_average_of_two_heads(case):
    chex.assert_shape(case.logits, (2, 5))
    chex.assert_type(case.logits, jnp.float32)
    params = case.variables["params"]
    halves = []
    for dropped in ("head", "head_dist"):
        other = {**params, dropped: jax.tree.map(jnp.zeros_like, params[dropped])}
        halves.append(case.apply({**case.variables, "params": other}, IMAGES))
        assert difference(halves[-1], case.logits) > 0.1
    chex.assert_trees_all_close(halves[0] + halves[1], case.logits, rtol=1e-5, atol=1e-6)  # float32 rounding


def test_low_rank_reaches_every_dense_layer(case):
    """With exact input cotangents, dropping the mean and more changes a kernel's gradient just where its layer is low-rank."""
    logits, gradients = train(case.module, case.variables, LowRankSpec([(0, 1)], dx="exact"), case.info.layers.low_rank)
    changed = {
        path for path, gradient in gradients.items() if not vanishes(path) and difference(gradient, case.gradients[path]) > 1e-3
    }
    assert changed == {f"{layer}/kernel" for layer in case.low_rank}
    assert difference(logits, case.logits) < 1e-5  # float32 rounding
    chex.assert_trees_all_equal_dtypes(gradients, case.gradients)
    chex.assert_tree_all_finite(gradients)


def test_the_papers_choice_is_every_dense_layer_of_the_blocks(case):
    layers = {path.rpartition("/")[0] for path in case.gradients}
    assert {layer for layer in layers if re.search(case.info.layers.low_rank, layer)} == case.low_rank


def test_full_rank_gradients_are_exact(case):
    """In float64: how far float32's rounding is carried through the layers differs from processor to processor."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # adapt traces float32 parameters
        variables, images = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (case.variables, IMAGES))
        wide = {"dtype": jnp.float64, "images": images}
        _, gradients = train(case.module, variables, lp_linf(8), case.info.layers.low_rank, **wide)
        assert_gradients_close(gradients, train(case.module, variables, **wide)[1], 1e-11)


def test_low_rank_in_bfloat16_keeps_the_logits_and_finite_gradients(case):
    logits, gradients = train(case.module, case.variables, lp_l1(4), case.info.layers.low_rank, jnp.bfloat16)
    chex.assert_type(logits, jnp.bfloat16)
    assert difference(logits.astype(jnp.float32), case.logits) < 0.1  # 8 bits, rounded in some 30 layers
    chex.assert_trees_all_equal_dtypes(gradients, case.gradients)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("remat", [False, True])
def test_a_spec_of_more_axes_is_refused_by_the_layers_name(case, remat):
    rule = LowRank("stages_2/blocks_0/mlp/fc2", lp_l1(4, ndim=3))
    with pytest.raises(ValueError, match=r"the token grid of stages_2/blocks_0/mlp/fc2\S*, a LowRankDense .* cannot be known"):
        adapt(case.module.clone(settings=Settings(remat=remat)), [rule], IMAGES)


def test_remat_changes_no_gradient(case):
    _, gradients = train(case.module.clone(settings=Settings(remat=True)), case.variables)
    assert_gradients_close(gradients, case.gradients)


@pytest.mark.parametrize("spec", [None, lp_l1(2)], ids=["full", "low-rank"])
def test_norms_joined_to_layers_change_nothing(case, spec):
    """In float64: in float32, rounding alone comes near to what a wrong sum would be."""
    apart = case.module.clone(settings=Settings(joins_norms=False))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # Flax promotes in layer norms
        variables, images = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), (case.variables, IMAGES))
        own, theirs = (
            train(module, variables, spec, case.info.layers.low_rank, jnp.float64, images) for module in (case.module, apart)
        )
        assert own[0].dtype == jnp.float64 and difference(own[0], theirs[0]) < 1e-12
        largest = max(float(jnp.max(jnp.abs(gradient))) for gradient in theirs[1].values())
        for path, gradient in theirs[1].items():
            # rounding; some gradients are nothing else: of what adds the same to every logit of a query
            tolerance = 1e-12 * max(float(jnp.max(jnp.abs(gradient))), 1e-2 * largest)
            chex.assert_trees_all_close(own[1][path], gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_freezes(case, frozen):
    module = case.module.clone(settings=Settings(frozen_batch_norm=frozen))
    apply = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, state = apply(case.variables, IMAGES)
    moved = jax.tree.map(lambda new, old: difference(new, old) > 1e-3, state["batch_stats"], case.variables["batch_stats"])
    assert set(jax.tree.leaves(moved)) == {not frozen}
    assert (difference(logits, case.logits) < 1e-5) == frozen


def test_drop_path_drops_while_training(case):
    dropping = case.module.clone(settings=Settings(frozen_batch_norm=True), drop_path=0.9)
    apply = jax.jit(lambda v, x: dropping.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)}))
    assert difference(apply(case.variables, IMAGES), case.logits) > 1e-2


def test_images_of_another_size_are_refused(case):
    with pytest.raises(ValueError, match=r"images must be \[batch, 64, 64, channels\], got \[2, 32, 32, 3\]"):
        jax.eval_shape(case.module.apply, case.variables, IMAGES[:, ::2, ::2])


def test_the_second_version_refuses_sizes_its_attention_cannot_halve():
    images = jnp.zeros((1, 240, 240, 3))
    with pytest.raises(ValueError, match=r"must be even.*got image_size=240. Any multiple of 32"):
        jax.eval_shape(create_model("efficientformerv2_s0", image_size=240).init, jax.random.key(0), images)


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [
        ("efficientformer_l1", 12_289_928, 281),
        pytest.param("efficientformer_l3", 31_406_000, 457, marks=pytest.mark.heavy),
        pytest.param("efficientformer_l7", 82_229_328, 649, marks=pytest.mark.heavy),
        ("efficientformerv2_s0", 3_600_256, 568),
        pytest.param("efficientformerv2_s1", 6_185_560, 722, marks=pytest.mark.heavy),
        pytest.param("efficientformerv2_s2", 12_710_112, 1054, marks=pytest.mark.heavy),
        ("efficientformerv2_l", 26_322_288, 1386),
    ],
)
def test_sizes_are_those_of_the_published_weights(name, parameters, keys):
    module = create_model(name)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    assert len(jax.tree.leaves(variables)) + len(model_info(name).files.make_buffers(module)) == keys


def test_every_pair_of_tokens_has_the_bias_of_its_offset():
    for stride, queries in (
        (1, [(row, column) for row in range(3) for column in range(5)]),
        (2, [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]),
    ):
        index = offset_index(3, 5, stride)
        for query, (row, column) in enumerate(queries):
            for key in range(15):
                assert index[query, key] == abs(row - key // 5) * 5 + abs(column - key % 5)
        assert index.shape == (len(queries), 15)


@pytest.mark.parametrize("size", [160, 224, 256])
@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("efficientformer_l1", {"stages.3.blocks.4.token_mixer.attention_biases": 32}),
        (
            "efficientformerv2_s0",
            {"stages.2.blocks.5.token_mixer.attention_biases": 32, "stages.3.downsample.attn.attention_biases": 16},
        ),
    ],
)
def test_attention_biases_are_resampled(name, strides, size):
    """A bias of row + 10 x column offset becomes the same in the new map's units, as far as the table reaches."""
    files = {"head.weight": np.ones((5, 7), np.float32)}
    for key, stride in strides.items():
        row, column = np.mgrid[: 224 // stride, : 224 // stride].astype(np.float32)
        files[key] = np.stack([(row + 10 * column).ravel(), np.full(row.size, 3, np.float32)])
    resampled = model_info(name).files.resample(files, create_model(name, image_size=size))
    assert resampled.keys() == files.keys()
    np.testing.assert_array_equal(resampled["head.weight"], files["head.weight"])
    for key, stride in strides.items():
        assert resampled[key].dtype == np.float32
        at = np.minimum(np.arange(size // stride) * 224 / size, 224 // stride - 1)
        expected = at[:, None] + 10 * at[None, :]
        np.testing.assert_allclose(resampled[key], [expected.ravel(), np.full(expected.size, 3)], rtol=1e-6)


def test_biases_of_no_square_map_are_not_resampled():
    name = "stages.3.blocks.4.token_mixer.attention_biases"
    with pytest.raises(ValueError, match=rf"{name}: attention biases must be .*got \[8, 48\]"):
        model_info("efficientformer_l1").files.resample(
            {name: np.zeros((8, 48))}, create_model("efficientformer_l1", image_size=256)
        )
