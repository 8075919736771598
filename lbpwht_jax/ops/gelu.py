"""The exact GELU (by erf), its slope, and forms of both for kernels."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lbpwht_jax.ops.coders import SLOPE_BITS, Slopes
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.platforms import apart

Elementwise = Callable[[jax.Array], jax.Array]


def _normal_cdf(x: jax.Array) -> jax.Array:
    """By erf alone: cheaper than ``jax.scipy``'s, which keeps tails below 1e-7 exact."""
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU (by erf), which the reference models use, keeping one array for the backward pass instead of three."""
    wide = x.astype(accumulation_dtype(x.dtype))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return gelu(x), gelu_slope(x) * t


def gelu_slope(x: jax.Array) -> jax.Array:
    """The derivative of ``gelu`` at ``x``, computed in at least float32 and of x's dtype."""
    wide = x.astype(accumulation_dtype(x.dtype))
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (_normal_cdf(wide) + wide * density).astype(x.dtype)


def check_slope_bits(bits: int | None, name: str) -> None:
    """Raises ``ValueError``, opened by ``name``, unless a slope can be kept in so many bits."""
    if bits not in (None, *SLOPE_BITS):
        raise ValueError(f"{name}: slope_bits must be {', '.join(map(str, SLOPE_BITS))} or None, got {bits!r}")


def coded_gelu(x: jax.Array, bits: int | None) -> jax.Array:
    """``gelu(x)``, keeping its slope in 2, 3, 4 or 8 bits for the backward pass, or x for ``None``; reverse mode only."""
    if bits is None and x.dtype == accumulation_dtype(x.dtype):
        return _sloped_later(x)
    return coded_activation(gelu, gelu_slope, x, bits)


@jax.custom_vjp
def _sloped_later(x: jax.Array) -> jax.Array:
    """``gelu``, whose slope is made in the backward pass: XLA would otherwise keep its erf, beside x, from the forward pass."""
    return gelu(x)


def _sloped_later_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (g * gelu_slope(lax.optimization_barrier(x)),)


_sloped_later.defvjp(lambda x: (gelu(x), x), _sloped_later_backward)


def coded_activation(function: Elementwise, slope: Elementwise, x: jax.Array, bits: int | None) -> jax.Array:
    """``function(x)``, keeping its slope in few bits for the backward pass.

    Args:
      function: an activation.
      slope: its derivative, whose values lie near those of GELU's, for which the codes are made.
      x: floating point.
      bits: 2, 3, 4 or 8; with ``None`` what ``function`` keeps of itself.
    """
    return function(x) if bits is None else _coded(function, slope, x, bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 3))
def _coded(function: Elementwise, slope: Elementwise, x: jax.Array, bits: int) -> jax.Array:
    return function(x)


def _coded_forward(function: Elementwise, slope: Elementwise, x: jax.Array, bits: int) -> tuple[jax.Array, Slopes]:
    return apart((function(x), Slopes.of(slope(x), bits)))


def _coded_backward(function: Elementwise, slope: Elementwise, bits: int, kept: Slopes, g: jax.Array) -> tuple[jax.Array]:
    kept, g = apart((kept, g))
    return (g * kept.decoded(),)


_coded.defvjp(_coded_forward, _coded_backward)


def gelu_and_slope(x: jax.Array, bits: int | None) -> tuple[jax.Array, Any]:
    """``gelu(x)``, and its slope, in so many bits or whole."""
    return (gelu(x), gelu_slope(x)) if bits is None else _coded_forward(gelu, gelu_slope, x, bits)


def decoded_slope(slope: Any) -> jax.Array:
    """The slope that ``gelu_and_slope`` gave."""
    return slope.decoded() if isinstance(slope, Slopes) else slope


def kernel_gelu(x: jax.Array) -> jax.Array:
    """``gelu`` of a float32 array by additions, products and ``exp`` alone, which every kind of kernel has; within 4e-7 |x|."""
    return x * _kernel_cdf(x)


def kernel_gelu_slope(x: jax.Array) -> jax.Array:
    """``gelu_slope`` of a float32 array, as for ``kernel_gelu``; within 4e-7."""
    return _kernel_cdf(x) + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _kernel_cdf(x: jax.Array) -> jax.Array:
    """Standard normal distribution function by erf's approximation 7.1.26 of Abramowitz and Stegun, within 1.5e-7."""
    z = jnp.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * jnp.exp(-z * z)
    return jnp.where(x < 0, tail, 1 - tail)
