"""A data set: splits of labelled images, and the names of the classes."""

import dataclasses
from typing import Protocol

import numpy as np
from PIL import Image


class Split(Protocol):
    """Labelled images, read one by one; several threads may read at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """One image, encoded or open, and its label.

        Raises:
          OSError: if it cannot be read.
        """
        ...

    def where(self, index: int) -> str:
        """The image's name in messages: its file, or its number."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySplit:
    """Labelled images in memory.

    Attributes:
      images: uint8, ``[count, height, width, channels]`` with one or three channels.
      labels: int32, ``[count]``.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One image and its label."""
        pixels = self.images[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), int(self.labels[index])

    def where(self, index: int) -> str:
        """The image's name in messages."""
        return f"image {index}"


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some of a split's images.

    Attributes:
      split: all of them.
      indices: int, ``[count]``: which ones.
    """

    split: Split
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray | None:
        """Their labels, int ``[count]``, if the split knows them without reading images."""
        labels = getattr(self.split, "labels", None)
        return None if labels is None else np.asarray(labels)[self.indices]

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """One image and its label."""
        return self.split.read(int(self.indices[index]))

    def where(self, index: int) -> str:
        """The image's name in messages."""
        return self.split.where(int(self.indices[index]))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set.

    Attributes:
      name: the name given to ``open_dataset``.
      train: images to train on.
      test: images to evaluate on.
      classes: their names; a label is an index into them.
      validation: images to choose the best epoch by; ``None`` if there are none.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    validation: Split | None = None


def hold_out(dataset: Dataset, share: float, seed: int) -> Dataset:
    """Takes a share of each class's training images for validation, one at least where a class has two.

    The share is of all training images where the split does not know their labels without reading them.

    Args:
      dataset: the data set.
      share: in (0, 1).
      seed: decides which.

    Raises:
      ValueError: if the data set has validation images of its own, or the share leaves no image on one of the sides.
    """
    if dataset.validation is not None:
        raise ValueError(f"{dataset.name} has {len(dataset.validation)} validation images of its own; leave --validation out")
    labels = getattr(dataset.train, "labels", None)
    labels = np.zeros(len(dataset.train), np.int32) if labels is None else np.asarray(labels)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[np.random.default_rng((seed, 1, int(label) % 2**32)).permutation(members)[:count]] = True
    if not held.any():
        raise ValueError(f"--validation {share} of the {len(held)} training images of {dataset.name} is none; no class has two")
    train, validation = (Subset(dataset.train, np.flatnonzero(part)) for part in (~held, held))
    return dataclasses.replace(dataset, train=train, validation=validation)
