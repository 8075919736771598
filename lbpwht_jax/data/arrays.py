"""Images for training: the digits that come with scikit-learn."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Labelled images in memory.

    Attributes:
      images: uint8, ``[count, height, width, channels]``.
      labels: int32, ``[count]``.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its two splits and the names of its classes."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]


def digits(image_size: int, seed: int = 0) -> Dataset:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8, enlarged (bicubic); every fifth image, stratified, is for testing.

    Args:
      image_size: height and width of the images, in pixels.
      seed: of the split.

    Returns:
      A ``Dataset`` of one-channel images and ten classes.
    """
    pixels, targets = load_digits(return_X_y=True)
    small = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BICUBIC) for image in small]
    images, labels = np.stack([np.asarray(image) for image in large])[..., None], np.asarray(targets, np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return Dataset("digits", Split(images[train], labels[train]), Split(images[test], labels[test]), tuple("0123456789"))


def training_batches(split: Split, batch_size: int, seed: int, epoch: int) -> Iterator[Split]:
    """One epoch of shuffled whole batches; the images left over at its end differ from epoch to epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(len(split))
    for start in range(0, len(split) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield Split(split.images[chosen], split.labels[chosen])


def evaluation_batches(split: Split, batch_size: int) -> Iterator[tuple[Split, np.ndarray]]:
    """Every image once, in order, the last batch filled up with copies; with each batch a mask, false at the copies."""
    for start in range(0, len(split), batch_size):
        chosen = np.arange(start, start + batch_size)
        real = chosen < len(split)
        chosen = np.where(real, chosen, 0)
        yield Split(split.images[chosen], split.labels[chosen]), real
