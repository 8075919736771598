"""Vision transformers: ViT (Dosovitskiy et al., 2021) and those that differ from it little, down to DeiT, CLIP and DINOv2."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.models.blocks import DropPath, Mlp, Part, ResidualBlock, check_images, dense, drop_path_rates, patches
from lbpwht_jax.models.loops import run_blocks
from lbpwht_jax.models.norms import layer_norm, layer_scale
from lbpwht_jax.models.vit_options import AttentionPool, Options
from lbpwht_jax.ops.attention import packed_attention
from lbpwht_jax.ops.spec import Grid


class PatchEmbed(Part):
    """Cuts images into patches and maps each to one token.

    Attributes:
      dim: channels of a token.
      patch_size: edge of a patch, in pixels.
      use_bias: whether to add a bias.
    """

    dim: int
    patch_size: int
    use_bias: bool

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, height / patch_size, width / patch_size, dim]``."""
        return patches(self, "proj", self.dim, self.patch_size, use_bias=self.use_bias)(images)


class Attention(Part):
    """Multi-head self-attention with a fused ``qkv`` layer.

    Attributes:
      heads: number of heads; the channels are divided among them.
      grid: patches along each axis.
      prefix_tokens: tokens in front of the patches'.
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
        x = packed_attention(qkv.reshape(batch, length, 3, self.heads, channels // self.heads), self.settings.residuals)
        return dense(self, "proj", channels, **tokens)(x.reshape(batch, length, channels))


class Block(ResidualBlock):
    """A pre-norm transformer block.

    Attributes:
      heads: attention heads.
      mlp_ratio: hidden channels of the MLP over the block's channels.
      grid: patches along each axis.
      prefix_tokens: tokens in front of the patches'.
      options: those of the model.
    """

    heads: int
    mlp_ratio: float
    grid: Grid
    prefix_tokens: int
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, prefix_tokens + tokens, channels]``; the result has the same shape."""
        common = {"grid": self.grid, "prefix_tokens": self.prefix_tokens, "settings": self.settings}
        epsilon = self.options.epsilon
        y = Attention(self.heads, **common, name="attn")(layer_norm(self, "norm1", x, epsilon=epsilon))
        x = x + DropPath(self.drop_path)(self._scaled("ls1", y), train)
        mlp = Mlp(int(self.mlp_ratio * x.shape[-1]), activation=self.options.activation, **common, name="mlp")
        y = mlp(layer_norm(self, "norm2", x, epsilon=epsilon))
        return x + DropPath(self.drop_path)(self._scaled("ls2", y), train)

    def _scaled(self, name: str, branch: jax.Array) -> jax.Array:
        start = self.options.layer_scale
        return branch if start is None else layer_scale(self, name, branch, start)


class VisionTransformer(Part):
    """A vision transformer for image classification.

    Attributes:
      num_classes: outputs.
      image_size: height and width of the images, in pixels, a multiple of ``patch_size``.
      patch_size: edge of a patch, in pixels.
      dim: channels.
      depth: number of blocks.
      heads: attention heads per block.
      mlp_ratio: hidden channels of the MLPs over ``dim``; their product is rounded down.
      distilled: adds DeiT's distillation token and its head; the two heads' outputs are averaged.
      options: how it differs from the plain one.
      drop_path: probability of dropping the last block's residual branches; the earlier blocks' rise linearly to it.
    """

    num_classes: int
    image_size: int
    patch_size: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4
    distilled: bool = False
    options: Options = Options()
    drop_path: float = 0.0

    @property
    def prefix(self) -> dict[str, int]:
        """How many tokens stand in front of the patches', by the name of their parameter, in order."""
        options = self.options
        class_tokens = int(options.pooling == "token")
        counts = {"cls_token": class_tokens, "dist_token": int(self.distilled), "reg_token": options.registers}
        return {name: count for name, count in counts.items() if count}

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
        options, prefix_tokens = self.options, sum(self.prefix.values())
        x = PatchEmbed(self.dim, self.patch_size, not options.pre_norm, settings=self.settings, name="patch_embed")(images)
        batch, *grid, _ = x.shape
        x = self._placed(x.reshape(batch, -1, self.dim))
        if options.pre_norm:
            x = layer_norm(self, "norm_pre", x, epsilon=options.epsilon)
        common = {"grid": tuple(grid), "prefix_tokens": prefix_tokens, "options": options, "settings": self.settings}
        block = functools.partial(Block, self.heads, self.mlp_ratio, **common)
        blocks = {f"blocks_{i}": block for i in range(self.depth)}
        x = run_blocks(self, blocks, drop_path_rates(self.drop_path, self.depth), x, train)
        x = layer_norm(self, "norm", x, epsilon=options.epsilon)
        if options.pooling == "attention":
            seen = AttentionPool(self.heads, int(self.mlp_ratio * self.dim), **common, name="attn_pool")(x)
        else:
            seen = x[:, 0] if options.pooling == "token" else x[:, prefix_tokens:].mean(axis=1)
        logits = nn.Dense(self.num_classes, dtype=self.settings.dtype, name="head")(seen)
        if self.distilled:
            logits = (logits + nn.Dense(self.num_classes, dtype=self.settings.dtype, name="head_dist")(x[:, 1])) / 2
        return logits

    def _placed(self, patches: jax.Array) -> jax.Array:
        """``[batch, tokens, dim]`` with the other tokens in front, and position embeddings."""
        init, batch = nn.initializers.normal(0.02), patches.shape[0]
        prefix = [self.param(name, init, (1, count, self.dim)) for name, count in self.prefix.items()]
        tokens = [jnp.broadcast_to(token.astype(patches.dtype), (batch, *token.shape[1:])) for token in prefix]
        x = jnp.concatenate([*tokens, patches], axis=1)
        placed = x if self.options.prefix_positions else patches
        placed = placed + self.param("pos_embed", init, (1, *placed.shape[1:])).astype(x.dtype)
        return placed if self.options.prefix_positions else jnp.concatenate([*tokens, placed], axis=1)


def resample_positions(state: Mapping[str, np.ndarray], module: Any) -> dict[str, np.ndarray]:
    """Brings a checkpoint's position embeddings to the module's grid, by antialiased bicubic interpolation as timm does.

    Args:
      state: timm's state dict; ``pos_embed`` is ``[1, prefix_tokens + height * width, dim]`` of a square grid, or without the
        prefix where the model's tokens in front have no positions.
      module: a ``VisionTransformer``.

    Returns:
      The state dict, with the embeddings of the tokens in front as they were.

    Raises:
      ValueError: if the positions form no square grid.
    """
    prefix = sum(module.prefix.values()) if module.options.prefix_positions else 0
    edge = module.image_size // module.patch_size
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
