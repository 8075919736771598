"""Plain and distilled vision transformers: ViT (Dosovitskiy et al., 2021) and DeiT (Touvron et al., 2021), timm's names."""

import functools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.models.blocks import DropPath, Mlp, Part, ResidualBlock, check_images, dense, drop_path_rates
from lbpwht_jax.models.info import Images, Layers, ModelInfo, TimmFiles
from lbpwht_jax.models.loops import run_blocks
from lbpwht_jax.models.norms import layer_norm
from lbpwht_jax.ops.attention import attention, kept_attention
from lbpwht_jax.ops.spec import Grid

_EPSILON = 1e-6


class PatchEmbed(Part):
    """Cuts images into patches and maps each to one token.

    Attributes:
      dim: channels of a token.
      patch_size: edge of a patch, in pixels.
    """

    dim: int
    patch_size: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, height / patch_size, width / patch_size, dim]``."""
        size = (self.patch_size, self.patch_size)
        return nn.Conv(self.dim, size, size, "VALID", dtype=self.settings.dtype, name="proj")(images)


class Attention(Part):
    """Multi-head self-attention with a fused ``qkv`` layer.

    Attributes:
      heads: number of heads; the channels are divided among them.
      grid: patches along each axis.
      prefix_tokens: class and distillation tokens in front.
    """

    heads: int
    grid: Grid
    prefix_tokens: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[batch, prefix_tokens + tokens, channels]``; the result has the same shape."""
        tokens = {"grid": self.grid, "prefix_tokens": self.prefix_tokens}
        batch, length, channels = x.shape
        qkv = dense(self, "qkv", 3 * channels, **tokens)(x)
        query, key, value = jnp.moveaxis(qkv.reshape(batch, length, 3, self.heads, channels // self.heads), 2, 0)
        x = kept_attention(attention, self.settings.residuals, (query, key, value))
        return dense(self, "proj", channels, **tokens)(x.reshape(batch, length, channels))


class Block(ResidualBlock):
    """A pre-norm transformer block.

    Attributes:
      heads: attention heads.
      mlp_ratio: hidden channels of the MLP over the block's channels.
      grid: patches along each axis.
      prefix_tokens: class and distillation tokens in front.
    """

    heads: int
    mlp_ratio: int
    grid: Grid
    prefix_tokens: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, prefix_tokens + tokens, channels]``; the result has the same shape."""
        common = {"grid": self.grid, "prefix_tokens": self.prefix_tokens, "settings": self.settings}
        y = Attention(self.heads, **common, name="attn")(layer_norm(self, "norm1", x, epsilon=_EPSILON))
        x = x + DropPath(self.drop_path)(y, train)
        y = Mlp(self.mlp_ratio * x.shape[-1], **common, name="mlp")(layer_norm(self, "norm2", x, epsilon=_EPSILON))
        return x + DropPath(self.drop_path)(y, train)


class VisionTransformer(Part):
    """A vision transformer for image classification.

    Attributes:
      num_classes: outputs.
      image_size: height and width of the images, in pixels, a multiple of ``patch_size``.
      patch_size: edge of a patch, in pixels.
      dim: channels.
      depth: number of blocks.
      heads: attention heads per block.
      mlp_ratio: hidden channels of the MLPs over ``dim``.
      distilled: adds DeiT's distillation token and its head; the two heads' outputs are averaged.
      drop_path: probability of dropping the last block's residual branches; the earlier blocks' rise linearly to it.
    """

    num_classes: int
    image_size: int
    patch_size: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: int = 4
    distilled: bool = False
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
          ValueError: if the images are not of ``image_size``, or that is no multiple of ``patch_size``.
        """
        check_images(self, images, self.patch_size)
        x = PatchEmbed(self.dim, self.patch_size, settings=self.settings, name="patch_embed")(images)
        batch, *grid, _ = x.shape
        x = x.reshape(batch, -1, self.dim)
        names = ["cls_token", "dist_token"] if self.distilled else ["cls_token"]
        tokens = [self.param(name, nn.initializers.normal(0.02), (1, 1, self.dim)) for name in names]
        tokens = [jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.dim)) for token in tokens]
        x = jnp.concatenate([*tokens, x], axis=1)
        x = x + self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:])).astype(x.dtype)
        block = functools.partial(Block, self.heads, self.mlp_ratio, tuple(grid), len(names), settings=self.settings)
        blocks = {f"blocks_{i}": block for i in range(self.depth)}
        x = run_blocks(self, blocks, drop_path_rates(self.drop_path, self.depth), x, train)
        x = layer_norm(self, "norm", x, epsilon=_EPSILON)
        logits = nn.Dense(self.num_classes, dtype=self.settings.dtype, name="head")(x[:, 0])
        if self.distilled:
            logits = (logits + nn.Dense(self.num_classes, dtype=self.settings.dtype, name="head_dist")(x[:, 1])) / 2
        return logits


def resample_positions(state: Mapping[str, np.ndarray], module: nn.Module) -> dict[str, np.ndarray]:
    """Brings a checkpoint's position embeddings to the module's grid, by antialiased bicubic interpolation as timm does.

    Args:
      state: timm's state dict; ``pos_embed`` is ``[1, prefix_tokens + height * width, dim]`` of a square grid.
      module: a ``VisionTransformer``.

    Returns:
      The state dict, with the class and distillation tokens' embeddings as they were.

    Raises:
      ValueError: if the positions form no square grid.
    """
    prefix, edge = 1 + module.distilled, module.image_size // module.patch_size
    positions = state["pos_embed"]
    count = positions.shape[1] - prefix
    if count == edge * edge:
        return dict(state)
    old = math.isqrt(max(count, 0))
    if old * old != count or not count:
        raise ValueError(
            f"pos_embed {list(positions.shape)} holds {count} positions after {prefix} prefix tokens, which is no square grid; "
            "load the file into the model it was made for"
        )
    grid = positions[:, prefix:].astype(np.float32).reshape(old, old, -1)
    grid = jax.image.resize(grid, (edge, edge, grid.shape[-1]), "cubic", antialias=True)
    grid = np.asarray(grid).reshape(1, edge * edge, -1).astype(positions.dtype)
    return {**state, "pos_embed": np.concatenate([positions[:, :prefix], grid], axis=1)}


def _info(patch_size: int, dim: int, depth: int, heads: int, images: Images, distilled: bool = False) -> ModelInfo:
    arguments = {"patch_size": patch_size, "dim": dim, "depth": depth, "heads": heads, "distilled": distilled}
    # A plain transformer has no stages; the last quarter of its blocks stands in for the last one.
    last = "|".join(str(i) for i in range(depth - max(depth // 4, 1), depth))
    layers = Layers(
        low_rank=r"blocks_\d+/(attn/(qkv|proj)|mlp/fc[12])$", last_stage=rf"^(blocks_({last})|norm|head(_dist)?)(/|$)"
    )
    return ModelInfo(VisionTransformer, arguments, images, layers, TimmFiles(resample=resample_positions))


_MICRO = Images(28, channels=1, mean=(0.5,), std=(0.5,))
_VIT = Images(224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=0.9)
_DEIT = Images(224, crop=0.9)

MODELS = {
    "vit_micro_patch4_28": _info(4, 96, 6, 4, _MICRO),
    "vit_tiny_patch16_224": _info(16, 192, 12, 3, _VIT),
    "vit_small_patch16_224": _info(16, 384, 12, 6, _VIT),
    "vit_base_patch16_224": _info(16, 768, 12, 12, _VIT),
    "vit_base_patch32_224": _info(32, 768, 12, 12, _VIT),
    "vit_large_patch16_224": _info(16, 1024, 24, 16, _VIT),
    "deit_tiny_patch16_224": _info(16, 192, 12, 3, _DEIT),
    "deit_small_patch16_224": _info(16, 384, 12, 6, _DEIT),
    "deit_base_patch16_224": _info(16, 768, 12, 12, _DEIT),
    "deit_tiny_distilled_patch16_224": _info(16, 192, 12, 3, _DEIT, distilled=True),
    "deit_small_distilled_patch16_224": _info(16, 384, 12, 6, _DEIT, distilled=True),
    "deit_base_distilled_patch16_224": _info(16, 768, 12, 12, _DEIT, distilled=True),
}
