"""EfficientFormer (Li et al., 2022), timm's names: poolings and 1x1 convolutions on maps, attention in the last blocks."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lbpwht_jax.models.blocks import DropPath, Mlp, Part, ResidualBlock, check_images, dense, drop_path_rates
from lbpwht_jax.models.conv_blocks import (
    AveragePool,
    attention_biases,
    batch_counters,
    conv3x3,
    offset_index,
    resample_attention_biases,
)
from lbpwht_jax.models.info import Images, Layers, ModelInfo, TimmFiles
from lbpwht_jax.models.loops import run_blocks
from lbpwht_jax.models.norms import (
    batch_norm,
    joined_norm,
    joins_behind,
    joins_norms,
    layer_norm,
    layer_scale,
    running_norm,
    scaled_branch,
)
from lbpwht_jax.ops.attention_biased import packed_biased_attention
from lbpwht_jax.ops.matmul import Link


class Stem(Part):
    """Two 3x3 convolutions of stride 2, each with batch normalisation and ReLU.

    Attributes:
      features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to a map of a quarter of the height and width, rounded up."""
        x = joined_norm(self, conv3x3(self, "conv1", self.features // 2, 2), "norm1", images, train, "relu")
        return joined_norm(self, conv3x3(self, "conv2", self.features, 2), "norm2", x, train, "relu")


class Downsample(Part):
    """A 3x3 convolution of stride 2 with batch normalisation.

    Attributes:
      features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to a map of half the height and width, rounded up."""
        return joined_norm(self, conv3x3(self, "conv", self.features, 2), "norm", x, train)


class ConvMlp(Part):
    """Two 1x1 convolutions, ``fc1`` and ``fc2``, each with batch normalisation, and GELU between them.

    Attributes:
      hidden: channels between the two.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, scaled_by: jax.Array | None = None) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; so is the result. ``scaled_by`` as in ``joined_norm``."""
        channels = x.shape[-1]
        fc1 = dense(self, "fc1", self.hidden)
        if self.settings.residuals is None and not joins_norms(self, x, train):
            fc2 = dense(self, "fc2", channels, activation="gelu")
            return batch_norm(self, "norm2", fc2(batch_norm(self, "norm1", fc1(x), train)), train)
        fc2, link = dense(self, "fc2", channels), Link(defers=True)
        if joins_behind(self, x, train):
            norm1 = running_norm(self, "norm1", x, self.hidden, "gelu")
            x = fc1(x, link)
        else:
            x = joined_norm(self, fc1, "norm1", x, train, "gelu", link=link)
            norm1 = link.deferred
        return joined_norm(self, fc2, "norm2", x, train, scaled_by=scaled_by, link=link, before=norm1)


class Attention(Part):
    """Self-attention over a map, with a learned bias for each head and offset; values are four times as wide as keys.

    Attributes:
      heads: number of heads.
      key_dim: channels of a head's queries and keys.
    """

    heads: int = 8
    key_dim: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; the result has the same shape."""
        batch, height, width, channels = x.shape
        qkv = dense(self, "qkv", 6 * self.heads * self.key_dim)(x).reshape(batch, 1, height * width, 1, self.heads, -1)
        bias = attention_biases(self, self.heads, height, width)
        x = packed_biased_attention(qkv, bias, self.settings.residuals, key_dim=self.key_dim)
        return dense(self, "proj", channels)(x.reshape(batch, height, width, -1))


class PoolBlock(ResidualBlock):
    """Mixes tokens by what 3x3 average pooling changes, then channels by a ``ConvMlp``.

    Attributes:
      mlp_ratio: hidden channels of the MLP over the map's channels.
    """

    mlp_ratio: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; the result has the same shape."""
        y = AveragePool()(x) - x
        x = x + DropPath(self.drop_path)(layer_scale(self, "ls1", y), train)
        mlp = ConvMlp(self.mlp_ratio * x.shape[-1], settings=self.settings, name="mlp")
        return x + DropPath(self.drop_path)(scaled_branch(self, "ls2", mlp, x, train), train)


class AttentionBlock(ResidualBlock):
    """A pre-norm transformer block on a map, its residual branches scaled.

    Attributes:
      mlp_ratio: hidden channels of the MLP over the map's channels.
    """

    mlp_ratio: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; the result has the same shape."""
        y = Attention(settings=self.settings, name="token_mixer")(layer_norm(self, "norm1", x))
        x = x + DropPath(self.drop_path)(layer_scale(self, "ls1", y), train)
        y = Mlp(self.mlp_ratio * x.shape[-1], grid=None, settings=self.settings, name="mlp")(layer_norm(self, "norm2", x))
        return x + DropPath(self.drop_path)(layer_scale(self, "ls2", y), train)


class Stage(Part):
    """Blocks on maps of one size, after the downsampling to it.

    Attributes:
      dim: channels.
      mlp_ratio: hidden channels of the MLPs over ``dim``.
      drop_path: each block's probability of dropping a residual branch while training; its length is the stage's depth.
      attention: how many of the blocks, the last ones, have attention.
      downsample: whether the stage begins by halving the map.
    """

    dim: int
    mlp_ratio: int
    drop_path: tuple[float, ...]
    attention: int = 0
    downsample: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, height', width', dim]``."""
        if self.downsample:
            x = Downsample(self.dim, settings=self.settings, name="downsample")(x, train)
        poolings = len(self.drop_path) - self.attention
        classes = dict.fromkeys(range(poolings), PoolBlock)
        # In the published weights the flattening of the map counts as a block.
        classes |= {i + 1: AttentionBlock for i in range(poolings, len(self.drop_path))}
        blocks = {
            f"blocks_{i}": functools.partial(block, self.mlp_ratio, settings=self.settings) for i, block in classes.items()
        }
        return run_blocks(self, blocks, self.drop_path, x, train)


class EfficientFormer(Part):
    """An EfficientFormer for image classification.

    Attributes:
      num_classes: outputs.
      image_size: height and width of the images, in pixels.
      dims: channels of the four stages.
      depths: blocks of the four stages.
      attention: how many blocks of the last stage, the last ones, have attention.
      mlp_ratio: hidden channels of the MLPs over the stage's.
      drop_path: probability of dropping the last block's residual branches; the earlier blocks' rise linearly to it.
    """

    num_classes: int
    image_size: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    attention: int
    mlp_ratio: int = 4
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
          ValueError: if the images are not of ``image_size``.
        """
        check_images(self, images, 1)
        x = Stem(self.dims[0], settings=self.settings, name="stem")(images, train)
        rates = drop_path_rates(self.drop_path, sum(self.depths))
        for i, (dim, depth) in enumerate(zip(self.dims, self.depths, strict=True)):
            begin = sum(self.depths[:i])
            x = Stage(
                dim,
                self.mlp_ratio,
                tuple(rates[begin : begin + depth]),
                attention=self.attention if i == len(self.dims) - 1 else 0,
                downsample=i > 0,
                settings=self.settings,
                name=f"stages_{i}",
            )(x, train)
        x = layer_norm(self, "norm", x).mean(axis=(1, 2))
        heads = [nn.Dense(self.num_classes, dtype=self.settings.dtype, name=name)(x) for name in ("head", "head_dist")]
        return (heads[0] + heads[1]) / 2


def _map_size(module: Any) -> int:
    return math.ceil(module.image_size / 2 ** (len(module.depths) + 1))


def _make_buffers(module: Any) -> dict[str, np.ndarray]:
    size, last = _map_size(module), len(module.depths) - 1
    blocks = range(module.depths[last] - module.attention + 1, module.depths[last] + 1)
    indices = {f"stages.{last}.blocks.{i}.token_mixer.attention_bias_idxs": offset_index(size, size) for i in blocks}
    return {**batch_counters(module), **indices}


def _resample(state_dict: Mapping[str, np.ndarray], module: Any) -> dict[str, np.ndarray]:
    return resample_attention_biases(state_dict, r"attention_biases$", _map_size(module))


def _info(dims: tuple[int, ...], depths: tuple[int, ...], attention: int) -> ModelInfo:
    *earlier, last = range(len(depths))
    poolings = [f"{last}/blocks_{i}" for i in range(depths[last] - attention)]
    convolutional = "|".join([f"[{earlier[0]}-{earlier[-1]}]/blocks_\\d+", *poolings])
    return ModelInfo(
        EfficientFormer,
        {"dims": dims, "depths": depths, "attention": attention},
        Images(224, crop=0.95),
        Layers(r"mlp/fc[12]$|token_mixer/(qkv|proj)$"),
        TimmFiles(
            pointwise=rf"stages_({convolutional})/mlp/fc[12]/kernel$",
            buffers=r"\.(num_batches_tracked|attention_bias_idxs)$",
            make_buffers=_make_buffers,
            resample=_resample,
        ),
    )


MODELS = {
    "efficientformer_l1": _info((48, 96, 224, 448), (3, 2, 6, 4), attention=1),
    "efficientformer_l3": _info((64, 128, 320, 512), (4, 4, 12, 6), attention=4),
    "efficientformer_l7": _info((96, 192, 384, 768), (6, 6, 18, 8), attention=8),
}
