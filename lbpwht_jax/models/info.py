"""What the registry knows of a model besides its code."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One named model.

    Attributes:
      module: its Linen class.
      arguments: of the class, besides those ``create_model`` passes.
      image_size: height and width it was trained at, in pixels.
      layers: regular expression of the layers low-rank backprop adapts by default, searched in module paths; the paper's
        choice where the paper has the family.
      channels: of the input images.
      mean, std: subtracted from and divided into images in [0, 1], a channel.
      interpolation: of the evaluation resize.
      crop: edge of the evaluation's centre crop over the resized image's shorter edge.
    """

    module: type[nn.Module]
    arguments: Mapping[str, Any]
    image_size: int
    layers: str
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop: float = 1.0
