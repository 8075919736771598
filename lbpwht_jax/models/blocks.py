"""What the model families share: the plan of low-rank layers, dense layers that know their grid, drop path."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.layers.linen import LowRankDense
from lbpwht_jax.ops.spec import Grid, LowRankSpec


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which dense layers of a model are backpropagated at low rank.

    Attributes:
      spec: for the layers that match; ``None`` leaves every layer exact.
      layers: regular expression, searched in a layer's path, such as ``"blocks_0/mlp/fc1"``.
    """

    spec: LowRankSpec | None = None
    layers: str = ""

    def __call__(self, path: str) -> LowRankSpec | None:
        """The spec of the layer at ``path``, ``None`` where it stays exact."""
        return self.spec if self.spec is not None and re.search(self.layers, path) else None


def dense(
    parent: Any, name: str, features: int, *, grid: Grid | None = None, prefix_tokens: int = 0, **arguments
) -> LowRankDense:
    """A dense layer (or 1x1 convolution) of ``parent``, low-rank if ``parent.plan`` says so, computing in ``parent.dtype``.

    Args:
      parent: the module under construction, with fields ``plan`` and ``dtype``.
      name: of the new layer.
      features: output channels.
      grid: tokens along each axis for ``[..., tokens, channels]``; ``None`` for channels-last maps.
      prefix_tokens: leading tokens outside the grid.
      **arguments: further fields of ``LowRankDense``.
    """
    spec = parent.plan("/".join((*parent.path, name)))
    return LowRankDense(features, spec=spec, grid=grid, prefix_tokens=prefix_tokens, dtype=parent.dtype, name=name, **arguments)


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
    """Stochastic depth: drops a residual branch a sample, scaling the kept ones by ``1 / (1 - rate)``.

    Attributes:
      rate: probability of dropping a sample's branch.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, ...]``; draws from the rng stream ``"dropout"`` while training."""
        if not train or self.rate == 0.0:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Drop-path rates rising linearly from 0 at the first block to ``rate`` at the last, as the reference models do."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


class Mlp(nn.Module):
    """The two dense layers of a transformer block, ``fc1``, GELU, ``fc2``.

    Attributes:
      hidden: channels between the two.
      grid: tokens along each axis, ``None`` for channels-last maps.
      prefix_tokens: leading tokens outside the grid.
      plan: which layers are low-rank.
      dtype: of the computation.
    """

    hidden: int
    grid: Grid | None
    prefix_tokens: int = 0
    plan: Plan = Plan()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[..., tokens, channels]`` or ``[..., *grid, channels]``; the result has the same shape."""
        tokens = {"grid": self.grid, "prefix_tokens": self.prefix_tokens}
        channels = x.shape[-1]
        x = dense(self, "fc1", self.hidden, **tokens)(x)
        return dense(self, "fc2", channels, **tokens, activation="gelu")(x)
