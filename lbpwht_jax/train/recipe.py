"""How to train: the numbers, and the optimiser they make."""

import dataclasses
from typing import Annotated, Literal

import optax
import pydantic.dataclasses
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lbpwht_jax.data import Augmentation
from lbpwht_jax.data.validation import STRICT
from lbpwht_jax.train.depth import scale_by_depth

Algorithm = Literal["adamw", "lion", "sgd", "adafactor"]
ClassWeights = Literal["none", "balanced"]
_BelowOne = Annotated[float, Field(ge=0, lt=1)]

_MOMENTUM = 0.9
_LARGEST_BOUNDED = 1e6  # a learning rate with which 2 ** 31 of the longest steps stay within float32


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Recipe:
    """How to train; the defaults are the paper's, but for learning rate and warm-up.

    Attributes:
      epochs: passes over the training images.
      batch_size: images per step, over all devices and processes.
      lr: the algorithm's peak learning rate.
      weight_decay: the share of its value, times the learning rate, that a parameter loses in each step.
      clip: the global norm that gradients are clipped to; 0 for no clipping.
      warmup_steps: steps over which the rate rises linearly from a thousandth of ``lr``; at most a fifth of all steps.
      min_ratio: the last learning rate of the cosine, as a fraction of ``lr``.
      label_smoothing: the probability spread evenly over all classes.
      drop_path: the probability of dropping the last block's residual branches; it rises linearly from 0 at the first block.
      ema: decay per step of the moving average of the trained parameters, which is then what is evaluated and kept; 0 for none.
      accumulate: how many equal parts a batch is cut into, computed one after the other; a step takes their mean gradient.
      augmentation: how training images are changed.
      seed: decides data split, new head, shuffling, augmentation and drop path.
      algorithm: what turns gradients into updates, Optax's: ``"adamw"``, ``"lion"``, ``"sgd"`` (with a momentum of 0.9) or
        ``"adafactor"``.
      layer_decay: each block's learning rate over that of the block above it; the head and the last norms have the whole one.
      patience: how many epochs in a row may not beat the best validation accuracy before training stops; 0 for any number.
      class_weights: ``"none"``, or ``"balanced"``: an image counts in the loss in inverse proportion to how many training
        images its class has, 1 on average.

    Raises:
      pydantic.ValidationError: (a ValueError) if a value has the wrong type or is out of range.
    """

    epochs: PositiveInt
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 5e-4
    weight_decay: NonNegativeFloat = 1e-5
    clip: NonNegativeFloat = 5.0
    warmup_steps: NonNegativeInt = 100
    min_ratio: _BelowOne = 0.01
    label_smoothing: _BelowOne = 0.1
    drop_path: _BelowOne = 0.0
    ema: _BelowOne = 0.0
    accumulate: PositiveInt = 1
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    algorithm: Algorithm = "adamw"
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    patience: NonNegativeInt = 0
    class_weights: ClassWeights = "none"

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """What makes a training loss another than the plain cross-entropy of an evaluation, in words."""
        smoothing = (f"label smoothing of {self.label_smoothing:g}",) * (self.label_smoothing > 0)
        mixing = (name for name in ("mixup", "cutmix") if getattr(self.augmentation, name) > 0)
        return (*smoothing, *mixing, *("balanced class weights",) * (self.class_weights == "balanced"))

    @property
    def bounded(self) -> bool:
        """Whether gradients with a finite norm leave float32 parameters and the optimiser's state finite, if they were so.

        A finite norm makes the gradients' squares finite, and with them the moving averages of both, and the momentum, at most
        10 times the largest gradient. For a learning rate of 1 AdamW changes a parameter by at most
        ``(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) = 7.3`` (by the Cauchy-Schwarz inequality), Lion by 1, and momentum by at
        most ``2e20``; and a decay of no more than the whole parameter does not make it larger. Adafactor's steps grow with the
        parameters, and nothing is promised for it.
        """
        return self.algorithm != "adafactor" and self.lr <= _LARGEST_BOUNDED and self.lr * self.weight_decay <= 1

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate by step, from 0: linear warm-up, then a cosine.

        Args:
          steps: number of steps of the whole training.
        """
        warmup = min(self.warmup_steps, steps // 5)
        return optax.warmup_cosine_decay_schedule(self.lr / 1000, self.lr, warmup, max(steps, 1), self.lr * self.min_ratio)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Clips gradients, then applies the algorithm with linear warm-up and a cosine.

        Args:
          steps: number of steps of the whole training.
        """
        rate, decay = self.schedule(steps), self.weight_decay
        match self.algorithm:
            case "adamw":
                parts = [optax.adamw(rate, weight_decay=decay)]
            case "lion":
                parts = [optax.lion(rate, weight_decay=decay)]
            case "sgd":
                parts = [optax.trace(_MOMENTUM), optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)]
            case "adafactor":  # which decays weights without regard to the learning rate, and returns descending updates
                last = optax.scale_by_learning_rate(rate, flip_sign=False)
                parts = [optax.adafactor(None), optax.add_decayed_weights(-decay), last]
        clipping = [optax.clip_by_global_norm(self.clip)] * bool(self.clip)
        decaying = [scale_by_depth(self.layer_decay)] * (self.layer_decay < 1)
        parts = [*clipping, *parts, *decaying]
        return optax.chain(*parts) if len(parts) > 1 else parts[0]
