"""The transfer sweep's methods, the setting that its runs share, and the backbone under them."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from transfer_backbone import backbone, backbone_info
from transfer_training import AUGMENTATION

from lbpwht_jax.adaptation import AdaptedModule, Method, adapt, parse_method
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.ops.residuals import RESIDUALS, ResidualsName
from lbpwht_jax.train import Recipe
from lbpwht_jax.weights import load_weights, replace_head

Train = Literal["last_stage", "all", "head"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with what its short name leaves open.

    Attributes:
      method: short name, as for ``parse_method``.
      projection: projection of low-rank backpropagation.
      dx: how the gradients of inputs are computed.
      lr_scale: multiplies the learning rate.
      residuals: what is kept for the backward pass besides what dense layers keep.
      flops_of: a variant whose backward FLOPs a plan may take; the method then says only which layers are planned.
      flops_train: what that variant trains; by default the same as this one.
    """

    method: str
    projection: str = "fitted"
    dx: str = "low_rank"
    lr_scale: float = 1.0
    residuals: ResidualsName = "plain"
    flops_of: str = ""
    flops_train: Train | None = None

    @property
    def name(self) -> str:
        """Its name in tables."""
        if self.flops_of:
            return f"plan, FLOPs of {self.flops_of}" + (", branches and head" if self.flops_train == "head" else "")
        notes = [self.projection] * (self.projection != "fitted") + ["dW only"] * (self.dx == "exact")
        notes += [f"{self.lr_scale:g} x lr"] * (self.lr_scale != 1) + [self.residuals] * (self.residuals != "plain")
        return f"{self.method} ({', '.join(notes)})" if notes else self.method

    def parse(self) -> Method:
        """The method."""
        fields: dict[str, Any] = {"projection": self.projection, "dx": self.dx} if "lp_" in self.method else {}
        return parse_method(self.method, **fields)

    def trained_as(self, train: Train) -> bool:
        """Whether the sweep has this.

        Branches and head alone are trained where there are branches without low rank; the whole model where a plan has the
        FLOPs of those.
        """
        if self.flops_train == "head":
            return train == "all"
        return train != "head" or self.parse().default_train == "head"


RANKS = (2, 4, 6, 8)
VARIANTS = (
    Variant("full"),
    *(Variant(f"lp_l1-{r}") for r in RANKS),
    Variant("lora-8"),
    Variant("lora_all-8"),
    *(Variant(f"lp_l1-{r}", "official") for r in RANKS),
    Variant("lp_l1-4", dx="exact"),
    Variant("lp_linf-2"),
    Variant("lp_linf-4"),
    Variant("lp_l1-4+lora_all-8"),
    Variant("lora-8", lr_scale=4.0),
    Variant("lora_all-8", lr_scale=4.0),
    Variant("lp_l1-4", residuals="lean"),
    Variant("lp_l1-4", residuals="tiny"),
    Variant("full", residuals="lean"),
    *(Variant("lp_l1-4", flops_of=name) for name in ("lp_l1-2", "lp_l1-4", "lora-8")),
    Variant("lp_l1-4", flops_of="lora-8", flops_train="head"),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs of a sweep share.

    Attributes:
      train_per_class: training images of each class, the same in all runs.
      test_per_class: test images of each class, the same in all runs.
      epochs: passes over the training images.
      batch_size: images per step.
      lr: AdamW's peak learning rate.
    """

    train_per_class: int = 200
    test_per_class: int = 300
    epochs: int = 3
    batch_size: int = 64
    lr: float = 2e-3

    def recipe(self, seed: int, lr_scale: float = 1.0) -> Recipe:
        """How to train."""
        return Recipe(self.epochs, self.batch_size, self.lr * lr_scale, warmup_steps=30, augmentation=AUGMENTATION, seed=seed)


def adapted_backbone(variant: Variant, train: Train, num_classes: int) -> AdaptedModule:
    """The backbone under a method, batch normalisation on its running statistics."""
    info = backbone_info()
    images = jax.ShapeDtypeStruct((1, *info.images.shape), jnp.float32)
    module = backbone(num_classes, Settings(frozen_batch_norm=True, residuals=RESIDUALS[variant.residuals]))
    return adapt(module, variant.parse().rules(info, train), images)


def pretrained(weights: Path, num_classes: int, seed: int) -> dict[str, Any]:
    """The backbone's variables with a new head, drawn by the seed."""
    info = backbone_info()
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), load_weights(weights)[0])
    init = jax.jit(backbone(num_classes).init)
    return replace_head(stored, init(jax.random.key(seed), jnp.zeros((1, *info.images.shape))))
