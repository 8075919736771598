"""The dtype that sums are taken in, and the precision of products."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def accumulation_dtype(*dtypes: Any) -> Any:
    """The dtype in which products of these floating-point dtypes accumulate: float64 if one of them is that, else float32."""
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def static_precision(precision: Any) -> Any:
    """A precision as ``jax.lax.dot_general`` takes it, hashable: a pair as a tuple."""
    return precision if isinstance(precision, (str, lax.Precision, type(None))) else tuple(precision)
