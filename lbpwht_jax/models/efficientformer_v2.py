"""EfficientFormerV2 (Li et al., 2023), timm's names: convolutional MLPs throughout, talking-head attention in two stages."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lbpwht_jax.models.blocks import DropPath, Part, ResidualBlock, check_images, drop_path_rates
from lbpwht_jax.models.conv_blocks import (
    ConvNorm,
    DenseNorm,
    batch_counters,
    resample_attention_biases,
)
from lbpwht_jax.models.efficientformer_v2_attention import Attention, AttentionDownsample
from lbpwht_jax.models.info import Images, Layers, ModelInfo, TimmFiles
from lbpwht_jax.models.loops import run_blocks
from lbpwht_jax.models.norms import batch_norm, scaled_branch


class Stem(Part):
    """Two 3x3 convolutions of stride 2, each with batch normalisation and GELU.

    Attributes:
      features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to a map of a quarter of the height and width, rounded up."""
        fields = {"activation": "gelu", "settings": self.settings}
        x = ConvNorm(self.features // 2, 2, **fields, name="conv1")(images, train)
        return ConvNorm(self.features, 2, **fields, name="conv2")(x, train)


class ConvMlp(Part):
    """1x1, depthwise 3x3 and 1x1 convolution (``fc1``, ``mid``, ``fc2``), each normalised, with GELU after the first two.

    Attributes:
      hidden: channels between the 1x1 convolutions.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, scaled_by: jax.Array | None = None) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; so is the result. ``scaled_by`` as in ``joined_norm``."""
        channels = x.shape[-1]
        fields = {"activation": "gelu", "settings": self.settings}
        x = DenseNorm(self.hidden, **fields, name="fc1")(x, train)
        x = ConvNorm(self.hidden, depthwise=True, **fields, name="mid")(x, train)
        return DenseNorm(channels, settings=self.settings, name="fc2")(x, train, scaled_by)


class Downsample(Part):
    """A 3x3 convolution of stride 2 with batch normalisation, and attention beside it where asked.

    Attributes:
      features: output channels.
      attention: whether there is attention.
    """

    features: int
    attention: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to a map of half the height and width, rounded up."""
        y = ConvNorm(self.features, 2, settings=self.settings, name="conv")(x, train)
        return y + AttentionDownsample(self.features, settings=self.settings, name="attn")(x, train) if self.attention else y


class Block(ResidualBlock):
    """Attention, in some blocks, and a ``ConvMlp``, each a scaled residual branch.

    Attributes:
      mlp_ratio: hidden channels of the MLP over the map's channels.
      attention_stride: ``stride`` of the attention; ``None`` for a block without attention.
    """

    mlp_ratio: int
    attention_stride: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; the result has the same shape."""
        if self.attention_stride is not None:
            attention = Attention(self.attention_stride, settings=self.settings, name="token_mixer")
            x = x + DropPath(self.drop_path)(scaled_branch(self, "ls1", attention, x, train), train)
        mlp = ConvMlp(self.mlp_ratio * x.shape[-1], settings=self.settings, name="mlp")
        return x + DropPath(self.drop_path)(scaled_branch(self, "ls2", mlp, x, train), train)


class Stage(Part):
    """Blocks on maps of one size, after the downsampling to it.

    Attributes:
      index: the stage's index. From the second on, stages begin by halving the map; the third's and fourth's last blocks have
        attention, at stride 2 in the third, and the fourth's downsampling too.
      dim: channels.
      mlp_ratios: each block's hidden channels of the MLP over ``dim``; its length is the stage's depth.
      drop_path: each block's probability of dropping a residual branch while training.
      attention: how many of the blocks have attention.
    """

    index: int
    dim: int
    mlp_ratios: tuple[int, ...]
    drop_path: tuple[float, ...]
    attention: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, height', width', dim]``."""
        if self.index > 0:
            x = Downsample(self.dim, attention=self.index == 3, settings=self.settings, name="downsample")(x, train)
        first = len(self.mlp_ratios) - self.attention
        stride = {2: 2, 3: 1}.get(self.index)
        blocks = {
            f"blocks_{i}": functools.partial(Block, ratio, stride if i >= first else None, settings=self.settings)
            for i, ratio in enumerate(self.mlp_ratios)
        }
        return run_blocks(self, blocks, self.drop_path, x, train)


class EfficientFormerV2(Part):
    """An EfficientFormerV2 for image classification.

    Attributes:
      num_classes: outputs.
      image_size: height and width of the images, in pixels; a 16th of it, rounded up, must be even.
      dims: channels of the four stages.
      mlp_ratios: for the four stages, hidden channels of each block's MLP over the stage's.
      attention: how many blocks of the last two stages, their last ones, have attention.
      drop_path: probability of dropping the last block's residual branches; the earlier blocks' rise linearly to it.
    """

    num_classes: int
    image_size: int
    dims: tuple[int, ...]
    mlp_ratios: tuple[tuple[int, ...], ...]
    attention: int
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
          images: ``[batch, image_size, image_size, channels]``, normalised.
          train: whether drop path is on, and batch normalisation on the batch's statistics unless frozen.

        Returns:
          Logits, the average of the two heads', ``[batch, num_classes]``.

        Raises:
          ValueError: if the images are not of ``image_size``, or a 16th of that, rounded up, is odd.
        """
        check_images(self, images, 1)
        if math.ceil(self.image_size / 16) % 2:
            raise ValueError(
                f"EfficientFormerV2: a 16th of image_size, rounded up, must be even, as the third stage's attention halves its "
                f"map; got image_size={self.image_size}. Any multiple of 32 will do"
            )
        x = Stem(self.dims[0], settings=self.settings, name="stem")(images, train)
        depths = [len(ratios) for ratios in self.mlp_ratios]
        rates = drop_path_rates(self.drop_path, sum(depths))
        for i, (dim, ratios) in enumerate(zip(self.dims, self.mlp_ratios, strict=True)):
            begin = sum(depths[:i])
            x = Stage(
                i,
                dim,
                ratios,
                tuple(rates[begin : begin + len(ratios)]),
                self.attention,
                settings=self.settings,
                name=f"stages_{i}",
            )(x, train)
        x = batch_norm(self, "norm", x, train).mean(axis=(1, 2))
        heads = [nn.Dense(self.num_classes, dtype=self.settings.dtype, name=name)(x) for name in ("head", "head_dist")]
        return (heads[0] + heads[1]) / 2


def _resample(state_dict: Mapping[str, np.ndarray], module: Any) -> dict[str, np.ndarray]:
    downsampled, attended = (math.ceil(module.image_size / stride) for stride in (16, 32))
    state_dict = resample_attention_biases(state_dict, r"attn\.attention_biases$", downsampled)
    return resample_attention_biases(state_dict, r"token_mixer\.attention_biases$", attended)


def _info(dims: tuple[int, ...], mlp_ratios: tuple[tuple[int, ...], ...], attention: int) -> ModelInfo:
    return ModelInfo(
        EfficientFormerV2,
        {"dims": dims, "mlp_ratios": mlp_ratios, "attention": attention},
        Images(224, crop=0.95),
        Layers(r"(mlp/fc[12]|(token_mixer|attn)/([qkv]|q/proj|proj))/conv$|talking_head[12]$"),
        TimmFiles(
            pointwise=r"(fc[12]|/[qkv]|/proj)/conv/kernel$|talking_head[12]/kernel$",
            buffers=r"\.num_batches_tracked$",
            make_buffers=batch_counters,
            resample=_resample,
        ),
    )


def _ratios(depth: int, wide: int, narrow: int) -> tuple[int, ...]:
    """Ratios of a stage: 4 in ``wide`` blocks, 3 in the ``narrow`` ones that follow, and 4 in the rest."""
    return (4,) * wide + (3,) * narrow + (4,) * (depth - wide - narrow)


MODELS = {
    "efficientformerv2_s0": _info((32, 48, 96, 176), ((4,) * 2, (4,) * 2, _ratios(6, 1, 3), _ratios(4, 1, 2)), attention=2),
    "efficientformerv2_s1": _info((32, 48, 120, 224), ((4,) * 3, (4,) * 3, _ratios(9, 2, 4), _ratios(6, 2, 2)), attention=2),
    "efficientformerv2_s2": _info((32, 64, 144, 288), ((4,) * 4, (4,) * 4, _ratios(12, 2, 6), _ratios(8, 2, 4)), attention=4),
    "efficientformerv2_l": _info((40, 80, 192, 384), ((4,) * 5, (4,) * 5, _ratios(15, 4, 7), _ratios(10, 3, 4)), attention=6),
}
