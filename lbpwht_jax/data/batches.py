"""Batches of a data set, sampled, decoded and stacked by grain. They do not depend on the number of threads or processes."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from PIL import Image

from lbpwht_jax.data.crops import Draws
from lbpwht_jax.data.decode import UnreadableImage, cut_out, decode, resize_and_crop, squash
from lbpwht_jax.data.split import Dataset, Split

PATIENCE = 100


class Batch(NamedTuple):
    """One process's share of a batch, on the host.

    Attributes:
      images: uint8, ``[batch, size, size, channels]``; ``size`` is the canvas in training and the image size in evaluation.
      labels: int32, ``[batch]``.
      valid: bool, ``[batch]``; false for rows of an evaluation without an image, or with one that cannot be read. Such rows
        are not counted.
      aspect: float32, ``[batch]``: width over height of the original image.
    """

    images: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    aspect: np.ndarray


@dataclasses.dataclass(frozen=True)
class Loading:
    """How images are loaded.

    Attributes:
      batch_size: images per batch, over all processes.
      image_size: height and width of the images, in pixels.
      channels: 1 for greyscale, 3 for RGB.
      seed: determines the order of the training images.
      workers: number of threads that read and decode; it does not change what is loaded.
      shard_index: number of this process, counted from 0.
      shard_count: number of processes.
      canvas: height and width to which training images are squashed, in pixels; ``image_size`` by default. A larger canvas
        keeps the detail that a random crop enlarges.
      crop_scale: least and largest area of a random resized crop that is cut out of the whole training image as it was decoded,
        in place of squashing it, as in ``Augmentation``; ``None`` for no crop here.

    Raises:
      ValueError: if a number is out of range, or the batch cannot be shared equally.
    """

    batch_size: int
    image_size: int
    channels: int
    seed: int = 0
    workers: int = dataclasses.field(default_factory=lambda: min(os.cpu_count() or 1, 16))
    shard_index: int = 0
    shard_count: int = 1
    canvas: int | None = None
    crop_scale: tuple[float, float] | None = None

    def __post_init__(self):
        for name in ("batch_size", "image_size", "workers", "shard_count", "canvas"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Loading: {name} must be positive, got {getattr(self, name)}")
        if self.channels not in (1, 3):
            raise ValueError(f"Loading: channels must be 1 or 3, got {self.channels}")
        if not 0 <= self.shard_index < self.shard_count:
            raise ValueError(f"Loading: shard_index must be in [0, {self.shard_count}), got {self.shard_index}")
        if self.batch_size % self.shard_count:
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be shared equally by {self.shard_count} processes; "
                f"make it a multiple of {self.shard_count}"
            )

    @property
    def shard(self) -> slice:
        """The rows of a batch that belong to this process."""
        rows = self.batch_size // self.shard_count
        return slice(self.shard_index * rows, (self.shard_index + 1) * rows)


class Batches(Iterator[Batch]):
    """An iterator over batches, and a context manager that ends its threads.

    Attributes:
      skipped: for each image that could not be read so far, by its name in the split, the reason.
    """

    def __init__(self, batches: grain.MapDataset, workers: int):
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1)
        self._batches = iter(batches.to_iter_dataset(options))
        self._any = False
        self.skipped: dict[str, str] = {}

    def __next__(self) -> Batch:
        try:
            loaded = next(self._batches)
        except StopIteration:
            if self.skipped and not self._any:
                name, reason = next(iter(self.skipped.items()))
                raise ValueError(f"none of the images can be read; the first, {name}: {reason}") from None
            raise
        self.skipped.update(loaded.skipped)
        self._any |= bool(loaded.batch.valid.any())
        return loaded.batch

    def close(self) -> None:
        """Ends the threads; there are no batches afterwards."""
        self._batches.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """The number of whole batches in the training images.

    Raises:
      ValueError: if there are fewer images than one batch takes.
    """
    if batch_size > len(dataset.train):
        raise ValueError(f"batch size {batch_size} is larger than the {len(dataset.train)} training images; lower it")
    return len(dataset.train) // batch_size


def training_batches(dataset: Dataset, loading: Loading, start_step: int = 0) -> Batches:
    """Makes an endless iterator over shuffled training batches.

    The batch of a step depends on the seed and the step alone. Each epoch is another permutation of the images; each of its
    whole batches is a step, and the images left over are not seen in that epoch. An image that cannot be read is replaced by
    the next one in the split that can. Images are squashed to squares, or crops are cut out of them, whose draws depend on the
    seed and the step too; ``aspect`` gives their proportions.

    Args:
      dataset: the data set whose training images are read.
      loading: how they are loaded.
      start_step: the step whose batch comes first, counted from 0.

    Returns:
      The batches. Taking one raises a ValueError if all images, or ``PATIENCE`` in a row, cannot be read.

    Raises:
      ValueError: if there are fewer images than one batch takes.
    """
    steps_per_epoch(dataset, loading.batch_size)
    split, size, scale = dataset.train, loading.canvas or loading.image_size, loading.crop_scale

    def load(indices: np.ndarray, rng: np.random.Generator) -> _Loaded:
        draws = None if scale is None else Draws(rng, len(indices), scale)
        indices = indices[loading.shard]
        loaded, least = _Loaded(len(indices), size, loading.channels), size if draws is None else None
        for row, first in enumerate(indices):

            def shape(image: Image.Image, aspect: float, row: int = row + loading.shard.start) -> np.ndarray:
                return squash(image, size) if draws is None else cut_out(image, draws.box(row, aspect), size)

            tries = range(int(first), int(first) + min(len(split), PATIENCE))
            if not any(loaded.fill(row, split, i % len(split), shape, least) for i in tries):
                name, reason = next(iter(loaded.skipped.items()))
                raise ValueError(f"{len(tries)} training images in a row cannot be read, such as {name}: {reason}")
        return loaded

    order = grain.MapDataset.range(len(split)).seed(loading.seed).shuffle()
    steps = order.batch(loading.batch_size, drop_remainder=True).repeat()
    return Batches(steps.random_map(load, seed=loading.seed)[start_step:], loading.workers)


def evaluation_batches(split: Split, loading: Loading, crop: float, interpolation: str = "bicubic") -> Batches:
    """Makes an iterator over every image of a split, once and in order, resized and cropped as timm does.

    Every process gets the same number of batches; rows without an image, or with one that cannot be read, are not ``valid``.

    Args:
      split: the images.
      loading: how they are loaded; the seed is not used.
      crop: edge of the centre crop over the shorter side of the resized image, in (0, 1].
      interpolation: how images are resized, "bicubic" or "bilinear".

    Returns:
      The batches. After the last one, a ValueError is raised if none of the images could be read.
    """
    size = loading.image_size

    def load(indices: np.ndarray) -> _Loaded:
        loaded = _Loaded(len(indices), size, loading.channels)
        for row, index in enumerate(indices):
            if index < len(split):
                loaded.fill(row, split, int(index), lambda image, _: resize_and_crop(image, size, crop, interpolation))
        return loaded

    places = grain.MapDataset.range(-(-len(split) // loading.batch_size) * loading.batch_size)
    return Batches(places.batch(loading.batch_size).map(lambda indices: load(indices[loading.shard])), loading.workers)


class _Loaded:
    """A batch while it is filled, and the images that could not be read for it."""

    def __init__(self, rows: int, size: int, channels: int):
        images = np.zeros((rows, size, size, channels), np.uint8)
        self.batch = Batch(images, np.zeros(rows, np.int32), np.zeros(rows, bool), np.ones(rows, np.float32))
        self.skipped: dict[str, str] = {}

    def fill(
        self, row: int, split: Split, index: int, shape: Callable[[Image.Image, float], np.ndarray], least: int | None = None
    ) -> bool:
        """Reads an image into a row; ``shape`` gets it, and its width over height. If that fails, keeps the reason."""
        images, labels, valid, aspects = self.batch
        try:
            source, label = split.read(index)
            image, aspect = decode(source, images.shape[-1], least)
        except (OSError, UnreadableImage) as error:
            self.skipped[split.where(index)] = str(error)
            return False
        images[row], labels[row], valid[row], aspects[row] = shape(image, aspect), label, True, aspect
        return True
