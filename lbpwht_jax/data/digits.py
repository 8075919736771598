"""The data set that needs no file: the digits that come with scikit-learn."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lbpwht_jax.data.split import ArraySplit, Dataset


def open_digits(seed: int) -> Dataset:
    """Opens scikit-learn's 1,797 handwritten digits of 8 x 8 pixels. A fifth of each class is for testing.

    Args:
      seed: determines the split.
    """
    pixels, targets = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = np.asarray(targets, np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    splits = [ArraySplit(images[part], labels[part]) for part in (train, test)]
    return Dataset("digits", splits[0], splits[1], tuple("0123456789"))
