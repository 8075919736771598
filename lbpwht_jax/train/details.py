"""A closer evaluation: which classes are taken for which."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbpwht_jax.data import Split, evaluation_batches
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.train.evaluation import Evaluation, Evaluator
from lbpwht_jax.train.step import normalise

TOP = 5


class Details(NamedTuple):
    """What a model makes of a split's images.

    Attributes:
      evaluation: accuracy, mean loss, number of images, those that could not be read.
      top5_accuracy: how often the true class is among the five most probable ones, in [0, 1]; ``None`` for five or fewer
        classes.
      confusion: int64 ``[classes, classes]``: how many images of each class (rows) were taken for each (columns).
    """

    evaluation: Evaluation
    top5_accuracy: float | None
    confusion: np.ndarray

    @property
    def class_accuracies(self) -> list[float | None]:
        """Accuracy by class, in [0, 1]; ``None`` for a class without images."""
        totals = self.confusion.sum(1)
        return [float(self.confusion[i, i] / total) if total else None for i, total in enumerate(totals)]


def detailed(evaluator: Evaluator, variables: Any, split: Split, classes: int) -> Details:
    """Evaluates as ``Evaluator`` does, and counts by class. For one process.

    Args:
      evaluator: the model, and how its images are loaded.
      variables: the model's variables, on the devices.
      split: the images.
      classes: number of the model's outputs.

    Raises:
      ValueError: if no image can be read.
    """
    info, placement = evaluator.info, evaluator.placement
    step = jax.jit(functools.partial(_step, evaluator.model, info, min(TOP, classes)), out_shardings=placement.replicated)
    confusion, loss, among = np.zeros((classes, classes), np.int64), 0.0, 0
    with evaluation_batches(split, evaluator.loading, info.images.crop, info.images.interpolation) as batches:
        for batch in batches:
            best, losses = jax.device_get(step(variables, placement.put_batch(batch)))
            labels, best = batch.labels[batch.valid], best[batch.valid]
            np.add.at(confusion, (labels, best[:, 0]), 1)
            loss += float(losses[batch.valid].sum())
            among += int((best == labels[:, None]).sum())
        images = int(confusion.sum())
        found = Evaluation(float(np.trace(confusion) / images), loss / images, images, dict(batches.skipped))
    return Details(found, among / images if classes > TOP else None, confusion)


def _step(model: Any, info: ModelInfo, top: int, variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The most probable classes, int32 ``[batch, top]``, the first one first, and the losses, ``[batch]``."""
    logits = jnp.asarray(model.apply(variables, normalise(batch.images.astype(jnp.float32) / 255, info)), jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jax.lax.top_k(logits, top)[1], losses
