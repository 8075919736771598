"""DINOv3's vision transformers (Siméoni et al., 2025), timm's names: rotary position embeddings, registers, layer scale."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.models.blocks import DropPath, Mlp, Part, ResidualBlock, check_images, dense, drop_path_rates
from lbpwht_jax.models.info import Images, Layers, ModelInfo, TimmFiles
from lbpwht_jax.models.loops import run_blocks
from lbpwht_jax.models.norms import layer_norm, layer_scale, widen
from lbpwht_jax.models.vit import PatchEmbed
from lbpwht_jax.ops.attention import attention, kept_attention
from lbpwht_jax.ops.spec import Grid

_EPSILON = 1e-5
_LONGEST = 100.0  # what the periods of the rotations rise to, in half edges of the image
_MLP_RATIO = 4
_PATCH_SIZE = 16
_PREFIX = {"cls_token": 1, "reg_token": 4}
_PREFIX_TOKENS = sum(_PREFIX.values())


@functools.cache
def rotations(grid: Grid, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines of the angles by which the channels of each token are rotated; those in front of the patches' stay.

    The patches' centres lie in [-1, 1] along both axes. A quarter of the channels has angles ``2 pi row / period``, of
    periods from 1 to nearly 100 in geometric steps, the next quarter has those of the columns, and the other half the same.

    Args:
      grid: patches along each axis.
      channels: of a head, a multiple of 4.

    Returns:
      Two float32 arrays, ``[tokens in front + patches, channels]``.
    """
    periods = _LONGEST ** (np.arange(channels // 4) / (channels // 4))
    rows, columns = np.meshgrid(*(2 * (np.arange(n) + 0.5) / n - 1 for n in grid), indexing="ij")
    places = np.stack([rows.ravel(), columns.ravel()], axis=1)
    angles = (2 * math.pi * places[:, :, None] / periods).reshape(len(places), -1)
    angles = np.tile(np.concatenate([np.zeros((_PREFIX_TOKENS, channels // 2)), angles]), 2)
    return np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)


def rotate(x: jax.Array, grid: Grid) -> jax.Array:
    """Rotates pairs of channels, half of them apart, by angles that say where a token is (Su et al., 2021).

    Args:
      x: queries or keys, ``[batch, tokens, heads, channels]``; rotated in at least float32.
      grid: patches along each axis.
    """
    sines, cosines = (jnp.asarray(table)[None, :, None].astype(widen(x).dtype) for table in rotations(grid, x.shape[-1]))
    first, second = jnp.split(widen(x), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (widen(x) * cosines + turned * sines).astype(x.dtype)


class Attention(Part):
    """Multi-head self-attention with rotated queries and keys.

    Attributes:
      heads: number of heads; the channels are divided among them.
      grid: patches along each axis.
      biased: whether queries and values, but not keys, have biases.
    """

    heads: int
    grid: Grid
    biased: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[batch, tokens, channels]``; the result has the same shape."""
        tokens = {"grid": self.grid, "prefix_tokens": _PREFIX_TOKENS}
        batch, length, channels = x.shape
        qkv = dense(self, "qkv", 3 * channels, use_bias=False, **tokens)(x)
        if self.biased:
            q_bias, v_bias = (self.param(name, nn.initializers.zeros_init(), (channels,)) for name in ("q_bias", "v_bias"))
            bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(qkv.dtype)
            qkv = qkv + bias.reshape(1, 1, -1)
        query, key, value = jnp.moveaxis(qkv.reshape(batch, length, 3, self.heads, channels // self.heads), 2, 0)
        operands = (rotate(query, self.grid), rotate(key, self.grid), value)
        x = kept_attention(attention, self.settings.residuals, operands)
        return dense(self, "proj", channels, **tokens)(x.reshape(batch, length, channels))


class Block(ResidualBlock):
    """A pre-norm transformer block, its residual branches scaled.

    Attributes:
      heads: attention heads.
      grid: patches along each axis.
      biased: as for ``Attention``.
    """

    heads: int
    grid: Grid
    biased: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, tokens, channels]``; the result has the same shape."""
        attend = Attention(self.heads, self.grid, self.biased, settings=self.settings, name="attn")
        y = attend(layer_norm(self, "norm1", x, epsilon=_EPSILON))
        x = x + DropPath(self.drop_path)(layer_scale(self, "ls1", y), train)
        mlp = Mlp(_MLP_RATIO * x.shape[-1], self.grid, _PREFIX_TOKENS, settings=self.settings, name="mlp")
        y = mlp(layer_norm(self, "norm2", x, epsilon=_EPSILON))
        return x + DropPath(self.drop_path)(layer_scale(self, "ls2", y), train)


class DinoV3(Part):
    """A DINOv3 vision transformer for image classification: the head sees the average of the patches' tokens.

    Attributes:
      num_classes: outputs.
      image_size: height and width of the images, in pixels, a multiple of 16.
      dim: channels.
      depth: number of blocks.
      heads: attention heads per block.
      biased: as for ``Attention``.
      drop_path: probability of dropping the last block's residual branches; the earlier blocks' rise linearly to it.
    """

    num_classes: int
    image_size: int
    dim: int
    depth: int
    heads: int
    biased: bool = False
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
          ValueError: if the images are not of ``image_size``, or that is no multiple of 16.
        """
        check_images(self, images, _PATCH_SIZE)
        x = PatchEmbed(self.dim, _PATCH_SIZE, True, settings=self.settings, name="patch_embed")(images)
        batch, *grid, _ = x.shape
        init = nn.initializers.normal(0.02)
        prefix = [self.param(name, init, (1, count, self.dim)) for name, count in _PREFIX.items()]
        prefix = [jnp.broadcast_to(token.astype(x.dtype), (batch, *token.shape[1:])) for token in prefix]
        x = jnp.concatenate([*prefix, x.reshape(batch, -1, self.dim)], axis=1)
        block = functools.partial(Block, self.heads, tuple(grid), self.biased, settings=self.settings)
        blocks = {f"blocks_{i}": block for i in range(self.depth)}
        x = run_blocks(self, blocks, drop_path_rates(self.drop_path, self.depth), x, train)
        x = layer_norm(self, "norm", x, epsilon=_EPSILON)[:, _PREFIX_TOKENS:].mean(axis=1)
        return nn.Dense(self.num_classes, dtype=self.settings.dtype, name="head")(x)


def _info(dim: int, depth: int, heads: int, biased: bool) -> ModelInfo:
    arguments = {"dim": dim, "depth": depth, "heads": heads, "biased": biased}
    # A plain transformer has no stages; the last quarter of its blocks stands in for the last one.
    last = "|".join(str(i) for i in range(depth - depth // 4, depth))
    layers = Layers(low_rank=r"blocks_\d+/(attn/(qkv|proj)|mlp/fc[12])$", last_stage=rf"^(blocks_({last})|norm|head)(/|$)")
    return ModelInfo(DinoV3, arguments, Images(256), layers, TimmFiles(renames=((r"\.ls(\d)\.gamma$", r".gamma_\1"),)))


MODELS = {
    f"vit_{size}_patch16_dinov3{suffix}": _info(*shape, biased)
    for size, shape in (("small", (384, 12, 6)), ("base", (768, 12, 12)), ("large", (1024, 24, 16)))
    for suffix, biased in (("", False), ("_qkvb", True))
}
