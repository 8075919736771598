"""Training step by step, for the transfer sweep."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from lbpwht_jax.data import Augmentation, Dataset, training_batches
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.train import Recipe, Trainer, TrainState, everything

AUGMENTATION = Augmentation(flip=True, shift=4)


def make_trainer(
    model: Any, info: ModelInfo, dataset: Dataset, recipe: Recipe, trainable: Callable[[str], bool] = everything
) -> Trainer:
    """The library's trainer, at the model's image size."""
    return Trainer(model, info, dataset, recipe, info.images.size, trainable)


def train(trainer: Trainer, variables: Any) -> Iterator[tuple[int, float, TrainState]]:
    """Trains to the end of the last epoch, without evaluations in between.

    Yields:
      After every step its number from 1, the loss, and the state, which the next step donates.

    Raises:
      FloatingPointError: when the loss is no longer finite, naming the step.
    """
    state = trainer.initial_state(variables)
    with training_batches(trainer.dataset, trainer.loading) as batches:
        for number in range(1, trainer.steps + 1):
            state, metrics = trainer.train_step(state, trainer.placement.put_batch(next(batches)))
            loss = float(metrics.loss)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {number}; lower the learning rate")
            yield number, loss, state
