"""Evaluation, every image counted once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lbpwht_jax.data import Loading, Split, evaluation_batches
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.train.placement import Placement
from lbpwht_jax.train.step import make_eval_step


class Evaluation(NamedTuple):
    """An evaluation's result: accuracy in [0, 1], mean loss, number of images read, and why others were not, by name."""

    accuracy: float
    loss: float
    images: int
    skipped: Mapping[str, str]


def loading(info: ModelInfo, image_size: int, batch_size: int, seed: int = 0, workers: int | None = None) -> Loading:
    """How this process loads its share of the images for a model.

    Args:
      info: the model's description.
      image_size: height and width of the images, in pixels.
      batch_size: images per step, in all processes together.
      seed: seed of the order of the training images.
      workers: loading threads; by default as many as there are cores, up to 16.

    Raises:
      ValueError: if a number is out of range, or the processes cannot share a batch equally.
    """
    fields: dict[str, Any] = {} if workers is None else {"workers": workers}
    fields |= {"shard_index": jax.process_index(), "shard_count": jax.process_count()}
    return Loading(batch_size, image_size, info.images.channels, seed, **fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates a model.

    Attributes:
      model: called as ``model.apply(variables, images)``.
      info: how its images are normalised, cropped and resized.
      loading: how they are loaded.
      placement: where the arrays live.
    """

    model: Any
    info: ModelInfo
    loading: Loading
    placement: Placement

    @functools.cached_property
    def _step(self) -> Callable:
        return jax.jit(make_eval_step(self.model, self.info), out_shardings=self.placement.replicated)

    def __call__(self, variables: Any, split: Split) -> Evaluation:
        """Accuracy and mean loss over a split; images that cannot be read are not counted.

        Args:
          variables: the model's variables, on the devices.
          split: the images.

        Raises:
          ValueError: if no image can be read.
        """
        sums, waiting = np.zeros(3), None
        with evaluation_batches(split, self.loading, self.info.images.crop, self.info.images.interpolation) as batches:
            for batch in batches:
                started = self._step(variables, self.placement.put_batch(batch))
                if waiting is not None:
                    sums += jax.device_get(waiting)
                waiting = started
            sums += jax.device_get(waiting)
            correct, loss, images = sums.tolist()
            return Evaluation(correct / images, loss / images, int(images), dict(batches.skipped))
