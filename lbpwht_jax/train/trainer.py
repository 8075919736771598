"""The training loop."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lbpwht_jax.data import Dataset, Loading, steps_per_epoch, training_batches
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.train.evaluation import Evaluator, loading
from lbpwht_jax.train.placement import Placement
from lbpwht_jax.train.recipe import Recipe
from lbpwht_jax.train.state import TrainState, everything, initial_state, not_finite
from lbpwht_jax.train.step import Metrics, make_train_step, placed_step


class Step(NamedTuple):
    """What one training step reports.

    Attributes:
      number: from 1.
      loss: mean over the batch, with smoothed labels.
      accuracy: accuracy on the batch, in [0, 1].
      gradient_norm: global norm of the gradients before clipping.
      seconds: time since the step before was done, or since its own start if something else, such as compiling, was done in
        between.
    """

    number: int
    loss: float
    accuracy: float
    gradient_norm: float
    seconds: float


class Epoch(NamedTuple):
    """What an epoch reports: measured on the validation images or, where there are none, on the test images.

    Attributes:
      number: from 1.
      step: its last step.
      test_accuracy, test_loss: in [0, 1], and the mean; ``None`` where there are validation images.
      validation_accuracy, validation_loss: alike; ``None`` where there are no validation images.
    """

    number: int
    step: int
    test_accuracy: float | None = None
    test_loss: float | None = None
    validation_accuracy: float | None = None
    validation_loss: float | None = None

    @property
    def measured(self) -> dict[str, float]:
        """Accuracy and loss by name, those that were measured."""
        names = ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def accuracy(self) -> float:
        """The accuracy that was measured, in [0, 1]."""
        return next(value for name, value in self.measured.items() if name.endswith("accuracy"))

    @property
    def loss(self) -> float:
        """The mean loss that was measured, without label smoothing."""
        return next(value for name, value in self.measured.items() if name.endswith("loss"))


class Snapshot(NamedTuple):
    """The state when it is to be saved; the next step reuses its memory.

    Attributes:
      state: the state after the last step done.
      epoch: the epoch that ended with that step, if one did.
      skipped: the images that could not be read so far, by name, each with the reason.
    """

    state: TrainState
    epoch: Epoch | None
    skipped: Mapping[str, str]


class Diverged(FloatingPointError):
    """A loss, a gradient or an updated parameter that is not finite.

    Attributes:
      state: the last good state, with ``diverged`` cleared.
    """

    def __init__(self, message: str, state: TrainState):
        super().__init__(message)
        self.state = state


def never(step: int) -> bool:
    """Never stops."""
    return False


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """Trains and evaluates one model on one data set.

    Attributes:
      model: called as ``model.apply(variables, images, train=...)``: a Linen module, or an adapted one.
      info: how its images are normalised, cropped and resized.
      dataset: to train on, and to evaluate on after every epoch: on its validation images or, without any, on its test images.
      recipe: how to train.
      image_size: height and width of the images the model takes, in pixels.
      trainable: tells whether the parameter at a path is trained, such as ``AdaptedModule.trainable``.
      placement: where the arrays live.
      workers: threads that load images; by default as many as there are cores, up to 16.

    Raises:
      ValueError: if there are fewer training images than one batch, or the devices cannot share a batch equally; if there is
        one class alone, or a label that is no index of a class; if an image size or a number of workers is not positive.
    """

    model: Any
    info: ModelInfo
    dataset: Dataset
    recipe: Recipe
    image_size: int
    trainable: Callable[[str], bool] = everything
    placement: Placement = dataclasses.field(default_factory=Placement)
    workers: int | None = None

    def __post_init__(self):
        self.placement.check(self.recipe.batch_size, self.recipe.accumulate)
        steps_per_epoch(self.dataset, self.recipe.batch_size)
        self._load(None)
        if self.recipe.patience and self.dataset.validation is None:
            raise ValueError(
                f"patience {self.recipe.patience} needs validation images to choose by, and {self.dataset.name} has none; hold "
                "some out with --validation 0.1"
            )
        classes = len(self.dataset.classes)
        if classes < 2:
            raise ValueError(f"{self.dataset.name} has {classes} class alone, which leaves nothing to learn; two are needed")
        for part in ("train", "validation", "test"):
            labels = getattr(getattr(self.dataset, part), "labels", None)
            if labels is not None:
                check_labels(np.asarray(labels), classes, f"the {part} images of {self.dataset.name}")
        if self.recipe.class_weights == "balanced":
            _ = self._class_weights

    @property
    def steps_per_epoch(self) -> int:
        """How many whole batches the training images make."""
        return steps_per_epoch(self.dataset, self.recipe.batch_size)

    @property
    def steps(self) -> int:
        """How many steps the whole training has."""
        return self.recipe.epochs * self.steps_per_epoch

    @functools.cached_property
    def _class_weights(self) -> np.ndarray:
        """Float32 ``[classes]``: in inverse proportion to the training images of each class, 1 on average over the images."""
        labels = getattr(self.dataset.train, "labels", None)
        if labels is None:
            raise ValueError(f"balanced class weights need the labels of {self.dataset.name} without reading its images")
        counts = np.bincount(np.asarray(labels), minlength=len(self.dataset.classes))
        return (len(labels) / (np.maximum(counts, 1) * np.count_nonzero(counts))).astype(np.float32)

    @functools.cached_property
    def _optimizer(self) -> Any:
        return self.recipe.optimizer(self.steps)

    def initial_state(self, variables: Any) -> TrainState:
        """The state before the first step, on the devices; the variables given are copied.

        Raises:
          ValueError: if nothing is trained, or what is trained is not finite: steps look at little of what they update.
        """
        state = initial_state(variables, self._optimizer, self.trainable, ema=self.recipe.ema > 0)
        if wrong := not_finite(state.params):
            raise ValueError(
                f"training cannot start from numbers that are not finite, in {len(wrong)} arrays such as {wrong[0]}; use other "
                "weights"
            )
        return self.placement.put(state, self.placement.of_state(state))

    @functools.cached_property
    def train_step(self) -> Any:
        """The compiled ``step(state, batch) -> (state, metrics)``, which reuses the memory of the state it is given."""
        recipe, classes = self.recipe, len(self.dataset.classes)
        weights = self._class_weights if recipe.class_weights == "balanced" else None
        size = self.image_size
        step = make_train_step(self.model, self.info, self._optimizer, recipe, size, classes, class_weights=weights)
        return placed_step(step, self.placement)

    @functools.cached_property
    def loading(self) -> Loading:
        """How this process loads its share of the images; crops on the device are cut from images of 1.5 times the size."""
        augmentation = self.recipe.augmentation
        if augmentation.crop_from == "image":
            return dataclasses.replace(self._load(None), crop_scale=augmentation.crop_scale)
        return self._load(None if augmentation.crop_scale is None else round(1.5 * self.image_size))

    def _load(self, canvas: int | None) -> Loading:
        share = loading(self.info, self.image_size, self.recipe.batch_size, self.recipe.seed, self.workers)
        return dataclasses.replace(share, canvas=canvas)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """What evaluates the model after each epoch."""
        return Evaluator(self.model, self.info, self.loading, self.placement)

    def fit(
        self, state: TrainState, save_every: int = 0, stop: Callable[[int], bool] = never
    ) -> Iterator[Step | Epoch | Snapshot]:
        """Trains to the end of the last epoch.

        The host starts each step before it reads the metrics of the step before, so that neither waits for the other.

        Args:
          state: the state to go on from, after any number of steps; its memory is reused.
          save_every: steps between snapshots, in addition to one at the end of each epoch; 0 for no others.
          stop: called with each step's number once the step has started; if it returns true, training stops after that step,
            or after the evaluation if the step ends an epoch.

        Yields:
          A ``Step`` per step, an ``Epoch`` per epoch, and after them a ``Snapshot`` wherever the state is to be saved, which
          is also the last item.

        Raises:
          Diverged: if a loss, a gradient or an updated parameter is not finite; the message names the step.
          ValueError: if training images cannot be read, or a label is no index of a class.
        """
        number, classes = int(jax.device_get(state.step)), len(self.dataset.classes)
        with training_batches(self.dataset, self.loading, number) as batches:
            pending: Metrics | None = None
            compiled, mark = False, time.perf_counter()
            while number < self.steps:
                batch = next(batches)
                check_labels(batch.labels, classes, f"the training images of {self.dataset.name}")
                placed = self.placement.put_batch(batch)
                if not compiled:  # apart from the steps, so that no step's time contains it
                    self.train_step.lower(state, placed).compile()
                    compiled, mark = True, time.perf_counter()
                state, metrics = self.train_step(state, placed)
                number += 1
                if pending is not None:
                    mark, step = self._report(state, number - 1, pending, mark)
                    yield step
                pending = metrics
                stopping, ends = stop(number), number % self.steps_per_epoch == 0
                if not (stopping or ends or (save_every and number % save_every == 0)):
                    continue
                mark, step = self._report(state, number, metrics, mark)
                yield step
                pending, epoch, skipped = None, None, dict(batches.skipped)
                if ends:
                    split = self.dataset.validation or self.dataset.test
                    found = self.evaluator(state.averaged, split)
                    measured = (found.accuracy, found.loss)
                    measured = measured if split is self.dataset.test else (None, None, *measured)
                    epoch = Epoch(number // self.steps_per_epoch, number, *measured)
                    skipped |= found.skipped
                    yield epoch
                yield Snapshot(state, epoch, skipped)
                if stopping:
                    return
                mark = time.perf_counter()

    def _report(self, state: TrainState, number: int, metrics: Metrics, mark: float) -> tuple[float, Step]:
        loss, accuracy, norm, finite = (value.item() for value in jax.device_get(metrics))
        now = time.perf_counter()
        if not (finite and math.isfinite(loss) and math.isfinite(norm)):
            what = "the updated parameters are not finite"
            if not math.isfinite(norm):
                what = f"the gradients' norm is {norm}"
            if not math.isfinite(loss):
                what = f"the loss is {loss}"
            last = state._replace(diverged=self.placement.put(False, self.placement.replicated))
            raise Diverged(f"{what} at step {number}; lower the learning rate", last)
        return now, Step(number, loss, accuracy, norm, now - mark)


def check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    """Checks that every label is the index of a class.

    Raises:
      ValueError: if one is not.
    """
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise ValueError(
            f"{where} have the label {wrong[0]}; labels must be from 0 to {classes - 1}, indices of {classes} classes"
        )
