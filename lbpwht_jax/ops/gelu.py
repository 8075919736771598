"""The exact GELU (by erf), its slope, and forms of both for kernels."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.polynomial import chebyshev

from lbpwht_jax.ops.coders import SLOPE_BITS, Slopes, exact_slopes
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


def kernel_gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``gelu`` of a float32 array, within 4e-7 |x|, and its slope, within 4e-7: in as few operations as a kernel can.

    The standard normal distribution function is erf's approximation 7.1.26 of Abramowitz and Stegun, within 1.5e-7, whose
    exponential is the slope's too. A GPU's time goes into these operations, not into reading x.
    """
    bell = jnp.exp2(x * x * (-0.5 / math.log(2)))
    t = 1 / (1 + (0.3275911 * math.sqrt(0.5)) * jnp.abs(x))
    tail = bell * t * _polynomial(t, *(0.5 * a for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)))
    cdf = jnp.where(x < 0, tail, 1 - tail)
    return x * cdf, cdf + x * bell * (1 / math.sqrt(2 * math.pi))


def slope_for_means(x: jax.Array) -> jax.Array:
    """GELU's slope at a float32 array, within 6e-5, a hundredth of a step of its codes: NaN where x is.

    A polynomial takes CPUs less time than an exponential and a division do.
    """
    end, coefficients = _slope_polynomial()
    x = jnp.clip(x, -end, end)
    return 0.5 + x * _polynomial(x * x * (2 / end**2) - 1, *coefficients)


@functools.cache
def _slope_polynomial() -> tuple[float, tuple[float, ...]]:
    """Where the slope counts as flat, and the coefficients of ``(slope(x) - 1 / 2) / x`` in ``2 (x / end)^2 - 1``.

    They are those of the least squares whose weights grow where the error is large (Lawson, 1961): near the smallest maximum.
    """
    end, degree = 4.5, 9
    x = end * np.cos(np.linspace(0, np.pi / 2, 2001))[:-1]
    wanted, t, weights = (exact_slopes(x) - 0.5) / x, 2 * (x / end) ** 2 - 1, x
    fitted = chebyshev.chebfit(t, wanted, degree, w=weights)
    for _ in range(40):
        errors = np.abs(x * (chebyshev.chebval(t, fitted) - wanted))
        weights = weights * np.sqrt(errors / errors.max() + 1e-3)
        fitted = chebyshev.chebfit(t, wanted, degree, w=weights)
    return end, tuple(chebyshev.cheb2poly(fitted).tolist())


def _polynomial(t: jax.Array, *coefficients: float) -> jax.Array:
    """By Horner's rule; the coefficients begin with the constant."""
    return functools.reduce(lambda total, a: a + t * total, reversed(coefficients[:-1]), jnp.float32(coefficients[-1]))
