"""The models by timm's names."""

import difflib
import fnmatch
from typing import Any

import flax.linen as nn

from lbpwht_jax.models import efficientformer, efficientformer_v2, swin_v2, vit
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.info import ModelInfo

_MODELS: dict[str, ModelInfo] = {
    name: info for family in (vit, efficientformer, efficientformer_v2, swin_v2) for name, info in family.MODELS.items()
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern, such as ``"eff*"``, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_info(name: str) -> ModelInfo:
    """What the registry knows of a model.

    Raises:
      ValueError: if the name is unknown, with the nearest ones.
    """
    if name not in _MODELS:
        nearest = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.3)
        raise ValueError(f"unknown model {name!r}; nearest: {', '.join(nearest) or 'none'}. list_models() has every name")
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
) -> nn.Module:
    """A model of the registry with exact backpropagation; arguments and result as for ``lbpwht_jax.create_model``."""
    info = model_info(name)
    return info.module(
        num_classes=num_classes,
        image_size=info.images.size if image_size is None else image_size,
        drop_path=drop_path,
        remat=remat,
        settings=Settings(dtype, frozen_batch_norm),
        **info.arguments,
    )
