"""The dtype that sums are taken in."""

from typing import Any

import jax.numpy as jnp


def accumulation_dtype(*dtypes: Any) -> Any:
    """The dtype in which products of these floating-point dtypes accumulate: float64 if one of them is that, else float32."""
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32
