"""What the convolutional families share: convolutions, pooling, attention on a map with its biases, and their files."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lbpwht_jax.models.affine_conv import AffineConv
from lbpwht_jax.models.blocks import Part, dense
from lbpwht_jax.models.norms import joined_norm, widen
from lbpwht_jax.ops.affine import Activation
from lbpwht_jax.ops.convolution import ConvProduct


def conv3x3(parent: Part, name: str, features: int, stride: int = 1, *, depthwise: bool = False) -> AffineConv:
    """A 3x3 convolution within ``parent``, padded by one zero on every side: maps shrink to ``ceil(size / stride)``."""
    return convolution(parent, name, features, 3, stride, depthwise=depthwise)


def convolution(
    parent: Part,
    name: str,
    features: int,
    size: int,
    stride: int = 1,
    *,
    padding: int | None = None,
    depthwise: bool = False,
) -> AffineConv:
    """A convolution within ``parent``.

    Args:
      parent: the module under construction.
      name: the new layer's name.
      features: output channels.
      size: edge of its window.
      stride: stride along both axes.
      padding: zeros on every side; by default as many as keep a map's size where the stride is 1 and the window odd.
      depthwise: one kernel per channel; ``features`` must be the input's channels.
    """
    groups = features if depthwise else 1
    residuals = parent.settings.residuals
    product = ConvProduct(None if residuals is None else residuals.norm_bits)
    fields = {"feature_group_count": groups, "dtype": parent.settings.dtype, "name": name, "conv_general_dilated": product}
    return AffineConv(features, (size, size), stride, padding=size // 2 if padding is None else padding, **fields)


class AveragePool(nn.Module):
    """3x3 average pooling of stride 1; at the border it averages the tokens that exist."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, height, width, channels]`` to the same shape; sums are taken in at least float32."""
        rows, columns = (np.add(1, np.arange(n) > 0) + (np.arange(n) < n - 1) for n in x.shape[1:3])
        share = jnp.asarray(1 / np.outer(rows, columns), widen(x).dtype)
        return (_neighbour_sums(widen(x)) * share.reshape(1, *share.shape, 1)).astype(x.dtype)


@jax.custom_vjp
def _neighbour_sums(x: jax.Array) -> jax.Array:
    """Sums over 3x3 neighbourhoods of ``[batch, height, width, channels]``; linear and its own transpose.

    One pass over shifted views, twice to three times as fast on CPU as XLA's windowed sums.
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return functools.reduce(jnp.add, shifted)


_neighbour_sums.defvjp(lambda x: (_neighbour_sums(x), None), lambda _, g: (_neighbour_sums(g),))


class ConvNorm(Part):
    """A 3x3 convolution, ``conv``, and its batch normalisation, ``bn``.

    Attributes:
      features: output channels.
      stride: stride along both axes.
      depthwise: one kernel per channel.
      activation: after the normalisation, ``"gelu"``, ``"relu"`` or ``None``.
    """

    features: int
    stride: int = 1
    depthwise: bool = False
    activation: Activation = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, ceil(height / stride), ceil(width / stride), features]``."""
        layer = conv3x3(self, "conv", self.features, self.stride, depthwise=self.depthwise)
        return joined_norm(self, layer, "bn", x, train, self.activation)


class DenseNorm(Part):
    """A 1x1 convolution, ``conv``, which can be low-rank, and its batch normalisation, ``bn``.

    Attributes:
      features: output channels.
      activation: after the normalisation, ``"gelu"``, ``"relu"`` or ``None``.
    """

    features: int
    activation: Activation = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, scaled_by: jax.Array | None = None) -> jax.Array:
        """``[batch, height, width, channels]`` to ``[batch, height, width, features]``; ``scaled_by`` as in ``joined_norm``."""
        return joined_norm(self, dense(self, "conv", self.features), "bn", x, train, self.activation, scaled_by)


def softmax(x: jax.Array, axis: int) -> jax.Array:
    """Softmax computed in at least float32 and returned in ``x``'s dtype."""
    return nn.softmax(widen(x), axis).astype(x.dtype)


def offset_index(height: int, width: int, stride: int = 1) -> np.ndarray:
    """Which attention bias belongs to each pair of query and key on a map: the one of their absolute offset.

    Args:
      height, width: the map's size, in tokens.
      stride: queries are every ``stride``-th token along both axes.

    Returns:
      ``[queries, keys]`` integers, ``|rows apart| * width + |columns apart|``.
    """
    rows, columns = (abs(np.arange(0, n, stride)[:, None] - np.arange(n)) for n in (height, width))
    index = rows[:, None, :, None] * width + columns[None, :, None, :]
    return index.reshape(-1, height * width)


def attention_biases(parent: nn.Module, heads: int, height: int, width: int, stride: int = 1) -> jax.Array:
    """Learned biases of attention on a map, one per head and absolute offset, parameter ``attention_biases`` of ``parent``.

    Returns:
      ``[heads, queries, keys]``, queries and keys as in ``offset_index``.
    """
    table = parent.param("attention_biases", nn.initializers.zeros_init(), (heads, height * width))
    return table[:, offset_index(height, width, stride)]


def resample_attention_biases(state_dict: Mapping[str, np.ndarray], key: str, size: int) -> dict[str, np.ndarray]:
    """Resamples tables of attention biases, in timm's layout, to maps of another size.

    The references have no rule for it. Ours keeps each offset's share of the map: the bias of an offset of ``d`` tokens
    on a map of ``size`` is what stood at ``d * old / size`` on a map of ``old``, linearly interpolated along both axes and
    held beyond the table's last entry. An offset of 0 so keeps its bias.

    Args:
      state_dict: arrays by timm's keys.
      key: regular expression, searched in the keys, of the tables: ``[heads, old * old]``.
      size: height and width of the map wanted, in tokens.

    Returns:
      The state dict with those tables as ``[heads, size * size]``; tables of that shape are passed on as they are.

    Raises:
      ValueError: if a table does not belong to a square map.
    """
    resampled = dict(state_dict)
    for name, table in state_dict.items():
        if not re.search(key, name) or table.shape[-1] == size * size:
            continue
        old = math.isqrt(table.shape[-1])
        if table.ndim != 2 or old * old != table.shape[-1]:
            raise ValueError(f"{name}: attention biases must be [heads, size * size] to be resampled, got {list(table.shape)}")
        at = np.arange(size) * old / size
        weights = np.stack([np.interp(at, np.arange(old), row) for row in np.eye(old)], axis=1)
        maps = np.einsum("ai,bj,hij->hab", weights, weights, table.reshape(-1, old, old).astype(np.float64))
        resampled[name] = maps.reshape(-1, size * size).astype(table.dtype)
    return resampled


def batch_counters(module: Any) -> dict[str, np.ndarray]:
    """The counters of batches that torch keeps beside every running mean, at zero, by timm's keys.

    Args:
      module: a model, with a field ``image_size``, in pixels.
    """
    images = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, 3), jnp.float32)
    statistics = jax.eval_shape(functools.partial(module.init, jax.random.key(0)), images)["batch_stats"]
    layers = [path[:-1] for path in flatten_dict(statistics) if path[-1] == "mean"]
    names = [".".join(re.sub(r"_(\d+)$", r".\1", part) for part in layer) for layer in layers]
    return {f"{name}.num_batches_tracked": np.zeros((), np.int64) for name in names}
