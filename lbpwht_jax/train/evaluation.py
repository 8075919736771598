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
    """What an evaluation found: accuracy in [0, 1], mean loss, how many images were read, why others were not, by name."""

    accuracy: float
    loss: float
    images: int
    skipped: Mapping[str, str]


def loading(info: ModelInfo, image_size: int, batch_size: int, seed: int = 0, workers: int | None = None) -> Loading:
    """How this process loads its share of the images for a model.

    Args:
      info: of the model.
      image_size: height and width of the images, in pixels.
      batch_size: over all processes.
      seed: of the order of training images.
      workers: threads; by default as many as there are cores, up to 16.

    Raises:
      ValueError: if a number is out of range, or the processes cannot share a batch equally.
    """
    fields = {} if workers is None else {"workers": workers}
    process = {"shard_index": jax.process_index(), "shard_count": jax.process_count()}
    return Loading(batch_size, image_size, info.images.channels, seed, **fields, **process)


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
        return jax.jit(make_eval_step(self.model, self.info), out_shardings=self.placement.everywhere)

    def __call__(self, variables: Any, split: Split) -> Evaluation:
        """Accuracy and mean loss over a split; images that cannot be read count nowhere.

        Args:
          variables: of the model, on the devices.
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
