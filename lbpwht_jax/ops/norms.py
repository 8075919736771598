"""Normalisation that keeps one array for the backward pass, whole or in few bits, and may end in an activation."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lbpwht_jax.ops.coders import Mask, Rows
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.gelu import gelu, gelu_slope
from lbpwht_jax.ops.platforms import apart
from lbpwht_jax.ops.sharding import vary_alike

Activation = Literal["gelu", "relu"] | None


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known when tracing.

    Attributes:
      axes: those over which mean and variance were taken from x itself; none if they are constants.
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
    wide = x.astype(accumulation_dtype(x.dtype))
    mean, variance = _moments(wide, (-1,))
    return _affine(x, mean, lax.rsqrt(variance + epsilon), scale, bias, _Static((-1,), bits, None, jnp.dtype(dtype), x.dtype))


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
    axes = tuple(range(x.ndim - 1)) if statistics is None else ()
    shape = (1,) * (x.ndim - 1) + (-1,)
    if statistics is None:
        mean, variance = _moments(x.astype(accumulation_dtype(x.dtype)), axes)
    else:
        mean, variance = (value.reshape(shape) for value in statistics)
    y = _affine(x, mean, lax.rsqrt(variance + epsilon), scale, bias, _Static(axes, bits, activation, jnp.dtype(dtype), x.dtype))
    return y, (lax.stop_gradient(mean.reshape(-1)), lax.stop_gradient(variance.reshape(-1)))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normalise(x: Any, mean: Any, inverse: Any, scale: Any, bias: Any, static: _Static) -> jax.Array:
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale, bias = (a.reshape(shape).astype(inverse.dtype) for a in (scale, bias))
    y = (x.astype(inverse.dtype) - mean) * (inverse * scale) + bias  # in Flax's order, so that rounding is the same
    if static.activation == "gelu":
        y = gelu(y)
    if static.activation == "relu":
        y = jnp.maximum(y, 0)
    return y.astype(static.dtype)


def _forward(x: Any, mean: Any, inverse: Any, scale: Any, bias: Any, static: _Static) -> tuple[jax.Array, tuple]:
    wants_parameters = scale.perturbed or bias.perturbed
    x, mean, inverse, scale, bias = (operand.value for operand in (x, mean, inverse, scale, bias))
    kept = mask = None
    if wants_parameters or static.axes or static.activation:
        kept = x
        if static.bits is not None:
            normalised = _normalised(x, mean, inverse)
            if static.activation == "relu":  # rounding would turn slopes near zero over
                mask = Mask.of(_apply(normalised, scale, bias) > 0)
            kept = Rows.of(normalised, static.bits)
    y: Any = _normalise(x, mean, inverse, scale, bias, static)
    if isinstance(kept, Rows):
        kept, mask, y = apart((kept, mask, y))
    return y, (kept, mask, mean, inverse, scale, bias)


def _backward(static: _Static, residuals: tuple, cotangent: jax.Array | SymbolicZero) -> tuple:
    if isinstance(cotangent, SymbolicZero):
        return (None,) * 5
    (kept, mask, mean, inverse, scale, bias), cotangent = apart((residuals, cotangent))
    g: Any = cotangent.astype(inverse.dtype)
    rows, factor = tuple(range(g.ndim - 1)), scale.reshape((1,) * (g.ndim - 1) + (-1,)).astype(g.dtype)
    if kept is None:
        return (g * factor * inverse).astype(static.x), None, None, None, None
    normalised = kept.decoded() if isinstance(kept, Rows) else _normalised(kept, mean, inverse)
    if static.activation == "gelu":
        g = g * gelu_slope(_apply(normalised, scale, bias))
    if static.activation == "relu":
        g = jnp.where(_apply(normalised, scale, bias) > 0 if mask is None else mask.decoded(), g, 0)
    dscale, dbias = jnp.sum(g * normalised, rows), jnp.sum(g, rows)
    dx = g * factor
    if static.axes:
        mean_dx, mean_product = (jnp.mean(a, static.axes, keepdims=True) for a in (dx, dx * normalised))
        dx = dx - mean_dx - normalised * mean_product
    return (dx * inverse).astype(static.x), None, None, dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_normalise.defvjp(_forward, _backward, symbolic_zeros=True)
