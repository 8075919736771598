"""The models by timm's names."""

import difflib
import fnmatch
import re
from typing import Any

import flax.linen as nn

from lbpwht_jax.models import efficientformer, efficientformer_v2, swin_v2, vit
from lbpwht_jax.models.blocks import Plan
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.ops.spec import LowRankSpec

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


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | None = None,
    dtype: Any = None,
    drop_path: float = 0.0,
    remat: bool = False,
    frozen_batch_norm: bool = False,
    spec: LowRankSpec | None = None,
    layers: str | None = None,
) -> nn.Module:
    """A Linen model by its timm name; call it as ``model.apply(variables, images, train=False)``.

    Args:
      name: one of ``list_models()``.
      num_classes: outputs of the head.
      image_size: height and width of the images, in pixels; by default what the model was trained at.
      dtype: of the computation (parameters stay float32).
      drop_path: probability of dropping the last block's residual branches while training, rising linearly to it.
      remat: recomputes each block in the backward pass instead of keeping its activations.
      frozen_batch_norm: keeps batch normalisation on its running statistics while training.
      spec: low-rank backprop for the layers that ``layers`` matches; ``None`` backpropagates exactly.
      layers: regular expression searched in module paths, such as ``"mlp/fc[12]$"``; by default the paper's choice.

    Returns:
      The module, taking ``[batch, image_size, image_size, channels]`` and returning ``[batch, num_classes]`` logits.

    Raises:
      ValueError: if the name is unknown, ``layers`` is given without ``spec`` or is no regular expression.
    """
    info = model_info(name)
    if layers is not None:
        if spec is None:
            raise ValueError(f"create_model({name!r}): layers={layers!r} needs a spec to apply, such as spec=lp_l1(4)")
        try:
            re.compile(layers)
        except re.error as error:
            raise ValueError(f"create_model({name!r}): layers={layers!r} is no regular expression: {error}") from None
    return info.module(
        num_classes=num_classes,
        image_size=info.image_size if image_size is None else image_size,
        dtype=dtype,
        drop_path=drop_path,
        remat=remat,
        frozen_batch_norm=frozen_batch_norm,
        plan=Plan(spec, info.layers if layers is None else layers),
        **info.arguments,
    )
