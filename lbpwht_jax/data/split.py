"""A data set: two splits of labelled images, and the names of the classes."""

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
class Dataset:
    """A data set.

    Attributes:
      name: the name given to ``open_dataset``.
      train: images to train on.
      test: images to evaluate on.
      classes: their names; a label is an index into them.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
