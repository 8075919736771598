"""The attention of EfficientFormerV2, on maps: with talking heads in its blocks, strided in its last downsampling."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.models.blocks import Plan, dense
from lbpwht_jax.models.conv_blocks import ConvNorm, DenseNorm, attention_biases, conv3x3, softmax
from lbpwht_jax.ops.gelu import gelu

_HEADS = 8


def _heads(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], _HEADS, -1)


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.einsum("bqhc,bkhc->bqkh", _heads(query), _heads(key))


def _sums(weights: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.einsum("bqkh,bkhc->bqhc", weights, _heads(value))


class Attention(nn.Module):
    """Self-attention over a map whose heads are mixed by 1x1 convolutions before and after the softmax.

    The two talking-head convolutions see the attention as a map of queries by keys with the heads as channels.

    Attributes:
      stride: of a depthwise convolution in front, undone by bilinear interpolation after the attention; 1 for neither.
      key_dim: channels of a head's queries and keys; values have four times as many.
      frozen_batch_norm: keeps batch normalisation on its running statistics while training.
      plan: which layers are low-rank.
      dtype: of the computation.
    """

    stride: int = 1
    key_dim: int = 32
    frozen_batch_norm: bool = False
    plan: Plan = Plan()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``x`` of shape ``[batch, height, width, channels]``, multiples of ``stride``; the result has the same shape."""
        norm = {"frozen_batch_norm": self.frozen_batch_norm, "dtype": self.dtype}
        shape, channels = x.shape, x.shape[-1]
        if self.stride > 1:
            x = ConvNorm(channels, self.stride, depthwise=True, **norm, name="stride_conv")(x, train)
        batch, height, width, _ = x.shape
        keys, values = _HEADS * self.key_dim, 4 * _HEADS * self.key_dim
        query, key, value = (
            DenseNorm(features, plan=self.plan, **norm, name=name)(x, train)
            for name, features in (("q", keys), ("k", keys), ("v", values))
        )
        local = ConvNorm(values, depthwise=True, **norm, name="v_local")(value, train)
        logits = _products(query, key) * self.key_dim**-0.5
        logits = logits + attention_biases(self, _HEADS, height, width).astype(logits.dtype)
        weights = softmax(dense(self, "talking_head1", _HEADS)(logits), axis=2)
        x = _sums(dense(self, "talking_head2", _HEADS)(weights), value).reshape(batch, height, width, values) + local
        if self.stride > 1:
            x = jax.image.resize(x, (*shape[:3], values), "bilinear")
        return DenseNorm(channels, plan=self.plan, **norm, name="proj")(gelu(x), train)


class StridedQuery(nn.Module):
    """Queries of every second token along both axes, from the token and a depthwise convolution around it.

    Attributes:
      features: output channels.
      frozen_batch_norm: keeps batch normalisation on its running statistics while training.
      plan: which layers are low-rank.
      dtype: of the computation.
    """

    features: int
    frozen_batch_norm: bool = False
    plan: Plan = Plan()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to a map of half the height and width, rounded up."""
        x = conv3x3(x.shape[-1], 2, depthwise=True, dtype=self.dtype, name="local")(x) + x[:, ::2, ::2]
        return DenseNorm(self.features, self.frozen_batch_norm, self.plan, self.dtype, name="proj")(x, train)


class AttentionDownsample(nn.Module):
    """Attention of every second token along both axes over all of the map.

    Attributes:
      features: output channels.
      key_dim: channels of a head's queries and keys; values have four times as many.
      frozen_batch_norm: keeps batch normalisation on its running statistics while training.
      plan: which layers are low-rank.
      dtype: of the computation.
    """

    features: int
    key_dim: int = 16
    frozen_batch_norm: bool = False
    plan: Plan = Plan()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """``[batch, height, width, channels]`` to a map of half the height and width, rounded up."""
        norm = {"frozen_batch_norm": self.frozen_batch_norm, "dtype": self.dtype}
        keys, values = _HEADS * self.key_dim, 4 * _HEADS * self.key_dim
        query = StridedQuery(keys, plan=self.plan, **norm, name="q")(x, train)
        key = DenseNorm(keys, plan=self.plan, **norm, name="k")(x, train)
        value = DenseNorm(values, plan=self.plan, **norm, name="v")(x, train)
        local = ConvNorm(values, 2, depthwise=True, **norm, name="v_local")(value, train)
        logits = _products(query, key) * self.key_dim**-0.5
        biases = attention_biases(self, _HEADS, *x.shape[1:3], stride=2).astype(logits.dtype)
        x = _sums(softmax(logits + biases, axis=2), value).reshape(local.shape) + local
        return DenseNorm(self.features, plan=self.plan, **norm, name="proj")(gelu(x), train)
