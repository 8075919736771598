import numpy as np

from lbpwht_jax.data.arrays import Split, digits, evaluation_batches, training_batches


def indexed(count):
    return Split(np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1), np.arange(count, dtype=np.int32))


def test_digits_are_split_stratified_and_by_seed():
    first, again, other = digits(28, seed=1), digits(28, seed=1), digits(28, seed=2)
    assert first.train.images.shape == (1437, 28, 28, 1) and first.test.images.shape == (360, 28, 28, 1)
    assert first.train.images.dtype == np.uint8 and first.train.labels.dtype == np.int32
    assert first.classes == tuple("0123456789")
    np.testing.assert_array_equal(first.train.labels, again.train.labels)
    assert (first.train.labels != other.train.labels).any()
    counts = np.bincount(first.test.labels)
    assert counts.min() >= 34 and counts.max() <= 38
    # bright strokes on a dark ground, over the whole range
    assert first.train.images.min() == 0 and first.train.images.max() == 255


def test_training_batches_are_whole_shuffled_and_repeatable():
    epoch = [batch.labels for batch in training_batches(indexed(10), 4, seed=0, epoch=1)]
    assert [len(labels) for labels in epoch] == [4, 4]
    assert len(set(np.concatenate(epoch))) == 8
    again = [batch.labels for batch in training_batches(indexed(10), 4, seed=0, epoch=1)]
    np.testing.assert_array_equal(epoch, again)
    for seed, number in ((0, 2), (1, 1)):
        assert (
            np.concatenate([b.labels for b in training_batches(indexed(10), 4, seed, number)]) != np.concatenate(epoch)
        ).any()


def test_batches_keep_images_with_their_labels():
    for batch in training_batches(indexed(10), 4, seed=3, epoch=1):
        np.testing.assert_array_equal(batch.images.ravel(), batch.labels)


def test_evaluation_sees_every_image_once():
    seen = []
    for batch, real in evaluation_batches(indexed(10), 4):
        assert len(batch.labels) == len(real) == 4
        np.testing.assert_array_equal(batch.images.ravel(), batch.labels)
        seen.extend(batch.labels[real])
    assert seen == list(range(10))
