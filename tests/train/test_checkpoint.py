import dataclasses
import functools
import gc
import os
import shutil
import subprocess
import threading

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lbpwht_jax.data import ArraySplit, Augmentation, Dataset
from lbpwht_jax.models.blocks import DropPath
from lbpwht_jax.models.info import Images, ModelInfo
from lbpwht_jax.train import Epoch, Placement, Recipe, Snapshot, Step, Trainer
from lbpwht_jax.train.checkpoint import FOLDER, FROZEN, Checkpoints, last_step


class Small(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(self.width, name="first")(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = x + DropPath(0.3)(nn.Dense(self.width, name="second")(nn.relu(x)), train)
        return nn.Dense(4, name="head")(x)


INFO = ModelInfo(Small, {}, Images(6, channels=1, mean=(0.5,), std=(0.25,)))
RNG = np.random.default_rng(0)
TRAIN, TEST = (ArraySplit(RNG.integers(0, 256, (n, 6, 6, 1)).astype(np.uint8), RNG.integers(0, 4, n)) for n in (45, 20))
DATA = Dataset("noise", TRAIN, TEST, tuple("abcd"))
RECIPE = Recipe(epochs=4, batch_size=8, lr=1e-2, ema=0.9, augmentation=Augmentation(shift=1, mixup=0.5))
ONE, FOUR = Placement(devices=jax.devices()[:1]), Placement("params", jax.devices()[:4])
CONFIG = {"model": "small"}


@functools.cache
def trainer(placement=ONE, width=32, recipe=RECIPE):
    return Trainer(Small(width), INFO, DATA, recipe, 6, lambda path: not path.startswith("first"), placement)


def variables(width=32):
    return jax.jit(Small(width).init)(jax.random.key(0), jnp.zeros((1, 6, 6, 1)))


def abstract(training, width=32):
    return training.placement.abstract(training.initial_state(variables(width)))


def train(training, state, checkpoints, last=None):
    """Trains, saving every three steps, up to the snapshot of a step: (events but for times, state)."""
    events = []
    for event in training.fit(state, 3):
        if isinstance(event, Snapshot):
            checkpoints.save(event.state, event.epoch)
            if int(event.state.step) == last:
                break
        else:
            events.append(event._replace(seconds=0) if isinstance(event, Step) else event)
    checkpoints.wait()
    return events, event.state


def started(run, training, last=None):
    state = training.initial_state(variables())
    with Checkpoints(run, CONFIG) as checkpoints:
        checkpoints.begin(state, training.placement)
        return train(training, state, checkpoints, last)


def resumed(run, training, step=None):
    with Checkpoints(run, CONFIG) as checkpoints:
        state, facts = checkpoints.restore(abstract(training), training.placement, last_step(run) if step is None else step)
        checkpoints.begin(state, training.placement, facts)
        return train(training, state, checkpoints)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    return run, *started(run, trainer())


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


@pytest.mark.parametrize("last", [3, 5, 12])
def test_interrupted_is_uninterrupted(last, whole, tmp_path):
    # 5 ends an epoch, the others do not
    _, events, state = whole
    before, _ = started(tmp_path, trainer(), last)
    after, end = resumed(tmp_path, trainer())
    assert before + after == events
    chex.assert_trees_all_equal(end, state)


def test_the_last_two_and_the_best_are_kept(whole, tmp_path):
    # without validation images the last epoch is the best
    with Checkpoints(whole[0], CONFIG, write=False) as checkpoints:
        assert checkpoints.steps == [18, 20]
        facts = checkpoints.facts(20)
    assert facts.best == whole[1][-1] and (facts.step, facts.config) == (20, CONFIG)
    # with them it is the first of those with the highest accuracy on them
    state = trainer().initial_state(variables())
    accuracies = {5: 0.2, 10: 0.9, 15: 0.9, 20: 0.1}
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.begin(state, ONE)
        for step in (5, 10, 15, 17, 20):
            epoch = Epoch(step // 5, step, None, None, accuracies[step], 1.0) if step in accuracies else None
            checkpoints.save(state._replace(step=jnp.asarray(step, jnp.int32)), epoch)
        checkpoints.wait()
        assert checkpoints.steps == [10, 17, 20] and checkpoints.facts(20).best == Epoch(2, 10, None, None, 0.9, 1.0)


DAMAGED = [("metrics", "metrics"), ("facts", "metadata"), ("_CHECKPOINT_METADATA",)]


@hypothesis.settings(max_examples=20)
@hypothesis.given(file=st.sampled_from(DAMAGED), cut=st.floats(0, 1), bit=st.none() | st.integers(0, 7))
def test_damage_of_one_checkpoint_leaves_the_others_usable(whole, file, cut, bit):
    """A flipped bit or a truncation anywhere: the checkpoint is what it was, or it is named as damaged; the other is read."""
    place = (whole[0] / FOLDER / "20").joinpath(*file)
    before = place.read_bytes()
    at = int(cut * (len(before) - 1))
    after = before[:at] if bit is None else before[:at] + bytes([before[at] ^ 1 << bit]) + before[at + 1 :]
    place.write_bytes(after)
    try:
        with Checkpoints(whole[0], CONFIG, write=False) as checkpoints:
            assert checkpoints.steps == [18, 20] and checkpoints.facts(18).step == 18
            messages = checkpoints.damaged()
            for message in messages:
                assert message.startswith(f"checkpoint 20 of {whole[0]} is damaged (")
                assert message.endswith("--resume-step 18, or --checkpoint 18 to evaluate, predict or export")
            if bit is None and file[0] != "_CHECKPOINT_METADATA":
                assert len(messages) == 1
    finally:
        place.write_bytes(before)


def test_a_checkpoint_of_one_device_resumes_on_four(whole, tmp_path):
    _, events, state = whole
    before, _ = started(tmp_path, trainer(), 9)
    after, end = resumed(tmp_path, trainer(FOUR))
    assert end.params["head"]["kernel"].sharding.shard_shape((32, 4)) == (8, 4)
    for a, b in zip(before + after, events, strict=True):
        assert [value is None for value in a] == [value is None for value in b]
        np.testing.assert_allclose(*([value for value in each if value is not None] for each in (a, b)), rtol=0, atol=1e-5)
    # AdamW divides by the root of tiny second moments, which enlarges the last bits' differences
    chex.assert_trees_all_close(end.params, state.params, rtol=0, atol=1e-4)


def test_a_checkpoint_of_another_model(whole):
    training = trainer(width=12)
    with Checkpoints(whole[0], CONFIG, write=False) as checkpoints, pytest.raises(ValueError) as caught:
        checkpoints.restore(abstract(training, 12), ONE, 20)
    message = str(caught.value)
    assert "checkpoint 20 of" in message and "is not of this model and recipe" in message
    assert "(- is what the model wants, + is what was found)" in message
    assert "- params.second.kernel float32[12, 12]\n  + params.second.kernel float32[32, 32]" in message
    plain = trainer(recipe=dataclasses.replace(RECIPE, ema=0.0))
    with (
        Checkpoints(whole[0], CONFIG, write=False) as checkpoints,
        pytest.raises(ValueError, match=r"unexpected\n  \+ ema\.head\.bias"),
    ):
        checkpoints.restore(abstract(plain), ONE, 20)


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_with_an_older_one(copied):
    # random numbers are stored as they are, so that nothing but their fingerprints tells
    files = (copied / FOLDER / "20" / "state" / "ocdbt.process_0" / "d").iterdir()
    flip_a_byte(max(files, key=lambda file: file.stat().st_size))
    message = r"checkpoint 20 of .* is damaged \(its contents changed at .*--resume-step 18"
    with pytest.raises(ValueError, match=message):
        resumed(copied, trainer())
    events, state = resumed(copied, trainer(), 18)
    assert [event.number for event in events if isinstance(event, Step)] == [19, 20]
    with Checkpoints(copied, CONFIG, write=False) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(abstract(trainer()), ONE, 20)[0], state)


def test_a_checkpoint_that_lacks_a_file(copied):
    (copied / FOLDER / "20" / "facts" / "metadata").unlink()
    with pytest.raises(ValueError, match=r"checkpoint 20 of .* is damaged"):
        resumed(copied, trainer())


def test_frozen_parameters_that_changed(copied):
    flip_a_byte(copied / FROZEN)
    with pytest.raises(ValueError, match=r"checkpoint 20 of .* is damaged \(its contents changed at frozen\.first\.kernel"):
        resumed(copied, trainer())
    (copied / FROZEN).unlink()
    with pytest.raises(ValueError, match=r"the frozen parameters of .* cannot be read"):
        resumed(copied, trainer())


def test_a_step_without_a_checkpoint(whole):
    with (
        Checkpoints(whole[0], CONFIG, write=False) as checkpoints,
        pytest.raises(ValueError, match="has no checkpoint of step 4"),
    ):
        checkpoints.restore(abstract(trainer()), ONE, 4)


# orbax leaves the errors of the files behind the first one to be collected
unread_errors = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def keeps_the_one_before(run, fill):
    """Saves one checkpoint, then fails to save another, and goes on from the first."""
    training = trainer()
    _, state = started(run, training, 5)
    with Checkpoints(run, CONFIG) as checkpoints:
        later = state._replace(step=state.step + 1, params=jax.tree.map(jnp.array, state.params))
        with fill():
            with pytest.raises(OSError, match=r"cannot save .*; the checkpoints before it are as they were"):
                checkpoints.save(later)
                checkpoints.wait()
            # orbax tells of the first file that it cannot write while another thread goes on with the others
            for thread in threading.enumerate():
                if thread.name == "async_save":
                    thread.join()
    gc.collect()  # writes that were never awaited warn here, and not in a later test
    assert last_step(run) == 5
    events, _ = resumed(run, training)
    assert [event.number for event in events if isinstance(event, Step)] == list(range(6, 21))


@unread_errors
def test_a_full_disk(tmp_path):
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("mounting a small disk needs root")

    class Full:
        def __enter__(self):
            self.file = (tmp_path / "filling").open("wb", buffering=0)
            with pytest.raises(OSError, match="No space left"):
                while self.file.write(b"x" * 4096):
                    pass

        def __exit__(self, *_):
            self.file.close()
            (tmp_path / "filling").unlink()

    try:
        keeps_the_one_before(tmp_path, Full)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
