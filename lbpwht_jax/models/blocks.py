"""What the model families share: settings, dense layers that know their grid, GELU, drop path and the MLP."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.layers.linen import LowRankDense
from lbpwht_jax.models.quick_gelu import quick_gelu
from lbpwht_jax.ops.convolution import ConvProduct
from lbpwht_jax.ops.matmul import Link
from lbpwht_jax.ops.residuals import Residuals
from lbpwht_jax.ops.spec import Grid

Loop = tuple[tuple[str, ...], ...]
Activation = Literal["gelu", "quick_gelu"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all modules of a model have in common.

    Attributes:
      dtype: dtype of the computation; ``None`` for that of the images. Parameters are float32; norms and softmax compute in
        at least float32.
      frozen_batch_norm: keeps batch normalisation, where the family has any, on its running statistics while training.
      residuals: what is kept for the backward pass; ``None`` for what JAX keeps of itself.
      remat: recomputes each block in the backward pass instead of keeping its activations.
      joins_norms: computes batch normalisation on running statistics, and layer scale behind it, as one with the layer beside
        it, in float32 and wider, and in all dtypes where ``residuals`` is set; off where each module is to be told apart.
      loops: which blocks run as loops: the paths of the blocks of each step of each loop. Steps are equal but for their
        parameters and rates of drop path.
    """

    dtype: Any = None
    frozen_batch_norm: bool = False
    residuals: Residuals | None = None
    remat: bool = False
    joins_norms: bool = True
    loops: tuple[Loop, ...] = ()

    @property
    def slope_bits(self) -> int | None:
        """Bits of the activations' slopes."""
        return None if self.residuals is None else self.residuals.slope_bits


class Part(nn.Module, kw_only=True):
    """A module of a model, or the model itself.

    Attributes:
      settings: those of the model; a keyword argument, which each module passes on to those inside it.
    """

    settings: Settings = Settings()


class ResidualBlock(Part, kw_only=True):
    """One of several blocks in a row, each with residual branches.

    Attributes:
      drop_path: probability of dropping each residual branch while training.
    """

    drop_path: float | jax.Array = 0.0


def dense(
    parent: Part, name: str, features: int, *, grid: Grid | None = None, prefix_tokens: int = 0, **arguments
) -> LowRankDense:
    """A dense layer (or 1x1 convolution) within ``parent``, backpropagated exactly until the model is adapted.

    Args:
      parent: the module under construction.
      name: the new layer's name.
      features: output channels.
      grid: tokens along each axis for ``[..., tokens, channels]``; ``None`` for channels-last maps.
      prefix_tokens: leading tokens outside the grid.
      **arguments: further fields of ``LowRankDense``.
    """
    tokens = {"grid": grid, "prefix_tokens": prefix_tokens}
    residuals = parent.settings.residuals or Residuals()
    kept = {"slope_bits": residuals.slope_bits, "input_bits": residuals.dense_bits}
    return LowRankDense(features, spec=None, **tokens, **kept, dtype=parent.settings.dtype, name=name, **arguments)


def patches(parent: Part, name: str, features: int, size: int, *, use_bias: bool = True) -> nn.Conv:
    """A convolution within ``parent`` that cuts images into patches and maps each to one token.

    Args:
      parent: the module under construction.
      name: the new layer's name.
      features: channels of a token.
      size: edge of a patch.
      use_bias: whether to add a bias.
    """
    residuals = parent.settings.residuals or Residuals()
    fields = {"use_bias": use_bias, "dtype": parent.settings.dtype, "name": name}
    product = ConvProduct(residuals.dense_bits)
    return nn.Conv(features, (size, size), (size, size), "VALID", conv_general_dilated=product, **fields)


def check_images(module: Any, images: jax.Array, multiple: int) -> None:
    """Raises ``ValueError`` unless images are ``[batch, size, size, channels]`` of the module's ``image_size``.

    Args:
      module: the model, with a field ``image_size``, in pixels.
      images: its input.
      multiple: what ``image_size`` must be a multiple of.
    """
    name, size = type(module).__name__, module.image_size
    if size % multiple:
        raise ValueError(f"{name}: image_size must be a multiple of {multiple}, got {size}")
    if images.ndim != 4 or images.shape[1:3] != (size, size):
        raise ValueError(
            f"{name}: images must be [batch, {size}, {size}, channels], got {list(images.shape)}; "
            "resize them, or create the model with their image_size"
        )


class DropPath(nn.Module):
    """Stochastic depth: drops residual branches sample by sample and scales the kept ones by ``1 / (1 - rate)``.

    Attributes:
      rate: probability of dropping a sample's branch; a float32 scalar within a loop over blocks.
    """

    rate: float | jax.Array

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, ...]``; draws from the rng stream ``"dropout"`` while training."""
        if not train or (isinstance(self.rate, float) and self.rate == 0.0):
            return x
        share = 1 - self.rate
        keep = jax.random.bernoulli(self.make_rng("dropout"), share, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / jnp.asarray(share, x.dtype), jnp.zeros_like(x))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Drop-path rates rising linearly from 0 at the first block to ``rate`` at the last, as the reference models do."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


class Mlp(Part):
    """The two dense layers of a transformer block, ``fc1``, an activation, ``fc2``.

    Attributes:
      hidden: channels between the two.
      grid: tokens along each axis, ``None`` for channels-last maps.
      prefix_tokens: leading tokens outside the grid.
      activation: ``"gelu"``, the exact one, or ``"quick_gelu"``.
    """

    hidden: int
    grid: Grid | None
    prefix_tokens: int = 0
    activation: Activation = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[..., tokens, channels]`` or ``[..., *grid, channels]``; the result has the same shape."""
        tokens = {"grid": self.grid, "prefix_tokens": self.prefix_tokens}
        channels = x.shape[-1]
        link = Link()
        x = dense(self, "fc1", self.hidden, **tokens)(x, link)
        if self.activation == "quick_gelu":
            return dense(self, "fc2", channels, **tokens)(quick_gelu(x, self.settings.slope_bits))
        return dense(self, "fc2", channels, **tokens, activation="gelu")(x, link)
