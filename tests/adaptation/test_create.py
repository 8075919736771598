"""``create_model`` with a spec: a Linen module with the plain model's variables, low-rank where asked."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close, difference

from lbpwht_jax import LoRA, LowRank, adapt, create_model, lp_l1

NAME = "vit_micro_patch4_28"
IMAGES = np.random.default_rng(0).standard_normal((2, 28, 28, 1), np.float32)
PLAIN = create_model(NAME, num_classes=10)
FC1 = create_model(NAME, num_classes=10, spec=lp_l1(2), layers="mlp/fc1$")


@pytest.fixture(scope="module")
def variables():
    return jax.jit(PLAIN.init)(jax.random.key(0), IMAGES)


def gradients(model, variables, **options):
    def loss(variables):
        return (model.apply(variables, IMAGES, train=True, **options).astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(loss))(variables)["params"]


def test_the_variables_are_the_plain_model_s(variables):
    assert isinstance(FC1, nn.Module) and (FC1.image_size, FC1.num_classes) == (28, 10)
    chex.assert_trees_all_equal(jax.jit(FC1.init)(jax.random.key(0), IMAGES), variables)
    chex.assert_trees_all_equal(FC1.apply(variables, IMAGES), PLAIN.apply(variables, IMAGES))
    assert hash(FC1) == hash(FC1.clone())


def test_the_layers_asked_for_alone_are_low_rank(variables):
    exact, low = gradients(PLAIN, variables), gradients(FC1, variables)
    # The last block sees no cotangent but the class token's, which is exact; so the one before sees exact cotangents too.
    mlp, wanted = low["blocks_4"]["mlp"], exact["blocks_4"]["mlp"]
    chex.assert_trees_all_close(low["head"], exact["head"], rtol=1e-5)  # float32 rounding, here and below
    assert_close(mlp["fc2"], wanted["fc2"], 1e-4)
    assert difference(mlp["fc1"]["kernel"], wanted["fc1"]["kernel"]) > 1e-2
    by_rule = adapt(PLAIN, [LowRank("mlp/fc1$", lp_l1(2))], IMAGES)
    chex.assert_trees_all_equal(low, gradients(by_rule, variables))


@pytest.mark.heavy
def test_recomputation_and_narrow_types(variables):
    again = create_model(NAME, num_classes=10, spec=lp_l1(2), layers="mlp/fc1$", remat=True)
    # the same sums, differently fused
    chex.assert_trees_all_close(gradients(again, variables), gradients(FC1, variables), rtol=1e-3, atol=1e-4)
    narrow = create_model(NAME, num_classes=10, spec=lp_l1(2), layers="mlp/fc1$", dtype=jnp.bfloat16)
    chex.assert_type(narrow.apply(variables, IMAGES), jnp.bfloat16)
    chex.assert_tree_all_finite(gradients(narrow, variables))


def test_transformations(variables):
    apply = jax.jit(chex.assert_max_traces(lambda variables, images: FC1.apply(variables, images), n=1))
    logits = [apply(variables, IMAGES) for _ in range(2)][1]
    one_by_one = jax.vmap(lambda image: FC1.apply(variables, image[None])[0])(jnp.asarray(IMAGES))
    chex.assert_trees_all_close(one_by_one, logits, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_the_plain_model_s():
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    fields = {"num_classes": 10, "image_size": 64, "drop_path": 0.1}
    plain, low = (create_model("efficientformer_l1", **fields, **more) for more in ({}, {"spec": lp_l1(4)}))
    variables = jax.eval_shape(plain.init, jax.random.key(0), images)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(low.init, jax.random.key(0), images), variables)

    def apply(model, variables, images):
        return model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])

    results = (jax.eval_shape(lambda v, x, m=model: apply(m, v, x), variables, images) for model in (plain, low))
    chex.assert_trees_all_equal_shapes_and_dtypes(*results)


def test_intermediates_can_be_captured(variables):
    (_, plain), (_, low) = (
        model.apply(variables, IMAGES, capture_intermediates=True, mutable=["intermediates"]) for model in (PLAIN, FC1)
    )
    first = lambda tree: jax.tree.map(lambda calls: calls[0], tree, is_leaf=lambda node: isinstance(node, tuple))  # noqa: E731
    chex.assert_trees_all_equal(first(low), first(plain))


def test_rules_go_before_the_model_s_own_spec(variables):
    adapted = adapt(FC1, [LoRA(r"blocks_0/mlp/fc1$", rank=2), LowRank(r"blocks_1/mlp/fc1$", lp_l1(4))], IMAGES)
    assert adapted.module is PLAIN or adapted.module == PLAIN
    specs = [adapted.spec(f"blocks_{i}/mlp/fc1") for i in range(3)]
    assert specs == [None, lp_l1(4), lp_l1(2)] and adapted.rank("blocks_0/mlp/fc1") == 2
    branched = adapted.with_branches(jax.random.key(0), variables)
    chex.assert_trees_all_equal(adapted.apply(branched, IMAGES), PLAIN.apply(variables, IMAGES))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layers": "mlp"}, ValueError, r"layers='mlp' needs a spec"),
        ({"spec": lp_l1(4), "layers": "mlp/fc3"}, ValueError, r"'mlp/fc3' matches no layer .* nearest paths: .*mlp/fc"),
        ({"spec": lp_l1(4), "layers": "head"}, ValueError, r"'head' matches no layer on a token grid"),
        ({"spec": lp_l1(4), "layers": "fc["}, ValueError, r"'fc\[' is no regular expression"),
        ({"spec": lp_l1(4), "layers": "(" * 100_000}, ValueError, r"'\(+\.\.\.' is no regular expression: maximum recursion"),
        ({"spec": lp_l1(4), "layers": "a{99999999999}"}, ValueError, r"is no regular expression: the repetition number"),
        ({"spec": 4}, TypeError, r"spec must be a LowRankSpec"),
        ({"image_size": -28}, ValueError, rf"{NAME}: image_size must be from 1 to 8192, got -28"),
        ({"image_size": 0}, ValueError, r"image_size must be from 1 to 8192, got 0"),
        ({"image_size": 10**9, "spec": lp_l1(4)}, ValueError, r"image_size must be from 1 to 8192, got 1000000000"),
        ({"image_size": 28.0}, TypeError, r"image_size must be an integer, got 28\.0"),
        ({"num_classes": -1}, ValueError, r"num_classes must be positive, got -1"),
        ({"num_classes": "x"}, TypeError, r"num_classes must be an integer, got 'x'"),
    ],
)
def test_errors(fields, error, message):
    with pytest.raises(error, match=message):
        create_model(NAME, **fields)
