"""How to train: the numbers, and the optimiser they make."""

import dataclasses

import optax

from lbpwht_jax.data import Augmentation


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train; the defaults other than epochs, rate and warm-up are the paper's.

    Attributes:
      epochs: passes over the training images.
      batch_size: images a step, over all devices and processes.
      lr: AdamW's peak learning rate.
      weight_decay: of AdamW.
      clip: global norm that gradients are clipped to; 0 leaves them as they are.
      warmup_steps: steps over which the rate rises linearly from a thousandth of ``lr``; at most a fifth of all steps.
      min_ratio: what the cosine decays to, over ``lr``.
      label_smoothing: probability spread over all classes.
      drop_path: probability of dropping the last block's residual branches, rising linearly to it.
      ema: decay a step of the moving average of the trained parameters, which is then what is evaluated and kept; 0 for none.
      accumulate: equal parts a batch is cut into, one after the other; their gradients' mean makes the step.
      augmentation: how training images are changed.
      seed: of data split, new head, shuffling, augmentation and drop path.

    Raises:
      ValueError: if a number is out of range.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 5e-4
    weight_decay: float = 1e-5
    clip: float = 5.0
    warmup_steps: int = 100
    min_ratio: float = 0.01
    label_smoothing: float = 0.1
    drop_path: float = 0.0
    ema: float = 0.0
    accumulate: int = 1
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "lr", "accumulate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "clip", "warmup_steps", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        for name in ("min_ratio", "label_smoothing", "drop_path", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be in [0, 1), got {getattr(self, name)}")

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Clipping, then AdamW under linear warm-up and a cosine, over ``steps`` steps."""
        warmup = min(self.warmup_steps, steps // 5)
        schedule = optax.warmup_cosine_decay_schedule(self.lr / 1000, self.lr, warmup, max(steps, 1), self.lr * self.min_ratio)
        adamw = optax.adamw(schedule, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw) if self.clip else adamw
