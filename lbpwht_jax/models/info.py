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
class Layers:
    """Which of a model's modules belong to what training can choose: regular expressions searched in module paths.

    Attributes:
      low_rank: the layers that low-rank backprop adapts by default; the paper's choice where the paper has the family.
      attention: the attention layers; those of them that ``low_rank`` matches too are what LoRA on attention takes.
      fused: the layers that make query, key and value at once.
      last_stage: what training the last stage trains, the head with it.
      head: the head.
    """

    low_rank: str = NOTHING
    attention: str = r"(^|/)(attn|token_mixer)/"
    fused: str = r"(^|/)qkv$"
    last_stage: str = r"^(layers_3|stages_3|norm|head(_dist)?)(/|$)"
    head: str = r"^head(_dist)?(/|$)"


@dataclasses.dataclass(frozen=True)
class Images:
    """The images a model takes, and how evaluation prepares them.

    Attributes:
      size: height and width the model was trained at, in pixels.
      channels: 3 for colour, 1 for grey.
      mean, std: per channel, of images in [0, 1]: the mean is subtracted and the result divided by ``std``.
      interpolation: of the evaluation's resize.
      crop: edge of the evaluation's centre crop over the resized image's shorter edge.
    """

    size: int
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image at ``size``."""
        return self.size, self.size, self.channels


@dataclasses.dataclass(frozen=True)
class TimmFiles:
    """How timm's files of a model differ from its variables here.

    Attributes:
      pointwise: regular expression, searched in parameter paths, of the kernels kept here as ``[in, out]`` and in timm's
        files as 1x1 convolutions, ``[out, in, 1, 1]``.
      buffers: regular expression, searched in timm's keys, of the entries computed here rather than stored.
      renames: pairs of a regular expression and its replacement, applied in turn to the timm keys that follow from the
        parameter paths, where the two differ.
      make_buffers: computes the entries ``buffers`` matches that timm wants to find, from the module, by key.
      resample: takes a timm state dict and the module, and resamples what depends on the image size to the module's.
    """

    pointwise: str = NOTHING
    buffers: str = NOTHING
    renames: tuple[tuple[str, str], ...] = ()
    make_buffers: Callable[[nn.Module], Mapping[str, np.ndarray]] | None = None
    resample: Callable[[Mapping[str, np.ndarray], nn.Module], Mapping[str, np.ndarray]] | None = None


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One named model.

    Attributes:
      module: its Linen class.
      arguments: of the class, besides those ``create_model`` passes.
      images: what it takes.
      layers: which of its modules belong to what training can choose.
      files: how timm's files of it differ.
    """

    module: type[nn.Module]
    arguments: Mapping[str, Any]
    images: Images
    layers: Layers = Layers()
    files: TimmFiles = TimmFiles()
