"""How to train: the numbers, and the optimiser they make."""

import dataclasses
from typing import Annotated

import optax
import pydantic.dataclasses
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lbpwht_jax.data import Augmentation
from lbpwht_jax.data.validation import STRICT

_BelowOne = Annotated[float, Field(ge=0, lt=1)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Recipe:
    """How to train; the defaults are the paper's, but for learning rate and warm-up.

    Attributes:
      epochs: passes over the training images.
      batch_size: images per step, over all devices and processes.
      lr: AdamW's peak learning rate.
      weight_decay: AdamW's weight decay.
      clip: the global norm that gradients are clipped to; 0 for no clipping.
      warmup_steps: steps over which the rate rises linearly from a thousandth of ``lr``; at most a fifth of all steps.
      min_ratio: the last learning rate of the cosine, as a fraction of ``lr``.
      label_smoothing: the probability spread evenly over all classes.
      drop_path: the probability of dropping the last block's residual branches; it rises linearly from 0 at the first block.
      ema: decay per step of the moving average of the trained parameters, which is then what is evaluated and kept; 0 for none.
      accumulate: how many equal parts a batch is cut into, computed one after the other; a step takes their mean gradient.
      augmentation: how training images are changed.
      seed: decides data split, new head, shuffling, augmentation and drop path.

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

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """What makes a training loss another than the plain cross-entropy of an evaluation, in words."""
        smoothing = (f"label smoothing of {self.label_smoothing:g}",) * (self.label_smoothing > 0)
        mixing = (name for name in ("mixup", "cutmix") if getattr(self.augmentation, name) > 0)
        return (*smoothing, *mixing)

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate by step, from 0: linear warm-up, then a cosine.

        Args:
          steps: number of steps of the whole training.
        """
        warmup = min(self.warmup_steps, steps // 5)
        return optax.warmup_cosine_decay_schedule(self.lr / 1000, self.lr, warmup, max(steps, 1), self.lr * self.min_ratio)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Clips gradients, then applies AdamW with linear warm-up and a cosine.

        Args:
          steps: number of steps of the whole training.
        """
        adamw = optax.adamw(self.schedule(steps), weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw) if self.clip else adamw
