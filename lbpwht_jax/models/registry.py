"""The models by timm's names."""

import difflib
import fnmatch
import operator
from typing import Any

import flax.linen as nn

from lbpwht_jax.models import convnext, dinov3, efficientformer, efficientformer_v2, swin_v2, vit_names
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.ops.residuals import Residuals, named_residuals

_LARGEST_IMAGE = 8192

_MODELS: dict[str, ModelInfo] = {
    name: info
    for family in (vit_names, dinov3, efficientformer, efficientformer_v2, swin_v2, convnext)
    for name, info in family.MODELS.items()
}

_FAMILIES = ("vit", "deit", "efficientformer", "efficientformerv2", "swinv2", "convnext")


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern, such as ``"eff*"``, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_info(name: str) -> ModelInfo:
    """What the registry knows of a model.

    Raises:
      ValueError: if the name is unknown, with the nearest ones.
    """
    if name not in _MODELS:
        like = [known for known in sorted(_MODELS) if known.startswith(name.lower())] if name else []
        nearest = like[:3] or difflib.get_close_matches(name.lower(), _MODELS, n=3, cutoff=0.3)
        near = f"nearest: {', '.join(nearest)}" if nearest else f"the families are {', '.join(_FAMILIES)}, with timm's names"
        raise ValueError(f"unknown model {name!r}; {near}")
    return _MODELS[name]


def plain_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | None = None,
    dtype: Any = None,
    drop_path: float = 0.0,
    remat: bool = False,
    frozen_batch_norm: bool = False,
    residuals: str | Residuals = "plain",
) -> nn.Module:
    """A model of the registry with exact backpropagation; arguments and result as for ``lbpwht_jax.create_model``."""
    info = model_info(name)
    return info.module(
        num_classes=_within(name, "num_classes", num_classes, None),
        image_size=_within(name, "image_size", info.images.size if image_size is None else image_size, _LARGEST_IMAGE),
        drop_path=drop_path,
        settings=Settings(dtype, frozen_batch_norm, named_residuals(residuals, name), remat),
        **info.arguments,
    )


def _within(name: str, field: str, value: Any, largest: int | None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {field} must be an integer, got {value!r}") from None
    if number < 1 or (largest is not None and number > largest):
        wanted = "positive" if largest is None else f"from 1 to {largest}"
        raise ValueError(f"{name}: {field} must be {wanted}, got {value!r}")
    return number
