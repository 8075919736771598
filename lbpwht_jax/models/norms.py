"""Norms and layer scale of the model families, keeping for the backward pass what the settings say."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.layers.linen import LowRankDense
from lbpwht_jax.models.affine_conv import AffineConv
from lbpwht_jax.models.blocks import Part
from lbpwht_jax.ops import norms
from lbpwht_jax.ops.affine import Activation, Affine
from lbpwht_jax.ops.bilinear import bilinear
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.gelu import gelu
from lbpwht_jax.ops.platforms import is_narrow

_ACTIVATIONS = {None: lambda x: x, "gelu": gelu, "relu": nn.relu}
_MOMENTUM = 0.9
_BATCH_EPSILON = 1e-5
_START = 1e-5  # of layer scale


def widen(x: jax.Array) -> jax.Array:
    """``x`` in at least float32, for sums."""
    return x.astype(accumulation_dtype(x.dtype))


def layer_norm(parent: Part, name: str, x: jax.Array, *, epsilon: float = 1e-5, scale_init: Any = None) -> jax.Array:
    """Layer normalisation of the last axis within ``parent``.

    Args:
      parent: the module under construction.
      name: the new layer's name.
      x: ``[..., channels]``.
      epsilon: added to the variance.
      scale_init: initializer of the scale; ones by default.

    Returns:
      Array of ``x``'s shape, normalised in at least float32, in the settings' dtype.
    """
    fields = {"epsilon": epsilon, "scale_init": nn.initializers.ones_init() if scale_init is None else scale_init, "name": name}
    if parent.settings.residuals is None:
        return nn.LayerNorm(**fields)(widen(x)).astype(_dtype(parent, x))
    return LeanLayerNorm(**fields, bits=parent.settings.residuals.norm_bits, dtype=_dtype(parent, x))(x)


def batch_norm(parent: Part, name: str, x: jax.Array, train: bool, activation: Activation = None) -> jax.Array:
    """Batch normalisation within ``parent``, on running statistics unless training unfrozen, and an activation.

    Epsilon and momentum are the reference's. While training unfrozen, running variances gather the batch's biased
    variance, as Flax does, where torch gathers the unbiased one.

    Args:
      parent: the module under construction.
      name: the new layer's name.
      x: ``[..., channels]``.
      train: whether the model is training.
      activation: ``"gelu"``, ``"relu"`` or ``None``.

    Returns:
      Array of ``x``'s shape, normalised in at least float32, in the settings' dtype.
    """
    running = not train or parent.settings.frozen_batch_norm
    if parent.settings.residuals is None:
        norm = nn.BatchNorm(running, momentum=_MOMENTUM, epsilon=_BATCH_EPSILON, name=name)
        return _ACTIVATIONS[activation](norm(widen(x)).astype(_dtype(parent, x)))
    norm = LeanBatchNorm(running, activation, parent.settings.residuals.norm_bits, _dtype(parent, x), name=name)
    return norm(x)


def joined_norm(
    parent: Part,
    layer: LowRankDense | AffineConv,
    name: str,
    x: jax.Array,
    train: bool,
    activation: Activation = None,
    scaled_by: jax.Array | None = None,
    **arguments: Any,
) -> jax.Array:
    """A layer of ``parent`` and its batch normalisation, as one where ``joins_norms`` says so.

    Args:
      parent: the module under construction.
      layer: called on ``x``.
      name: the normalisation's.
      x: ``[..., channels]``.
      train: whether the model is training.
      activation: after the normalisation, ``"gelu"``, ``"relu"`` or ``None``.
      scaled_by: factors, ``[features]``, by which the normalised result is multiplied; only where ``joins_norms``.
      **arguments: further ones of the layer's call.

    Returns:
      ``[..., features]``.
    """
    if not joins_norms(parent, x, train):
        return batch_norm(parent, name, layer(x, **arguments), train, activation)
    affine = running_norm(parent, name, x, layer.features, activation)
    return layer(x, affine=affine if scaled_by is None else affine.scaled(scaled_by), **arguments)


def running_norm(parent: Part, name: str, x: jax.Array, features: int, activation: Activation = None) -> Affine:
    """Batch normalisation within ``parent`` on running statistics, for a layer to apply; only where ``joins_norms``.

    Args:
      parent: the module under construction.
      name: the normalisation's.
      x: of the dtype that the result gets unless the settings have one.
      features: channels of what is normalised.
      activation: after the normalisation, ``"gelu"``, ``"relu"`` or ``None``.
    """
    residuals = parent.settings.residuals
    bits = None if residuals is None else residuals.norm_bits
    return RunningNorm(activation, bits, _dtype(parent, x), name=name)(features)


def joins_norms(parent: Part, x: jax.Array, train: bool) -> bool:
    """Whether batch normalisation is computed as one with a layer beside it, and with a layer scale behind it."""
    settings = parent.settings
    running = not train or settings.frozen_batch_norm
    return running and settings.joins_norms and (settings.residuals is not None or not is_narrow(_dtype(parent, x)))


def joins_behind(parent: Part, x: jax.Array, train: bool) -> bool:
    """Whether batch normalisation and GELU between two layers are one with the second: GPUs have kernels for it.

    So it is in narrow dtypes. In wide ones they are one with the first, whose kernel can take the factors.
    """
    return joins_norms(parent, x, train) and is_narrow(_dtype(parent, x))


def _dtype(parent: Part, x: jax.Array) -> Any:
    return x.dtype if parent.settings.dtype is None else parent.settings.dtype


class LeanLayerNorm(nn.Module):
    """``nn.LayerNorm`` of the last axis, keeping one array; the same parameters.

    Attributes:
      epsilon: added to the variance.
      scale_init: initializer of the scale.
      bits: in how many bits the normalised input is kept; ``None`` keeps the input.
      dtype: the result's.
    """

    epsilon: float
    scale_init: Any
    bits: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[..., channels]``; the result has the same shape."""
        scale = self.param("scale", self.scale_init, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
        return norms.layer_norm(x, scale, bias, self.epsilon, self.bits, self.dtype)


class LeanBatchNorm(nn.Module):
    """``nn.BatchNorm`` and an activation, keeping one array; the same parameters and statistics.

    Attributes:
      running: normalises by the running statistics, and leaves them as they are.
      activation: ``"gelu"``, ``"relu"`` or ``None``.
      bits: in how many bits the normalised input is kept; ``None`` keeps the input.
      dtype: the result's.
    """

    running: bool
    activation: Activation
    bits: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[..., channels]``; the result has the same shape."""
        mean, variance, scale, bias = _batch_norm_variables(self, x.shape[-1:])
        statistics = (mean.value, variance.value) if self.running else None
        y, found = norms.batch_norm(x, statistics, scale, bias, _BATCH_EPSILON, self.bits, self.dtype, self.activation)
        if not self.running and not self.is_initializing():
            for variable, new in zip((mean, variance), found, strict=True):
                variable.value = _MOMENTUM * variable.value + (1 - _MOMENTUM) * new
        return y


class RunningNorm(nn.Module):
    """Batch normalisation on running statistics, to be applied by the layer in front; parameters as ``nn.BatchNorm``'s.

    Attributes:
      activation: ``"gelu"``, ``"relu"`` or ``None``.
      bits: in how many bits the normalised input is kept; ``None`` keeps the input.
      dtype: the result's.
    """

    activation: Activation
    bits: int | None
    dtype: Any

    @nn.compact
    def __call__(self, features: int) -> Affine:
        """The affine map of ``[..., features]``."""
        mean, variance, scale, bias = _batch_norm_variables(self, (features,))
        statistics = mean.value, variance.value
        return Affine.running(statistics, scale, bias, _BATCH_EPSILON, self.bits, self.dtype, self.activation)


def _batch_norm_variables(module: nn.Module, shape: tuple[int, ...]) -> tuple[Any, Any, jax.Array, jax.Array]:
    mean = module.variable("batch_stats", "mean", lambda: jnp.zeros(shape, jnp.float32))
    variance = module.variable("batch_stats", "var", lambda: jnp.ones(shape, jnp.float32))
    scale = module.param("scale", nn.initializers.ones_init(), shape)
    return mean, variance, scale, module.param("bias", nn.initializers.zeros_init(), shape)


class ScaleFactors(nn.Module):
    """The parameters of ``LayerScale``, for the norm in front to apply.

    Attributes:
      start: the value at which the factors start.
    """

    start: float

    @nn.compact
    def __call__(self, features: int) -> jax.Array:
        """``[features]``."""
        return self.param("gamma", nn.initializers.constant(self.start), (features,))


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor, ``gamma``.

    Attributes:
      start: the value at which the factors start.
      bits: in how many bits the input is kept; ``None`` for all of it.
    """

    start: float
    bits: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x`` of shape ``[..., channels]``; the result has the same shape and dtype."""
        gamma = self.param("gamma", nn.initializers.constant(self.start), x.shape[-1:])
        return bilinear(jnp.multiply, x, gamma.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,)), bits=self.bits)


def layer_scale(parent: Part, name: str, x: jax.Array, start: float = _START) -> jax.Array:
    """``LayerScale`` within ``parent``."""
    residuals = parent.settings.residuals
    return LayerScale(start, None if residuals is None else residuals.norm_bits, name=name)(x)


def scaled_branch(parent: Part, name: str, branch: Any, x: jax.Array, train: bool) -> jax.Array:
    """``layer_scale`` of a branch within ``parent`` that ends in ``joined_norm``, as one with it where ``joins_norms``.

    Args:
      parent: the module under construction.
      name: the layer scale's name.
      branch: called with x, ``train`` and the factors or ``None``.
      x: ``[..., channels]``, as is the branch's result.
      train: whether the model is training.
    """
    if joins_norms(parent, x, train):
        return branch(x, train, ScaleFactors(_START, name=name)(x.shape[-1]))
    return layer_scale(parent, name, branch(x, train))
