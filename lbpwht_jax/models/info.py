"""What the registry knows of a model besides its code."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NOTHING = "(?!)"


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One named model.

    Attributes:
      module: its Linen class.
      arguments: of the class, besides those ``create_model`` passes.
      image_size: height and width it was trained at, in pixels.
      layers: regular expression of the layers low-rank backprop adapts by default, searched in module paths; the paper's
        choice where the paper has the family.
      attention: regular expression of the attention layers among these, searched in module paths.
      fused: regular expression of the layers that make query, key and value at once, searched in module paths.
      last_stage: regular expression of what training the last stage trains, the head with it, searched in module paths.
      head: regular expression of the head, searched in module paths.
      channels: of the input images.
      mean, std: subtracted from and divided into images in [0, 1], a channel.
      interpolation: of the evaluation resize.
      crop: edge of the evaluation's centre crop over the resized image's shorter edge.
      pointwise: regular expression, searched in parameter paths, of the kernels kept here as ``[in, out]`` and in timm's
        files as 1x1 convolutions, ``[out, in, 1, 1]``.
      buffers: regular expression, searched in timm's keys, of the entries computed here rather than stored.
      renames: pairs of a regular expression and its replacement, applied in turn to the timm keys that follow from the
        parameter paths, where the two differ.
      make_buffers: computes the entries ``buffers`` matches that timm wants to find, from the module, by key.
      resample: takes a timm state dict and the module, and resamples what depends on the image size to the module's.
    """

    module: type[nn.Module]
    arguments: Mapping[str, Any]
    image_size: int
    layers: str
    attention: str = r"(^|/)(attn|token_mixer)/"
    fused: str = r"(^|/)qkv$"
    last_stage: str = r"^(layers_3|stages_3|norm|head(_dist)?)(/|$)"
    head: str = r"^head(_dist)?(/|$)"
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop: float = 1.0
    pointwise: str = NOTHING
    buffers: str = NOTHING
    renames: tuple[tuple[str, str], ...] = ()
    make_buffers: Callable[[nn.Module], Mapping[str, np.ndarray]] | None = None
    resample: Callable[[Mapping[str, np.ndarray], nn.Module], Mapping[str, np.ndarray]] | None = None
