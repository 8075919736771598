import dataclasses
import functools
import math
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import LoRA, LowRankDense, adapt, lp_l1
from lbpwht_jax.data import ArraySplit, Augmentation, Batch, Dataset, training_batches
from lbpwht_jax.data.split import hold_out
from lbpwht_jax.models.info import Images, ModelInfo
from lbpwht_jax.train import (
    Diverged,
    Epoch,
    Placement,
    Recipe,
    Snapshot,
    Step,
    Trainer,
    bytes_on_a_device,
    initial_state,
    make_train_step,
    normalise,
)


class Tiny(nn.Module):
    batch_norm: bool = True

    @nn.compact
    def __call__(self, images, train=False):
        x = LowRankDense(8, spec=lp_l1(2, block=4))(images)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="head")(nn.relu(x).mean((1, 2)))


INFO = ModelInfo(Tiny, {}, Images(4, channels=1, mean=(0.5,), std=(0.25,)))
MODEL, PLAIN = Tiny(), Tiny(batch_norm=False)
VARIABLES = jax.jit(MODEL.init)(jax.random.key(3), jnp.zeros((1, 4, 4, 1)))
PLAIN_VARIABLES = jax.jit(PLAIN.init)(jax.random.key(3), jnp.zeros((1, 4, 4, 1)))
RECIPE = Recipe(epochs=3, batch_size=8, lr=3e-2)
ONE = Placement(devices=jax.devices()[:1])


def stripes(count, seed=0):
    """Bright images are class 0, dark ones class 1, which the untrained model has the wrong way round."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    images = rng.integers(0, 60, (count, 4, 4, 1)) + 150 * (1 - labels.reshape(-1, 1, 1, 1))
    return ArraySplit(images.astype(np.uint8), labels)


DATA = Dataset("stripes", stripes(44), stripes(21, seed=1), ("bright", "dark"))


@functools.cache
def trainer(recipe=RECIPE, model=MODEL, placement=ONE):
    return Trainer(model, INFO, DATA, recipe, 4, placement=placement)


def run(recipe=RECIPE, model=MODEL, variables=VARIABLES, placement=ONE):
    training = trainer(recipe, model, placement)
    state = training.initial_state(variables)
    with jax.transfer_guard("disallow"):
        events = list(training.fit(state))
    last = events[-1]
    assert isinstance(last, Snapshot)
    return [e for e in events if isinstance(e, Step)], [e for e in events if isinstance(e, Epoch)], last.state


def losses(*args, **kwargs):
    return [step.loss for step in run(*args, **kwargs)[0]]


def device_batch(training, count=8):
    batch = next(training_batches(DATA, dataclasses.replace(training.loading, batch_size=count)))
    return Batch(*map(jnp.asarray, batch))


def test_it_learns_and_reports():
    steps, epochs, state = run()
    assert [step.number for step in steps] == list(range(1, 16)) and int(state.step) == 15
    assert [(epoch.number, epoch.step) for epoch in epochs] == [(1, 5), (2, 10), (3, 15)]
    assert epochs[-1].test_accuracy == 1.0
    assert steps[0].accuracy < 0.7 and steps[-1].loss < steps[0].loss / 2
    assert all(math.isfinite(step.seconds) and step.seconds > 0 and step.gradient_norm > 0 for step in steps)
    assert (state.others["batch_stats"]["norm"]["mean"] != VARIABLES["batch_stats"]["norm"]["mean"]).any()


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    (_, _, first), (_, _, again) = run(), run()
    chex.assert_trees_all_equal(first.params, again.params)
    other = run(dataclasses.replace(RECIPE, seed=1))[2]
    assert (first.params["head"]["kernel"] != other.params["head"]["kernel"]).any()


def test_the_variables_given_stay_as_they_were():
    before = jax.tree.map(np.array, VARIABLES)
    run()
    chex.assert_trees_all_equal(before, VARIABLES)


def test_augmentation_is_applied():
    shifted = dataclasses.replace(RECIPE, augmentation=Augmentation(shift=3))
    assert losses(shifted) != losses()


def test_crops_are_cut_once():
    """On the device out of a larger canvas, or out of the whole image while it is loaded."""
    for crop_from, canvas, scale in (("canvas", 6, None), ("image", None, (0.2, 0.9))):
        augmentation = Augmentation(crop_scale=(0.2, 0.9), crop_from=crop_from)
        found = trainer(dataclasses.replace(RECIPE, augmentation=augmentation)).loading
        assert (found.canvas, found.crop_scale) == (canvas, scale)


def test_no_step_s_time_contains_the_compilation(monkeypatch):
    """On a clock that a compilation moves by a thousand seconds and a step by one."""
    now = [0.0]
    monkeypatch.setattr("lbpwht_jax.train.trainer.time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    training = Trainer(PLAIN, INFO, DATA, RECIPE, 4, placement=ONE)
    step = training.train_step

    class Timed:
        def lower(self, *_):
            return self

        def compile(self):
            now[0] += 1000

        def __call__(self, *arguments):
            now[0] += 1
            return step(*arguments)

    vars(training)["train_step"] = Timed()
    events = list(training.fit(training.initial_state(PLAIN_VARIABLES)))
    assert now == [1015] and sum(event.seconds for event in events if isinstance(event, Step)) == 15


def test_evaluation_counts_every_image_once():
    logits = MODEL.apply(VARIABLES, normalise(jnp.asarray(DATA.test.images) / 255, INFO))
    labels = jnp.asarray(DATA.test.labels)
    accuracy = float((logits.argmax(-1) == labels).mean())
    loss = -float(jax.nn.log_softmax(logits)[jnp.arange(21), labels].mean())
    for batch_size, placement in ((4, ONE), (21, ONE), (32, Placement())):
        training = trainer(dataclasses.replace(RECIPE, batch_size=batch_size), placement=placement)
        found = training.evaluator(VARIABLES, DATA.test)
        assert (found.accuracy, found.loss) == pytest.approx((accuracy, loss), rel=1e-5)
        assert found.images == 21 and not found.skipped


def test_normalise():
    np.testing.assert_allclose(normalise(jnp.asarray([0.0, 1.0]).reshape(2, 1, 1, 1), INFO).ravel(), [-2.0, 2.0])


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


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def step(parts):
        training = trainer(dataclasses.replace(RECIPE, accumulate=parts), PLAIN)
        return training.train_step(training.initial_state(PLAIN_VARIABLES), device_batch(training))

    (whole, metrics), (parts, accumulated) = step(1), step(4)
    # the same sums in another order, in float32
    chex.assert_trees_all_close(metrics, accumulated, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(whole.optimizer, parts.optimizer, rtol=1e-4, atol=1e-6)


def test_the_moving_average_is_what_is_evaluated():
    recipe = dataclasses.replace(RECIPE, epochs=1, ema=0.9)
    training = trainer(recipe, PLAIN)
    state = training.initial_state(PLAIN_VARIABLES)
    average = jax.tree.map(np.asarray, state.params)
    for batch, _ in zip(training_batches(DATA, training.loading), range(5), strict=False):
        state, _ = training.train_step(state, training.placement.put_batch(batch))
        average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * np.asarray(new), average, state.params)
    *_, epoch, snapshot = training.fit(training.initial_state(PLAIN_VARIABLES))
    chex.assert_trees_all_close(average, snapshot.state.averaged["params"], rtol=1e-5)
    found = training.evaluator(snapshot.state.averaged, DATA.test)
    assert epoch.test_loss == found.loss != training.evaluator(snapshot.state.variables, DATA.test).loss


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_divergence_names_the_step_and_keeps_the_last_good_state(broken):
    @jax.custom_jvp
    def poisoned(x):
        return x

    @poisoned.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        return x, t * jnp.where(x.mean() > 10, jnp.nan, 1.0)

    class Breaking(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            steps = self.variable("count", "steps", jnp.zeros, ())
            if train:
                steps.value = steps.value + 1
            x = nn.Dense(2, name="head")(images.mean((1, 2)))
            if broken == "gradient":
                return poisoned(x + jnp.where(steps.value > 3, 20.0, 0.0))
            return x + jnp.where(steps.value > 3, jnp.inf, 0.0)

    model = Breaking()
    variables = {**model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))), "count": {"steps": jnp.zeros(())}}
    training = trainer(model=model)
    steps = []
    what = "the loss is nan" if broken == "loss" else "the gradients' norm is nan"
    with pytest.raises(Diverged, match=f"{what} at step 4; lower the learning rate") as caught:
        steps.extend(training.fit(training.initial_state(variables)))
    state = training.initial_state(variables)
    for batch, _ in zip(training_batches(DATA, training.loading), range(3), strict=False):
        state, _ = training.train_step(state, training.placement.put_batch(batch))
    chex.assert_trees_all_equal(caught.value.state, state)


@pytest.mark.parametrize(("lr", "step"), [(1e30, 2), (1e37, 1)])
def test_the_last_good_state_is_finite(lr, step):
    """Its loss is finite where the update that follows from it is not: the update is looked at, too."""
    recipe = dataclasses.replace(RECIPE, lr=lr, warmup_steps=0, clip=0.0, weight_decay=lr)
    training = trainer(recipe, PLAIN)
    with pytest.raises(Diverged, match=r"(the updated parameters are not finite|is nan|is inf) at step \d") as caught:
        list(training.fit(training.initial_state(PLAIN_VARIABLES)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(caught.value.state._replace(diverged=None)))
    assert int(caught.value.state.step) <= step and not caught.value.state.diverged


def test_narrow_parameters_are_looked_at():
    """The bound is float32's: in float16 a step within it overflows."""

    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return nn.Dense(2, param_dtype=jnp.float16, dtype=jnp.float32)(images.mean((1, 2)))

    recipe = dataclasses.replace(RECIPE, lr=9e4, warmup_steps=0)
    assert recipe.bounded
    training = trainer(recipe, Narrow())
    with pytest.raises(Diverged, match="the updated parameters are not finite at step 1") as caught:
        list(training.fit(training.initial_state(Narrow().init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))))))
    chex.assert_tree_all_finite(caught.value.state.params)


def test_a_start_that_is_not_finite_is_refused():
    """As an infinite bias that no logit shows; steps would not find it."""
    variables = jax.tree.map(np.array, VARIABLES)
    variables["params"]["norm"]["bias"][3] = -np.inf
    wanted = "training cannot start from numbers that are not finite, in 1 arrays such as norm/bias; use other weights"
    with pytest.raises(ValueError, match=wanted):
        trainer().initial_state(variables)


def traced_step(recipe):
    """A step of a model whose activations are small, and the bytes of its parameters."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = images.reshape(images.shape[0], -1)
            for _ in range(16):
                x = nn.Dense(256)(x)
            return nn.Dense(2)(x)

    optimizer = recipe.optimizer(10)
    state = jax.eval_shape(
        lambda key: initial_state(Deep().init(key, jnp.zeros((1, 4, 4, 1))), optimizer),
        jax.random.key(0),
    )
    step = make_train_step(Deep(), INFO, optimizer, recipe, 4, 2)
    images = jax.ShapeDtypeStruct((8, 4, 4, 1), jnp.uint8)
    batch = Batch(images, *(jax.ShapeDtypeStruct((8,), dtype) for dtype in (jnp.int32, jnp.bool_, jnp.float32)))
    return jax.jit(step, donate_argnums=0).trace(state, batch), sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))


def update_room(recipe):
    """Bytes of temporaries of a compiled step over those of the model's parameters."""
    traced, parameters = traced_step(recipe)
    return traced.lower().compile().memory_analysis().temp_size_in_bytes / parameters


def test_an_update_that_cannot_overflow_is_made_in_place():
    """There are gradients beside the state, and clipped ones; where it can, new parameters and moments to look at as well."""
    assert update_room(dataclasses.replace(RECIPE, clip=0.0)) < 1.1
    assert update_room(RECIPE) < 2.1
    assert update_room(dataclasses.replace(RECIPE, lr=1e7)) > 3.9


def test_gpus_choose_within_the_update():
    traced, _ = traced_step(RECIPE)
    gpu, cpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu"))
    assert cpu.count("stablehlo.case") == gpu.count("stablehlo.case") + 1  # the others tell the platforms apart


@pytest.mark.parametrize("weight", [1, np.nan])
def test_the_choice_and_the_condition_are_the_same(monkeypatch, weight):
    optimizer = RECIPE.optimizer(10)
    state, images = initial_state(VARIABLES, optimizer), DATA.train.images[:8]
    batch = Batch(images, DATA.train.labels[:8], np.ones(8, bool), np.ones(8, np.float32))
    weights = np.full(2, weight, np.float32)

    def taken():
        step = make_train_step(MODEL, INFO, optimizer, RECIPE, 4, 2, class_weights=weights)
        return jax.jit(step)(state, batch)

    condition = taken()
    monkeypatch.setattr("lbpwht_jax.train.step.by_platform", lambda plain, *given, cuda: cuda(*given))
    choice = taken()
    assert bool(choice[0].diverged) == np.isnan(weight) and int(choice[0].step) == 1 - np.isnan(weight)
    chex.assert_trees_all_close(choice, condition, rtol=1e-6)


def test_labels_must_be_indices_of_classes():
    for bad in (-1, 2):
        wrong = ArraySplit(DATA.test.images, np.where(np.arange(21) == 20, bad, DATA.test.labels))
        with pytest.raises(ValueError, match=f"the test images of stripes have the label {bad}; labels must be from 0 to 1"):
            Trainer(PLAIN, INFO, dataclasses.replace(DATA, test=wrong), RECIPE, 4, placement=ONE)

        class Unlabelled:  # a split whose labels are not known before its images are read
            def __len__(self):
                return 44

            def read(self, index, bad=bad):
                return DATA.train.read(index)[0], bad

            def where(self, index):
                return f"image {index}"

        training = Trainer(PLAIN, INFO, dataclasses.replace(DATA, train=Unlabelled()), RECIPE, 4, placement=ONE)
        with pytest.raises(ValueError, match=f"the training images of stripes have the label {bad}"):
            list(training.fit(training.initial_state(PLAIN_VARIABLES)))
    with pytest.raises(ValueError, match="stripes has 1 class alone, which leaves nothing to learn"):
        Trainer(PLAIN, INFO, dataclasses.replace(DATA, classes=("bright",)), RECIPE, 4, placement=ONE)
    with pytest.raises(ValueError, match="workers must be positive, got 0"):
        Trainer(PLAIN, INFO, DATA, RECIPE, 4, placement=ONE, workers=0)


def test_epochs_are_measured_on_validation_images_where_there_are_some():
    held = hold_out(DATA, 0.25, seed=0)
    assert len(held.validation) + len(held.train) == 44 and not set(held.validation.indices) & set(held.train.indices)
    for label in (0, 1):
        count = np.sum(DATA.train.labels == label)
        assert np.sum(held.validation.labels == label) == round(count / 4)
    np.testing.assert_array_equal(hold_out(DATA, 0.25, seed=0).validation.indices, held.validation.indices)
    training = Trainer(PLAIN, INFO, held, dataclasses.replace(RECIPE, epochs=1), 4, placement=ONE)
    *_, epoch, snapshot = training.fit(training.initial_state(PLAIN_VARIABLES))
    found = training.evaluator(snapshot.state.averaged, held.validation)
    assert epoch == Epoch(1, 4, None, None, found.accuracy, found.loss) and found.images == len(held.validation)
    assert epoch.measured == {"validation_accuracy": found.accuracy, "validation_loss": found.loss}
    with pytest.raises(ValueError, match=r"stripes has \d+ validation images of its own; leave --validation out"):
        hold_out(held, 0.25, seed=0)


def test_one_compilation_for_all_steps(caplog):
    with jax.log_compiles():
        run(placement=Placement("params"))
    compiled = [record.message for record in caplog.records if "Compiling jit(" in record.message]
    assert sum("jit(placed)" in message for message in compiled) == 1
    assert sum("jit(step)" in message for message in compiled) == 1


def test_one_trace_for_all_steps():
    training = trainer(model=PLAIN)
    step = chex.assert_max_traces(make_train_step(PLAIN, INFO, RECIPE.optimizer(15), RECIPE, 4, 2), n=1)
    compiled, state = jax.jit(step), training.initial_state(PLAIN_VARIABLES)
    for _ in range(3):
        state, _ = compiled(state, device_batch(training))
    assert int(state.step) == 3


@pytest.mark.parametrize("shard", ["data", "params"])
def test_devices_share_a_run(shard):
    alone = losses(model=PLAIN, variables=PLAIN_VARIABLES)
    placement = Placement(shard, jax.devices()[:4])
    together = losses(model=PLAIN, variables=PLAIN_VARIABLES, placement=placement)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_devices_share_the_draws_of_dropout():
    model = adapt(PLAIN, [LoRA("LowRankDense_0", rank=1, dropout=0.5)], jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32))
    variables = model.with_branches(jax.random.key(0), PLAIN_VARIABLES)
    variables["params"]["LowRankDense_0"]["lora_b"] += 1.0
    alone = losses(model=model, variables=variables)
    together = losses(model=model, variables=variables, placement=Placement(devices=jax.devices()[:4]))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    # step after step from where it stopped, too
    training = trainer(model=model)
    *_, (state, _, _) = training.fit(training.initial_state(variables), stop=lambda number: number == 7)
    later = [event.loss for event in training.fit(state) if isinstance(event, Step)]
    assert later == alone[7:]


def test_sharing_parameters_saves_memory():
    def sizes(shard):
        training = trainer(placement=Placement(shard, jax.devices()[:4]))
        state = training.initial_state(VARIABLES)
        state, _ = training.train_step(state, training.placement.put_batch(next(training_batches(DATA, training.loading))))
        return bytes_on_a_device(state.params), bytes_on_a_device(state.optimizer)

    (params, optimizer), (shared_params, shared_optimizer) = sizes("data"), sizes("params")
    head_bias = 4 * 2  # the two numbers that four devices cannot share
    assert params - head_bias == 4 * (shared_params - head_bias)
    counts = 2 * 4  # AdamW's and the schedule's
    assert optimizer - 2 * head_bias - counts == 4 * (shared_optimizer - 2 * head_bias - counts)


def test_the_step_under_pmap():
    training = trainer(model=PLAIN)
    batch = device_batch(training)
    optimizer = RECIPE.optimizer(15)
    state, metrics = training.train_step(training.initial_state(PLAIN_VARIABLES), batch)
    step = jax.pmap(make_train_step(PLAIN, INFO, optimizer, RECIPE, 4, 2, axis="i"), "i", devices=jax.devices()[:4])
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), initial_state(PLAIN_VARIABLES, optimizer))
    mapped, averaged = step(copies, jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), batch))
    # means of four means, in float32
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], averaged), metrics, rtol=1e-5, atol=1e-6)
    third = jax.tree.map(lambda leaf: leaf[2], mapped.optimizer)
    chex.assert_trees_all_close(third, state.optimizer, rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_smoothed_labels():
    training = trainer(model=PLAIN)
    _, metrics = training.train_step(training.initial_state(PLAIN_VARIABLES), device_batch(training))
    batch = device_batch(training)
    logits = PLAIN.apply(PLAIN_VARIABLES, normalise(batch.images.astype(jnp.float32) / 255, INFO))
    scores = -np.asarray(jax.nn.log_softmax(logits))
    wanted = 0.9 * scores[np.arange(8), batch.labels] + 0.1 * scores.mean(-1)
    assert float(metrics.loss) == pytest.approx(wanted.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "placement", "message"),
    [
        ({"batch_size": 64}, ONE, "batch size 64 is larger than the 44 training images"),
        (
            {"batch_size": 12},
            Placement(),
            "a batch of 12 images cannot be shared equally by 8 devices; make the batch size a m",
        ),
        (
            {"accumulate": 3},
            ONE,
            r"cannot be shared equally by 1 devices in 3 parts \(accumulate\); make the batch size a multip",
        ),
    ],
)
def test_batches_that_cannot_be(fields, placement, message):
    with pytest.raises(ValueError, match=message):
        trainer(dataclasses.replace(RECIPE, **fields), placement=placement)


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("lr", -1.0), ("ema", 1.0), ("clip", -1.0), ("accumulate", 0)])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be .*input_value={value}"):
        dataclasses.replace(RECIPE, **{name: value})
