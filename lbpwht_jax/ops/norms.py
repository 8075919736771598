"""Normalisation that keeps one array for the backward pass, whole or in few bits, and may end in an activation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lbpwht_jax.ops import norms_gpu
from lbpwht_jax.ops.affine import Activation, Affine, apply
from lbpwht_jax.ops.coders import Mask, Rows
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.gelu import gelu, gelu_slope
from lbpwht_jax.ops.platforms import apart, by_platform
from lbpwht_jax.ops.sharding import explicit_sharding, vary_alike


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known when tracing.

    Attributes:
      axes: those over which mean and variance were taken.
      bits: of the normalised array.
      activation: after the norm.
      dtype: the result's.
      x: the dtype of x.
    """

    axes: tuple[int, ...]
    bits: int | None
    activation: Activation
    dtype: Any
    x: Any


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, bits: int | None, dtype: Any) -> jax.Array:
    """Layer normalisation along the last axis (Ba et al., 2016), computed in at least float32.

    For the backward pass it keeps x with ``bits=None``, or else the normalised x in few bits, and two numbers per row.

    Args:
      x: ``[..., channels]``, floating point.
      scale: ``[channels]``.
      bias: ``[channels]``.
      epsilon: added to the variance.
      bits: 4, 8 or ``None``.
      dtype: the result's.

    Returns:
      Array of the shape of x.
    """
    dtype = jnp.dtype(dtype)
    if bits == norms_gpu.BITS and explicit_sharding(x) is None and norms_gpu.takes(x.shape[-1], x.dtype, dtype):
        return _by_kernels(*vary_alike(x, scale, bias), epsilon)
    return _layer_norm(x, scale, bias, epsilon, bits, dtype)


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, bits: int | None, dtype: Any) -> jax.Array:
    mean, variance = _moments(x.astype(accumulation_dtype(x.dtype)), (-1,))
    return _affine(x, mean, lax.rsqrt(variance + epsilon), scale, bias, _Static((-1,), bits, None, dtype, x.dtype))


def batch_norm(
    x: jax.Array,
    statistics: tuple[jax.Array, jax.Array] | None,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    bits: int | None,
    dtype: Any,
    activation: Activation = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Batch normalisation of the last axis (Ioffe and Szegedy, 2015), computed in at least float32, and an activation.

    For the backward pass it keeps x with ``bits=None``, or else the normalised x in few bits, from which GELU's slope is
    derived, and where ReLU's slope is one.

    Args:
      x: ``[..., channels]``, floating point.
      statistics: mean and variance, ``[channels]``, which are constants; ``None`` for those of x.
      scale: ``[channels]``.
      bias: ``[channels]``.
      epsilon: added to the variance.
      bits: 4, 8 or ``None``.
      dtype: the result's.
      activation: ``"gelu"``, ``"relu"`` or ``None``.

    Returns:
      Array of the shape of x, and mean and variance, ``[channels]``, which are not differentiated.
    """
    if statistics is not None:
        return apply(x, Affine.running(statistics, scale, bias, epsilon, bits, dtype, activation)), statistics
    axes = tuple(range(x.ndim - 1))
    mean, variance = _moments(x.astype(accumulation_dtype(x.dtype)), axes)
    y = _affine(x, mean, lax.rsqrt(variance + epsilon), scale, bias, _Static(axes, bits, activation, jnp.dtype(dtype), x.dtype))
    return y, (lax.stop_gradient(mean.reshape(-1)), lax.stop_gradient(variance.reshape(-1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_kernels(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    return _layer_norm(x, scale, bias, epsilon, None, x.dtype)


def _by_kernels_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, tuple]:
    def plain(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
        mean, variance = _moments(x.astype(jnp.float32), (-1,))
        inverse = lax.rsqrt(variance + epsilon)
        kept = Rows.of(_normalised(x, mean, inverse), norms_gpu.BITS)
        y = _result(x, mean, inverse, scale, bias, _Static((-1,), None, None, x.dtype, x.dtype))
        return apart((y, kept.codes, kept.steps, inverse))

    def with_kernel(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
        results = norms_gpu.forward_kernel(epsilon)(_as_rows(x), scale, bias)
        return tuple(result.reshape(*x.shape[:-1], result.shape[-1]) for result in results)

    y, codes, steps, inverse = by_platform(plain, x, scale, bias, cuda=with_kernel)
    return y, (Rows(codes, steps, norms_gpu.BITS, x.shape[-1], jnp.dtype(jnp.float32)), inverse, scale, bias)


def _by_kernels_backward(epsilon: float, residuals: tuple, g: jax.Array) -> tuple:
    def plain(kept: Rows, inverse: jax.Array, scale: jax.Array, bias: jax.Array, g: jax.Array) -> tuple:
        static = _Static((-1,), norms_gpu.BITS, None, g.dtype, g.dtype)
        dx, _, _, dscale, dbias = _backward(static, (kept, None, None, inverse, scale, bias), g)
        return dx, dscale, dbias

    def with_kernel(kept: Rows, inverse: jax.Array, scale: jax.Array, bias: jax.Array, g: jax.Array) -> tuple:
        rows = [_as_rows(array) for array in (kept.codes, kept.steps, inverse)]
        dx, sums = norms_gpu.backward_kernel()(*rows, scale, _as_rows(g))
        dscale, dbias = jnp.sum(sums, (0, 1))
        return dx.reshape(g.shape), dscale.astype(scale.dtype), dbias.astype(bias.dtype)

    return by_platform(plain, *residuals, g, cuda=with_kernel)


_by_kernels.defvjp(_by_kernels_forward, _by_kernels_backward)


def _as_rows(x: jax.Array) -> jax.Array:
    """``[batch, rows, channels]``."""
    return x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, x.shape[-1])


def _moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance, as Flax takes them: the mean square less the square of the mean."""
    mean = jnp.mean(x, axes, keepdims=True)
    return mean, jnp.maximum(jnp.mean(x * x, axes, keepdims=True) - mean * mean, 0)


def _affine(x: jax.Array, mean: Any, inverse: Any, scale: jax.Array, bias: jax.Array, static: _Static) -> jax.Array:
    mean, inverse = lax.stop_gradient((mean, inverse))  # _backward differentiates through them
    return _normalise(*vary_alike(x, mean, inverse, scale, bias), static)


def _apply(normalised: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    shape = (1,) * (normalised.ndim - 1) + (-1,)
    return normalised * scale.reshape(shape).astype(normalised.dtype) + bias.reshape(shape).astype(normalised.dtype)


def _normalised(x: jax.Array, mean: jax.Array, inverse: jax.Array) -> jax.Array:
    return (x.astype(accumulation_dtype(x.dtype)) - mean) * inverse


def _result(x: Any, mean: Any, inverse: Any, scale: Any, bias: Any, static: _Static) -> jax.Array:
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale, bias = (a.reshape(shape).astype(inverse.dtype) for a in (scale, bias))
    y = (x.astype(inverse.dtype) - mean) * (inverse * scale) + bias  # in Flax's order, so that rounding is the same
    if static.activation == "gelu":
        y = gelu(y)
    if static.activation == "relu":
        y = jnp.maximum(y, 0)
    return y.astype(static.dtype)


def _forward(x: Any, mean: Any, inverse: Any, scale: Any, bias: Any, static: _Static) -> tuple[jax.Array, tuple]:
    x, mean, inverse, scale, bias = (operand.value for operand in (x, mean, inverse, scale, bias))
    kept, mask = x, None
    if static.bits is not None:
        normalised = _normalised(x, mean, inverse)
        if static.activation == "relu":  # rounding would turn slopes near zero over
            mask = Mask.of(_apply(normalised, scale, bias) > 0)
        kept = Rows.of(normalised, static.bits)
    y: Any = _result(x, mean, inverse, scale, bias, static)
    if isinstance(kept, Rows):
        kept, mask, y = apart((kept, mask, y))
    return y, (kept, mask, mean, inverse, scale, bias)


def _backward(static: _Static, residuals: tuple, cotangent: jax.Array | SymbolicZero) -> tuple:
    if isinstance(cotangent, SymbolicZero):
        return (None,) * 5
    (kept, mask, mean, inverse, scale, bias), cotangent = apart((residuals, cotangent))
    g: Any = cotangent.astype(inverse.dtype)
    rows, factor = tuple(range(g.ndim - 1)), scale.reshape((1,) * (g.ndim - 1) + (-1,)).astype(g.dtype)
    normalised = kept.decoded() if isinstance(kept, Rows) else _normalised(kept, mean, inverse)
    if static.activation == "gelu":
        g = g * gelu_slope(_apply(normalised, scale, bias))
    if static.activation == "relu":
        g = jnp.where(_apply(normalised, scale, bias) > 0 if mask is None else mask.decoded(), g, 0)
    dscale, dbias = jnp.sum(g * normalised, rows), jnp.sum(g, rows)
    dx = g * factor
    mean_dx, mean_product = (jnp.mean(a, static.axes, keepdims=True) for a in (dx, dx * normalised))
    dx = dx - mean_dx - normalised * mean_product
    return (dx * inverse).astype(static.x), None, None, dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_normalise = jax.custom_vjp(_result, nondiff_argnums=(5,))
_normalise.defvjp(_forward, _backward, symbolic_zeros=True)
