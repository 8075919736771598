import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest

from lbpwht_jax.data import (
    ArraySplit,
    Dataset,
    Loading,
    evaluation_batches,
    open_dataset,
    steps_per_epoch,
    training_batches,
)
from lbpwht_jax.data.batches import PATIENCE


def indexed(count):
    """Blank images whose grey is their number, which is their label too."""
    return ArraySplit(
        np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), (count, 3, 6, 1)), np.arange(count)
    )


def ramps(count):
    """Images that brighten to the right, each from its number on."""
    rows = np.arange(count).reshape(-1, 1, 1, 1) + np.linspace(0, 240, 90).reshape(1, 1, -1, 1)
    return ArraySplit(np.broadcast_to(rows, (count, 60, 90, 1)).astype(np.uint8), np.arange(count))


@dataclasses.dataclass(frozen=True, eq=False)
class Damaged(ArraySplit):
    """A split some of whose images cannot be read."""

    broken: frozenset[int] = frozenset()

    def read(self, index):
        if index in self.broken:
            raise OSError("disk on fire")
        return super().read(index)


def damaged(count, broken):
    return Damaged(indexed(count).images, indexed(count).labels, frozenset(broken))


def dataset(train, test=None):
    return Dataset("numbers", train, test or train, tuple(map(str, range(len(train)))))


LOADING = Loading(batch_size=4, image_size=5, channels=1, workers=2)


def take(split, steps, start=0, **changes):
    with training_batches(dataset(split), dataclasses.replace(LOADING, **changes), start) as batches:
        return list(itertools.islice(batches, steps))


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_digits_are_split_stratified_and_by_seed():
    first, again, other = open_dataset("digits", seed=1), open_dataset("digits", seed=1), open_dataset("digits", seed=2)
    assert len(first.train) == 1437 and len(first.test) == 360 and first.classes == tuple("0123456789")
    labels = [np.asarray([d.train.read(i)[1] for i in range(1437)]) for d in (first, again, other)]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()
    loading = Loading(360, 28, 1)
    with evaluation_batches(first.test, loading, crop=1.0) as batches:
        (batch,) = batches
    counts = np.bincount(batch.labels)
    assert counts.min() >= 34 and counts.max() <= 38
    # bright strokes on a dark ground, over the whole range
    assert batch.images.shape == (360, 28, 28, 1) and batch.images.min() == 0 and batch.images.max() == 255


def test_an_epoch_is_a_permutation_without_what_is_left_over():
    epochs = [np.concatenate([b.labels for b in take(indexed(10), 2, start)]) for start in (0, 2, 4)]
    for labels in epochs:
        assert len(set(labels)) == 8
    assert len({tuple(labels) for labels in epochs}) == 3
    # the orders of neighbouring seeds are not each other's, an epoch later
    other = [np.concatenate([b.labels for b in take(indexed(10), 2, start, seed=1)]) for start in (0, 2)]
    assert len({tuple(labels) for labels in (*epochs, *other)}) == 5
    assert steps_per_epoch(dataset(indexed(10)), 4) == 2


def test_batches_keep_images_with_their_labels():
    for batch in take(indexed(10), 5):
        assert [values.dtype for values in batch] == [np.uint8, np.int32, bool, np.float32]
        assert batch.images.shape == (4, 5, 5, 1)
        np.testing.assert_array_equal(batch.images, np.broadcast_to(batch.labels.reshape(4, 1, 1, 1), (4, 5, 5, 1)))
        assert batch.valid.all() and (batch.aspect == 2).all()


CROPS = {"crop_scale": (0.2, 0.9)}


@pytest.mark.parametrize("crops", [{}, CROPS])
def test_a_step_has_its_batch_wherever_one_starts(crops):
    same(take(ramps(10), 9, **crops)[7:], take(ramps(10), 2, start=7, **crops))


@pytest.mark.parametrize(("broken", "crops"), [((), {}), ((3, 4), {}), ((3, 4), CROPS)])
def test_neither_workers_nor_processes_change_the_batches(broken, crops):
    split = Damaged(ramps(11).images, ramps(11).labels, frozenset(broken))
    whole = take(split, 6, workers=1, **crops)
    same(whole, take(split, 6, workers=4, **crops))
    shards = [take(split, 6, shard_index=i, shard_count=2, **crops) for i in range(2)]
    same(whole, [type(a)(*map(np.concatenate, zip(a, b, strict=True))) for a, b in zip(*shards, strict=True)])


@pytest.mark.parametrize(("count", "shards"), [(10, 1), (10, 2), (8, 2), (1, 4)])
def test_an_evaluation_sees_every_image_once(count, shards):
    lengths, seen = set(), []
    for shard in range(shards):
        loading = dataclasses.replace(LOADING, shard_index=shard, shard_count=shards)
        with evaluation_batches(indexed(count), loading, crop=1.0) as batches:
            share = list(batches)
        lengths.add(len(share))
        for batch in share:
            assert len(batch.labels) == 4 // shards
            assert (batch.images[batch.valid] == batch.labels[batch.valid].reshape(-1, 1, 1, 1)).all()
            seen.extend(batch.labels[batch.valid])
    assert sorted(seen) == list(range(count))
    assert lengths == {-(-count // 4)}


def test_crops_are_cut_out_of_the_whole_image():
    """Of stripes a pixel wide a squashed image keeps nothing; a crop of its own pixels keeps them black and white."""
    stripes = np.broadcast_to(255 * (np.arange(400, dtype=np.uint8) % 2).reshape(1, 1, -1, 1), (8, 300, 400, 1))
    split = ArraySplit(stripes, np.arange(8))
    # a hundredth of the area is 30 x 40 pixels, in proportions from 3/4 to 4/3
    batches = {scale: take(split, 2, image_size=35, crop_scale=scale) for scale in ((0.01, 0.01), None)}
    contrast = {scale: np.std([batch.images for batch in found]) for scale, found in batches.items()}
    assert contrast[0.01, 0.01] > 60 > 20 > contrast[None]


def test_each_row_and_epoch_has_crops_of_its_own():
    """The ramp's brightness tells how far to the right a crop was, and its range how wide."""
    ramp = ramps(4).images[:1].repeat(4, 0)
    found = [batch.images for batch in take(ArraySplit(ramp, np.arange(4)), 3, **CROPS)]
    widths = np.ptp(np.concatenate(found).astype(int), axis=(1, 2, 3))
    assert len({image.tobytes() for batch in found for image in batch}) == 12
    # areas from 0.2 to 0.9 in proportions from 3/4 to 4/3, of a ramp over 240 levels, less the half pixel at both edges
    assert widths.min() > 60 and widths.max() < 240


def test_a_single_image():
    (batch,) = take(indexed(1), 1, batch_size=1)
    assert batch.labels.tolist() == [0]


def test_a_larger_canvas_is_for_training_alone():
    assert take(indexed(4), 1, canvas=7)[0].images.shape == (4, 7, 7, 1)
    with evaluation_batches(indexed(4), dataclasses.replace(LOADING, canvas=7), crop=1.0) as batches:
        assert next(batches).images.shape == (4, 5, 5, 1)


def test_what_cannot_be_read_is_replaced_by_the_next_that_can():
    replaced = {3: 5, 4: 5, 9: 0}
    with training_batches(dataset(damaged(10, replaced)), LOADING) as batches:
        got = np.concatenate([next(batches).labels for _ in range(4)])
        assert batches.skipped == dict.fromkeys(("image 3", "image 4", "image 9"), "disk on fire")
    wanted = np.concatenate([batch.labels for batch in take(indexed(10), 4)])
    np.testing.assert_array_equal(got, [replaced.get(label, label) for label in wanted])


def test_what_cannot_be_read_counts_in_no_evaluation():
    with evaluation_batches(damaged(10, (0, 7)), LOADING, crop=1.0) as batches:
        seen = np.concatenate([batch.labels[batch.valid] for batch in batches])
        assert batches.skipped == {"image 0": "disk on fire", "image 7": "disk on fire"}
    np.testing.assert_array_equal(seen, [1, 2, 3, 4, 5, 6, 8, 9])


@pytest.mark.parametrize("count", [10, PATIENCE + 20])
def test_when_nothing_can_be_read(count):
    split = damaged(count, range(count))
    tried = min(count, PATIENCE)
    with pytest.raises(ValueError, match=rf"{tried} training images in a row cannot be read, such as image \d+: disk on fire"):
        take(split, 1)
    with (
        evaluation_batches(split, LOADING, crop=1.0) as batches,
        pytest.raises(ValueError, match="none of the images can be read; the first, image 0: disk on fire"),
    ):
        list(batches)


def test_closing_ends_the_threads():
    def threads():
        return [thread for thread in threading.enumerate() if thread not in before]

    before = threading.enumerate()
    with training_batches(dataset(indexed(10)), LOADING) as batches:
        next(batches)
        assert len(threads()) == 2
    deadline = time.monotonic() + 20
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"workers": 0}, "workers must be positive, got 0"),
        ({"canvas": 0}, "canvas must be positive, got 0"),
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
        ({"shard_count": 2, "shard_index": 2}, r"shard_index must be in \[0, 2\), got 2"),
        ({"shard_count": 3}, "a batch of 4 images cannot be shared equally by 3 processes; make it a multiple of 3"),
    ],
)
def test_loading_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LOADING, **changes)


def test_a_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="batch size 4 is larger than the 3 training images; lower it"):
        training_batches(dataset(indexed(3)), LOADING)
