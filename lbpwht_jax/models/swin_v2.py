"""Swin Transformer V2 (Liu et al., 2022), timm's names.

Attention runs in windows, shifted by half a window in every other block. Its logits are cosines times a learned scale, plus a
position bias that a small MLP computes from log-spaced offsets; so nothing in the weights depends on the image's size. Maps
that windows do not divide are padded with zeros at the bottom and right; a map no larger than a window is one window.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.models.blocks import DropPath, Mlp, Part, ResidualBlock, check_images, dense, drop_path_rates, patches
from lbpwht_jax.models.info import Images, Layers, ModelInfo, TimmFiles
from lbpwht_jax.models.loops import run_blocks
from lbpwht_jax.models.norms import layer_norm
from lbpwht_jax.models.windows import from_windows, relative_coordinates, relative_index, shift_mask, to_windows
from lbpwht_jax.ops.attention_biased import packed_biased_attention
from lbpwht_jax.ops.spec import Grid

_PATCH_SIZE = 4
_MLP_RATIO = 4
_POSITION_HIDDEN = 512
_LARGEST_SCALE = 100.0


class WindowAttention(Part):
    """Multi-head cosine attention within windows.

    Attributes:
      heads: number of heads; the channels are divided among them.
      window: tokens along each axis of a window.
    """

    heads: int
    window: Grid

    @nn.compact
    def __call__(self, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
        """Attends within each window.

        Args:
          x: ``[batch, windows, tokens, channels]``.
          mask: added to the logits, ``[windows, tokens, tokens]``, or ``None``.

        Returns:
          Array of the shape of ``x``.
        """
        batch, windows, tokens, channels = x.shape
        qkv = dense(self, "qkv", 3 * channels, grid=self.window, use_bias=False)(x)
        q_bias, v_bias = (self.param(name, nn.initializers.zeros_init(), (channels,)) for name in ("q_bias", "v_bias"))
        offset = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(qkv.dtype)
        scale = self.param("logit_scale", nn.initializers.constant(math.log(10)), (self.heads, 1, 1))
        scale = jnp.exp(jnp.minimum(scale, math.log(_LARGEST_SCALE)))
        head_dim = channels // self.heads
        x = packed_biased_attention(
            qkv.reshape(batch, windows, tokens, 3, self.heads, head_dim),
            self._position_bias(),
            self.settings.residuals,
            key_dim=head_dim,
            scale=scale.reshape(self.heads),
            offset=offset.reshape(3, self.heads, head_dim),
            mask=mask,
        )
        return dense(self, "proj", channels, grid=self.window)(x.reshape(batch, windows, tokens, channels))

    def _position_bias(self) -> jax.Array:
        """``[heads, tokens, tokens]``, from 0 to 16."""
        x = nn.Dense(_POSITION_HIDDEN, name="cpb_mlp_0")(relative_coordinates(self.window))
        x = nn.Dense(self.heads, use_bias=False, name="cpb_mlp_2")(nn.relu(x))
        return jnp.moveaxis((16 * nn.sigmoid(x))[relative_index(self.window)], -1, 0)


class Block(ResidualBlock):
    """A transformer block whose norms close the residual branches; windows adapt to the map.

    Attributes:
      heads: attention heads.
      window: edge of a window, in tokens; a smaller map is one window of its own size.
      shifted: whether windows are shifted by half their edge, along axes that have more than one.
    """

    heads: int
    window: int
    shifted: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; the result has the same shape."""
        # Zero norms make every block the identity before training.
        norm = functools.partial(layer_norm, self, scale_init=nn.initializers.zeros_init())
        x = x + DropPath(self.drop_path)(self._attend(x, functools.partial(norm, "norm1")), train)
        y = Mlp(_MLP_RATIO * x.shape[-1], grid=None, settings=self.settings, name="mlp")(x)
        return x + DropPath(self.drop_path)(norm("norm2", y), train)

    def _attend(self, x: jax.Array, norm: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Attention within the windows of a map, and the norm that closes the branch."""
        _, height, width, _ = x.shape
        window = (min(self.window, height), min(self.window, width))
        shift = tuple(self.window // 2 if self.shifted and n > self.window else 0 for n in (height, width))
        padding = [-n % w for n, w in zip((height, width), window, strict=True)]
        size = (height + padding[0], width + padding[1])
        x = jnp.roll(x, [-s for s in shift], axis=(1, 2))
        x = jnp.pad(x, [(0, 0), (0, padding[0]), (0, padding[1]), (0, 0)])
        attention = WindowAttention(self.heads, window, settings=self.settings, name="attn")
        x = attention(to_windows(x, window), shift_mask(size, window, shift) if any(shift) else None)
        # a norm that keeps codes is a pass of its own on accelerators; behind it the way back is one pass with the sum
        in_windows = self.settings.residuals is not None and not any(padding)
        x = from_windows(norm(x) if in_windows else x, window, size)[:, :height, :width]
        x = jnp.roll(x, shift, axis=(1, 2))
        return x if in_windows else norm(x)


class PatchMerging(Part):
    """Merges 2x2 neighbours into one token of twice the channels; an odd map is padded with zeros first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, ceil(height / 2), ceil(width / 2), 2 * channels]``."""
        batch, height, width, channels = x.shape
        x = jnp.pad(x, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)])
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x.reshape(batch, height, 2, width, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        x = dense(self, "reduction", 2 * channels, use_bias=False)(x.reshape(batch, height, width, 4 * channels))
        return layer_norm(self, "norm", x)


class Stage(Part):
    """Blocks at one resolution, after a patch merging where there is one.

    Attributes:
      downsample: whether it begins with a patch merging.
      heads: attention heads of each block.
      window: edge of a window, in tokens.
      drop_path: drop-path rate of each block; their number is the depth.
    """

    downsample: bool
    heads: int
    window: int
    drop_path: tuple[float, ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``; with ``downsample`` as ``PatchMerging`` returns."""
        if self.downsample:
            x = PatchMerging(settings=self.settings, name="downsample")(x)
        block = functools.partial(Block, self.heads, self.window, settings=self.settings)
        blocks = {f"blocks_{i}": functools.partial(block, i % 2 == 1) for i in range(len(self.drop_path))}
        return run_blocks(self, blocks, self.drop_path, x, train)


class PatchEmbed(Part):
    """Cuts images into patches of 4x4 pixels, maps each to a token and normalises it.

    Attributes:
      dim: channels of a token.
    """

    dim: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, height / 4, width / 4, dim]``."""
        return layer_norm(self, "norm", patches(self, "proj", self.dim, _PATCH_SIZE)(images))


class Head(Part):
    """Averages a map over its positions and classifies the mean.

    Attributes:
      num_classes: outputs.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, num_classes]``."""
        return nn.Dense(self.num_classes, dtype=self.settings.dtype, name="fc")(x.mean(axis=(1, 2)))


class SwinTransformerV2(Part):
    """A Swin Transformer V2 for image classification.

    Attributes:
      num_classes: outputs.
      image_size: height and width of the images, in pixels, a multiple of 4.
      window: edge of an attention window, in tokens.
      dim: channels of the first stage; each later one has twice as many.
      depths: blocks of each stage.
      heads: attention heads in each stage.
      drop_path: probability of dropping the last block's residual branches; the earlier blocks' rise linearly to it.
    """

    num_classes: int
    image_size: int
    window: int
    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
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
          ValueError: if the images are not of ``image_size``, or that is no multiple of 4.
        """
        check_images(self, images, _PATCH_SIZE)
        x = PatchEmbed(self.dim, settings=self.settings, name="patch_embed")(images)
        rates = drop_path_rates(self.drop_path, sum(self.depths))
        for i, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            own, rates = tuple(rates[:depth]), rates[depth:]
            x = Stage(i > 0, heads, self.window, own, settings=self.settings, name=f"layers_{i}")(x, train)
        x = layer_norm(self, "norm", x)
        return Head(self.num_classes, settings=self.settings, name="head")(x)


_TINY = {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)}
_SMALL = {"dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)}
_BASE = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}

MODELS = {
    f"swinv2_{size}_window{window}_256": ModelInfo(
        SwinTransformerV2,
        {"window": window, **arguments},
        Images(256, crop=0.9),
        Layers(r"blocks_\d+/(attn/(qkv|proj)|mlp/fc[12])$|downsample/reduction$"),
        TimmFiles(buffers=r"\.(relative_coords_table|relative_position_index|attn_mask)$"),
    )
    for size, arguments in (("tiny", _TINY), ("small", _SMALL), ("base", _BASE))
    for window in (8, 16)
}
