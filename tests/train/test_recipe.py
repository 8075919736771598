"""The recipe's optimisers, its layer-wise decay and its class weights."""

import dataclasses
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbpwht_jax.data import ArraySplit, Batch, Dataset
from lbpwht_jax.models import model_info, plain_model
from lbpwht_jax.train import Recipe, Trainer, initial_state, make_train_step
from lbpwht_jax.train.depth import distances, scale_by_depth
from lbpwht_jax.train.recipe import Algorithm

EVERY = pytest.mark.parametrize("algorithm", get_args(Algorithm))


def update(recipe, grads, params, steps=100):
    optimizer = recipe.optimizer(steps)
    with jax.numpy_dtype_promotion("standard"):  # as in the training step
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return updates


@EVERY
def test_weights_decay_by_the_learning_rate(algorithm):
    """Without a gradient a parameter loses lr * weight_decay of its value, whatever the algorithm."""
    recipe = Recipe(1, lr=0.25, warmup_steps=0, weight_decay=0.5, clip=0.0, algorithm=algorithm)
    params = {"a": jnp.full((3, 4), 2.0), "b": jnp.full(3, -1.0)}
    updates = update(recipe, jax.tree.map(jnp.zeros_like, params), params)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda p: -0.125 * p, params), rtol=1e-6)


@EVERY
def test_every_algorithm_descends(algorithm):
    recipe = Recipe(1, lr=1e-2, warmup_steps=0, weight_decay=0.0, algorithm=algorithm)
    optimizer, params = recipe.optimizer(50), jnp.asarray([1.0, -2.0, 3.0])
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(2 * params, state, params)
        return optax.apply_updates(params, updates), state

    before = float((params**2).sum())
    for _ in range(50):
        params, state = step(params, state)
    assert float((params**2).sum()) < 0.9 * before


def longest_step(algorithm, gradients):
    """The largest change of a parameter over the gradients, for a learning rate of 1; the last state as well."""
    recipe = Recipe(1, lr=1.0, warmup_steps=0, weight_decay=0.0, clip=0.0, min_ratio=0.999, algorithm=algorithm)
    optimizer = recipe.optimizer(10**6)

    def step(state, gradient):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, jnp.zeros_like(gradient))
        return state, updates

    state, updates = jax.jit(lambda state, gradients: jax.lax.scan(step, state, gradients))(
        optimizer.init(jnp.zeros_like(gradients[0])), gradients
    )
    return float(jnp.abs(updates).max()), state


def test_what_a_finite_norm_bounds():
    """AdamW's bound is met by gradients that grow as the averages forget; the others' by the same gradient each time."""
    growing = np.concatenate([np.zeros(10_000), (0.999 / 0.9) ** np.arange(300)])
    assert 7.2 < longest_step("adamw", jnp.asarray(growing[:, None], jnp.float32))[0] < 7.3
    largest = np.sqrt(np.finfo(np.float32).max)  # whose square is finite
    same = jnp.full((100, 1), largest * 0.999, jnp.float32)
    turning = same * jnp.asarray(np.sign(np.sin(np.arange(100) + 0.5)), jnp.float32)[:, None]
    assert np.isfinite(optax.tree.norm(same[0])) and not np.isfinite(optax.tree.norm(same[0] * 1.01))
    for algorithm, most in (("adamw", 1.001), ("lion", 1.0), ("sgd", 1.85e20)):
        step, state = longest_step(algorithm, same)
        assert 0.99 * most < step <= most
        less, turned = longest_step(algorithm, turning)
        assert less <= most
        chex.assert_tree_all_finite((state, turned))


@EVERY
def test_bounded_recipes(algorithm):
    known = algorithm != "adafactor"
    assert Recipe(1, algorithm=algorithm).bounded == known
    assert Recipe(1, algorithm=algorithm, lr=1e6, weight_decay=1e-6).bounded == known
    assert not Recipe(1, algorithm=algorithm, lr=1.01e6, weight_decay=0.0).bounded
    assert not Recipe(1, algorithm=algorithm, lr=10.0, weight_decay=0.11).bounded


def test_sgd_has_momentum():
    recipe = Recipe(1, lr=0.5, warmup_steps=0, weight_decay=0.0, clip=0.0, min_ratio=0.999, algorithm="sgd")
    optimizer, params = recipe.optimizer(10**6), jnp.zeros(())
    state = optimizer.init(params)
    updates = []
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            new, state = optimizer.update(jnp.ones(()), state, params)
        updates.append(float(new))
    # the cosine of a million steps has not moved yet
    np.testing.assert_allclose(updates, [-0.5, -0.5 * 1.9, -0.5 * 2.71], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vit_micro_patch4_28", {"head": 0, "norm": 0, "blocks_5": 1, "blocks_0": 6, "patch_embed": 7, "pos_embed": 7}),
        (
            "swinv2_tiny_window8_256",
            {"head": 0, "norm": 0, "layers_3/blocks_1": 1, "layers_3/blocks_0": 2, "layers_3/downsample": 2}
            | {"layers_0/blocks_0": 12, "patch_embed": 13},
        ),
        (
            "efficientformer_l1",
            {"head": 0, "head_dist": 0, "norm": 0, "stages_3/blocks_4": 1, "stages_0/blocks_0": 15, "stem": 16},
        ),
    ],
)
def test_distances_from_the_head(name, wanted):
    info, module = model_info(name), plain_model(name)
    images = jax.ShapeDtypeStruct((1, *info.images.shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(variables["params"])]
    found = distances(paths)
    for start, distance in wanted.items():
        matching = {found[path] for path in paths if path == start or path.startswith(f"{start}/")}
        assert matching == {distance}, start


def test_updates_shrink_with_the_distance():
    params = {
        "head": {"kernel": jnp.ones(2)},
        "blocks_1": {"a": jnp.ones(2)},
        "blocks_0": {"a": jnp.ones(2)},
        "cls": jnp.ones(2),
    }
    scaled, _ = scale_by_depth(0.5).update(params, scale_by_depth(0.5).init(params), params)
    chex.assert_trees_all_equal(
        scaled,
        {"head": {"kernel": params["cls"]}}
        | {"blocks_1": {"a": params["cls"] / 2}, "blocks_0": {"a": params["cls"] / 4}, "cls": params["cls"] / 8},
    )
    plain, decayed = (Recipe(1, warmup_steps=0, layer_decay=decay) for decay in (1.0, 0.5))
    grads = jax.tree.map(lambda leaf: 0.1 * leaf, params)
    chex.assert_trees_all_close(
        update(decayed, grads, params), scale_by_depth(0.5).update(update(plain, grads, params), optax.EmptyState())[0]
    )


class Linear:
    """Logits that are the parameter, whatever the image."""

    def apply(self, variables, images, train=False, rngs=None, mutable=()):
        logits = jnp.broadcast_to(variables["params"]["w"], (len(images), 3))
        return (logits, {}) if mutable is not False and train else logits


def test_balanced_classes_count_the_same():
    """With 6, 3 and 0 images of three classes, the weights are 9 / (6 * 2), 9 / (3 * 2) and, without images, any."""
    labels = np.asarray([0] * 6 + [1] * 3, np.int32)
    split = ArraySplit(np.zeros((9, 4, 4, 1), np.uint8), labels)
    data = Dataset("nine", split, split, ("a", "b", "c"))
    info = dataclasses.replace(model_info("vit_micro_patch4_28"))
    recipe = Recipe(1, batch_size=8, class_weights="balanced", label_smoothing=0.0, weight_decay=0.0)
    weights = Trainer(Linear(), info, data, recipe, 4)._class_weights
    np.testing.assert_allclose(weights[:2], [0.75, 1.5])
    assert weights[labels].mean() == pytest.approx(1)
    batch = Batch(split.images, labels, np.ones(9, bool), np.ones(9, np.float32))
    params = {"w": jnp.asarray([0.2, -0.1, 0.4])}
    for given, wanted in ((None, np.ones(3)), (weights, weights)):
        step = make_train_step(Linear(), info, optax.sgd(1.0), recipe, 4, 3, class_weights=given)
        state, metrics = jax.jit(step)(initial_state({"params": params}, optax.sgd(1.0)), batch)
        shares = np.asarray(jax.nn.softmax(params["w"]))
        assert float(metrics.loss) == pytest.approx((-np.log(shares[labels]) * wanted[labels]).mean(), rel=1e-6)
        gradient = ((shares - np.eye(3)[labels]) * wanted[labels, None]).mean(0)
        np.testing.assert_allclose(state.params["w"], params["w"] - gradient, rtol=1e-5)
    with pytest.raises(ValueError, match=r"patience 2 needs validation images .* --validation 0\.1"):
        Trainer(Linear(), info, data, Recipe(1, batch_size=8, patience=2), 4)
