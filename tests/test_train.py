import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LowRankDense, lp_l1
from lbpwht_jax.data.arrays import Split
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.train import Epoch, Recipe, Step, TrainState, evaluate, fit, make_eval_step, normalise


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = LowRankDense(8, spec=lp_l1(2, block=4))(images)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="head")(x.mean((1, 2)))


INFO = ModelInfo(Tiny, {}, 4, "", channels=1, mean=(0.5,), std=(0.25,))
MODEL = Tiny()
VARIABLES = MODEL.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
RECIPE = Recipe(epochs=3, batch_size=8, lr=3e-2)


def stripes(count, seed=0):
    """Bright images are class 0, dark ones class 1, which the untrained model has the wrong way round."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    images = rng.integers(0, 60, (count, 4, 4, 1)) + 150 * (1 - labels.reshape(-1, 1, 1, 1))
    return Split(images.astype(np.uint8), labels)


TRAIN, TEST = stripes(44), stripes(21, seed=1)


def run(recipe=RECIPE, augment=None):
    *events, state = fit(MODEL, INFO, VARIABLES, TRAIN, TEST, recipe, augment)
    assert isinstance(state, TrainState)
    return [e for e in events if isinstance(e, Step)], [e for e in events if isinstance(e, Epoch)], state


def test_it_learns_and_reports():
    steps, epochs, state = run()
    assert [step.number for step in steps] == list(range(1, 16)) and int(state.step) == 15
    assert [epoch.number for epoch in epochs] == [1, 2, 3]
    assert epochs[-1].test_accuracy == 1.0
    assert steps[0].accuracy < 0.5 and steps[-1].loss < steps[0].loss / 2
    assert all(math.isfinite(step.seconds) and step.seconds > 0 for step in steps)
    assert (state.others["batch_stats"]["norm"]["mean"] != VARIABLES["batch_stats"]["norm"]["mean"]).any()


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    (_, _, first), (_, _, again) = run(), run()
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    other = run(dataclasses.replace(RECIPE, seed=1))[2]
    assert (first.params["head"]["kernel"] != other.params["head"]["kernel"]).any()


def test_the_variables_given_stay_as_they_were():
    before = jax.tree.map(np.array, VARIABLES)
    run()
    jax.tree.map(np.testing.assert_array_equal, before, VARIABLES)


def test_augmentation_is_applied():
    steps, _, _ = run(augment=lambda key, images: jnp.zeros_like(images))
    # blank images: nothing but the classes' frequencies to learn
    assert steps[-1].loss > 0.5


def test_evaluation_counts_every_image_once():
    step = make_eval_step(MODEL, INFO)
    logits = MODEL.apply(VARIABLES, normalise(jnp.asarray(TEST.images), INFO))
    accuracy = float((logits.argmax(-1) == jnp.asarray(TEST.labels)).mean())
    loss = -float(jax.nn.log_softmax(logits)[jnp.arange(21), TEST.labels].mean())
    for batch_size in (4, 21, 64):
        assert evaluate(step, VARIABLES, TEST, batch_size) == pytest.approx((accuracy, loss), rel=1e-5)


def test_normalise():
    images = jnp.asarray([0, 255], jnp.uint8).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(normalise(images, INFO).ravel(), [-2.0, 2.0])


def test_the_rate_warms_up_and_decays():
    updates = []
    optimizer = dataclasses.replace(RECIPE, lr=1.0, weight_decay=0.0, warmup_steps=10).optimizer(100)
    params = jnp.ones(1)
    state = optimizer.init(params)
    for _ in range(100):
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimizer.update(jnp.ones(1), state, params)
        updates.append(-float(update[0]))
    # AdamW's step on a constant gradient is the rate itself
    assert updates[0] == pytest.approx(1e-3, rel=1e-3)
    assert max(updates) == pytest.approx(1.0, rel=1e-3) and updates.index(max(updates)) == 10
    assert updates[-1] == pytest.approx(0.01, rel=0.1)


def test_a_loss_that_diverges_names_the_step():
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, VARIABLES)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1; lower the learning rate"):
        list(fit(MODEL, INFO, broken, TRAIN, TEST, RECIPE))


def test_a_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="batch size 64 is larger than the 44 training images"):
        next(fit(MODEL, INFO, VARIABLES, TRAIN, TEST, Recipe(1)))


def test_one_compilation_for_all_steps(caplog):
    with jax.log_compiles():
        run()
    assert sum("Compiling jit(step)" in record.message for record in caplog.records) == 2
