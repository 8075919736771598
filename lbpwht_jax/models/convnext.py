"""ConvNeXt (Liu et al., 2022) and ConvNeXt V2 (Woo et al., 2023), timm's names: depthwise 7x7 convolutions, and MLPs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.models.blocks import DropPath, Mlp, Part, ResidualBlock, check_images, dense, drop_path_rates
from lbpwht_jax.models.conv_blocks import convolution
from lbpwht_jax.models.info import NOTHING, Images, Layers, ModelInfo, TimmFiles
from lbpwht_jax.models.loops import run_blocks
from lbpwht_jax.models.norms import layer_norm, layer_scale, widen
from lbpwht_jax.ops.gelu import coded_gelu
from lbpwht_jax.ops.recompute import recomputed

_EPSILON = 1e-6
_MLP_RATIO = 4


class ResponseNorm(Part):
    """Global response normalisation (Woo et al., 2023, section 3.2): channels compete by their norms over the map.

    Parameters are ``scale`` and ``bias``, one number per channel.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; the result has the same shape and dtype."""
        scale, bias = (self.param(name, nn.initializers.zeros_init(), x.shape[-1:]) for name in ("scale", "bias"))
        residuals = self.settings.residuals
        if residuals is None:
            return response_norm(x, scale, bias)
        return recomputed(response_norm, x, scale, bias, bits=(residuals.norm_bits, None, None))


def response_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """``x + scale * x * share + bias``; a channel's share is its L2 norm over the map, over the mean of all channels' norms.

    Args:
      x: ``[batch, height, width, channels]``; norms are taken in at least float32.
      scale: ``[channels]``.
      bias: ``[channels]``.
    """
    wide = widen(x)
    squares = jnp.sum(wide * wide, axis=(1, 2), keepdims=True)
    some = squares > 0  # the root of zero has no slope; torch takes 0 for it
    norms = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)
    share = norms / (jnp.mean(norms, axis=-1, keepdims=True) + _EPSILON)
    scale, bias = (widen(each).reshape(1, 1, 1, -1) for each in (scale, bias))
    return (wide + scale * wide * share + bias).astype(x.dtype)


class ResponseMlp(Part):
    """Two dense layers with GELU and global response normalisation between them.

    Attributes:
      hidden: channels between the two.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; the result has the same shape."""
        channels = x.shape[-1]
        x = coded_gelu(dense(self, "fc1", self.hidden)(x), self.settings.slope_bits)
        return dense(self, "fc2", channels)(ResponseNorm(settings=self.settings, name="grn")(x))


class Block(ResidualBlock):
    """A depthwise 7x7 convolution and an MLP.

    Attributes:
      response_norm: whether the MLP has global response normalisation, as V2's; otherwise the branch has a layer scale.
    """

    response_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; the result has the same shape."""
        channels = x.shape[-1]
        y = convolution(self, "conv_dw", channels, 7, depthwise=True)(x)
        y = layer_norm(self, "norm", y, epsilon=_EPSILON)
        if self.response_norm:
            y = ResponseMlp(_MLP_RATIO * channels, settings=self.settings, name="mlp")(y)
        else:
            y = Mlp(_MLP_RATIO * channels, grid=None, settings=self.settings, name="mlp")(y)
            y = layer_scale(self, "ls", y, 1e-6)
        return x + DropPath(self.drop_path)(y, train)


class Stage(Part):
    """Blocks on maps of one size, after the downsampling to it.

    Attributes:
      dim: channels.
      drop_path: each block's probability of dropping its branch while training; its length is the stage's depth.
      response_norm: as for ``Block``.
      downsample: whether the stage begins by halving the map.
    """

    dim: int
    drop_path: tuple[float, ...]
    response_norm: bool
    downsample: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, height', width', dim]``; halves are rounded down."""
        if self.downsample:
            x = layer_norm(self, "downsample_0", x, epsilon=_EPSILON)
            x = convolution(self, "downsample_1", self.dim, 2, 2, padding=0)(x)
        block = functools.partial(Block, self.response_norm, settings=self.settings)
        return run_blocks(self, {f"blocks_{i}": block for i in range(len(self.drop_path))}, self.drop_path, x, train)


class ConvNeXt(Part):
    """A ConvNeXt for image classification.

    Attributes:
      num_classes: outputs.
      image_size: height and width of the images, in pixels, at least 32.
      dims: channels of the four stages.
      depths: blocks of the four stages.
      response_norm: whether it is a ConvNeXt V2.
      drop_path: probability of dropping the last block's branch; the earlier blocks' rise linearly to it.
    """

    num_classes: int
    image_size: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    response_norm: bool = False
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
          images: ``[batch, image_size, image_size, channels]``, normalised.
          train: whether drop path is on.

        Returns:
          Logits, ``[batch, num_classes]``.

        Raises:
          ValueError: if the images are not of ``image_size``, or that is less than 32.
        """
        check_images(self, images, 1)
        if self.image_size < 32:
            raise ValueError(
                f"ConvNeXt: image_size must be at least 32, for the maps to have a token left, got {self.image_size}"
            )
        x = convolution(self, "stem_0", self.dims[0], 4, 4, padding=0)(images)
        x = layer_norm(self, "stem_1", x, epsilon=_EPSILON)
        rates = drop_path_rates(self.drop_path, sum(self.depths))
        for i, (dim, depth) in enumerate(zip(self.dims, self.depths, strict=True)):
            own, rates = tuple(rates[:depth]), rates[depth:]
            x = Stage(dim, own, self.response_norm, i > 0, settings=self.settings, name=f"stages_{i}")(x, train)
        x = layer_norm(self, "norm", x.mean(axis=(1, 2)), epsilon=_EPSILON)
        return nn.Dense(self.num_classes, dtype=self.settings.dtype, name="head")(x)


_ATTO = {"dims": (40, 80, 160, 320), "depths": (2, 2, 6, 2)}
_TINY = {"dims": (96, 192, 384, 768), "depths": (3, 3, 9, 3)}
_SMALL = {"dims": (96, 192, 384, 768), "depths": (3, 3, 27, 3)}
_BASE = {"dims": (128, 256, 512, 1024), "depths": (3, 3, 27, 3)}
_RENAMES = ((r"\.ls\.gamma$", ".gamma"), (r"^norm\.", "head.norm."), (r"^head\.(?!norm\.)", "head.fc."))


def _info(arguments: dict, crop: float, *, response_norm: bool = False, pointwise: bool = False) -> ModelInfo:
    """A model, given whether timm's files have its dense layers as 1x1 convolutions."""
    files = TimmFiles(renames=_RENAMES, pointwise=r"mlp/fc[12]/kernel$" if pointwise else NOTHING)
    arguments = {**arguments, "response_norm": response_norm}
    return ModelInfo(ConvNeXt, arguments, Images(224, crop=crop), Layers(r"blocks_\d+/mlp/fc[12]$"), files)


MODELS = {
    "convnext_atto": _info(_ATTO, 0.875, pointwise=True),
    "convnext_tiny": _info(_TINY, 0.95),
    "convnext_small": _info(_SMALL, 0.95),
    "convnext_base": _info(_BASE, 0.875),
    "convnextv2_atto": _info(_ATTO, 0.875, response_norm=True, pointwise=True),
    "convnextv2_tiny": _info(_TINY, 0.875, response_norm=True),
}
