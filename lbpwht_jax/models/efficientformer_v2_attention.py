"""The attention of EfficientFormerV2, on maps: with talking heads in its blocks, strided in its last downsampling."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.models.blocks import Part, dense
from lbpwht_jax.models.conv_blocks import ConvNorm, DenseNorm, attention_biases, conv3x3, softmax
from lbpwht_jax.ops.attention import kept_attention
from lbpwht_jax.ops.attention_biased import biased_attention
from lbpwht_jax.ops.gelu import coded_gelu

_HEADS = 8


def _heads(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], _HEADS, -1)


class Attention(Part):
    """Self-attention over a map whose heads are mixed by 1x1 convolutions before and after the softmax.

    The two talking-head convolutions see the attention as a map of queries by keys with the heads as channels.

    Attributes:
      stride: stride of a depthwise convolution in front, undone by bilinear interpolation after the attention; 1 for neither.
      key_dim: channels of a head's queries and keys; values have four times as many.
    """

    stride: int = 1
    key_dim: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, scaled_by: jax.Array | None = None) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``, multiples of ``stride``; so is the result.

        ``scaled_by`` as in ``joined_norm``.
        """
        shape, channels = x.shape, x.shape[-1]
        if self.stride > 1:
            x = ConvNorm(channels, self.stride, depthwise=True, settings=self.settings, name="stride_conv")(x, train)
        keys, values = _HEADS * self.key_dim, 4 * _HEADS * self.key_dim
        query, key, value = (
            DenseNorm(features, settings=self.settings, name=name)(x, train)
            for name, features in (("q", keys), ("k", keys), ("v", values))
        )
        local = ConvNorm(values, depthwise=True, settings=self.settings, name="v_local")(value, train)
        attend = Attention._attend
        if self.settings.residuals is not None and self.settings.residuals.recompute_scores:
            attend = nn.remat(attend)
        x = attend(self, query, key, value) + local
        if self.stride > 1:
            x = jax.image.resize(x, (*shape[:3], values), "bilinear")
        x = coded_gelu(x, self.settings.slope_bits)
        return DenseNorm(channels, settings=self.settings, name="proj")(x, train, scaled_by)

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """The attended values, a map like ``value``."""
        logits = jnp.einsum("bqhc,bkhc->bqkh", _heads(query), _heads(key)) * self.key_dim**-0.5
        biases = attention_biases(self, _HEADS, *query.shape[1:3])
        logits = logits + jnp.moveaxis(biases, 0, -1)[None].astype(logits.dtype)
        weights = softmax(dense(self, "talking_head1", _HEADS)(logits), axis=2)
        weights = dense(self, "talking_head2", _HEADS)(weights)
        return jnp.einsum("bqkh,bkhc->bqhc", weights, _heads(value)).reshape(value.shape)


class StridedQuery(Part):
    """Queries of every second token along both axes, from the token and a depthwise convolution around it.

    Attributes:
      features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to a map of half the height and width, rounded up."""
        x = conv3x3(self, "local", x.shape[-1], 2, depthwise=True)(x) + x[:, ::2, ::2]
        return DenseNorm(self.features, settings=self.settings, name="proj")(x, train)


class AttentionDownsample(Part):
    """Attention of every second token along both axes over all of the map.

    Attributes:
      features: output channels.
      key_dim: channels of a head's queries and keys; values have four times as many.
    """

    features: int
    key_dim: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to a map of half the height and width, rounded up."""
        keys, values = _HEADS * self.key_dim, 4 * _HEADS * self.key_dim
        query = StridedQuery(keys, settings=self.settings, name="q")(x, train)
        key = DenseNorm(keys, settings=self.settings, name="k")(x, train)
        value = DenseNorm(values, settings=self.settings, name="v")(x, train)
        local = ConvNorm(values, 2, depthwise=True, settings=self.settings, name="v_local")(value, train)
        biases = jnp.moveaxis(attention_biases(self, _HEADS, *x.shape[1:3], stride=2), 0, -1)[None]
        heads = [_heads(map_) for map_ in (query, key, value)]
        x = kept_attention(biased_attention, self.settings.residuals, heads, biases).reshape(local.shape) + local
        return DenseNorm(self.features, settings=self.settings, name="proj")(coded_gelu(x, self.settings.slope_bits), train)
