"""The activation of OpenAI's CLIP: ``x * sigmoid(1.702 x)``, an approximation of the GELU (Hendrycks and Gimpel, 2016)."""

import jax

from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.gelu import coded_activation

_SHARPNESS = 1.702


def quick_gelu(x: jax.Array, bits: int | None = None) -> jax.Array:
    """``x * sigmoid(1.702 x)``, keeping its slope alone for the backward pass.

    Args:
      x: floating point.
      bits: in how many bits the slope is kept, 2, 3, 4 or 8, by the codes of the exact GELU, whose slopes reach a little
        further; ``None`` keeps it as it is.

    Returns:
      Array of ``x``'s shape and dtype, computed in at least float32.
    """
    return coded_activation(_plain, _slope, x, bits)


@jax.custom_jvp
def _plain(x: jax.Array) -> jax.Array:
    wide = x.astype(accumulation_dtype(x.dtype))
    return (wide * jax.nn.sigmoid(_SHARPNESS * wide)).astype(x.dtype)


def _slope(x: jax.Array) -> jax.Array:
    wide = x.astype(accumulation_dtype(x.dtype))
    share = jax.nn.sigmoid(_SHARPNESS * wide)
    return (share + _SHARPNESS * wide * share * (1 - share)).astype(x.dtype)


@_plain.defjvp
def _plain_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return _plain(x), _slope(x) * t
