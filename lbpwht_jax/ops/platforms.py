"""What differs between the platforms a program may be lowered for: decided when it is lowered, not when it is traced.

A program traced or exported on a CPU host thus gets a GPU's forms when it is lowered for a GPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lbpwht_jax.ops.sharding import explicit_sharding


def by_platform(plain: Callable[..., Any], *operands: jax.Array, **forms: Callable[..., Any]) -> Any:
    """``forms[platform](*operands)`` on the platforms named (``"cuda"``, ``"tpu"``), ``plain(*operands)`` on all others."""
    return lax.platform_dependent(*operands, default=plain, **forms)


def kept_instead(kept: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(kept, x)``, such that accelerators compute ``kept`` before anything that uses the ``x`` returned.

    Their compilers would otherwise put off computing ``kept``, which only the backward pass uses, until then, and keep x in
    memory as well. XLA's CPU backend drops such barriers before it schedules.
    """
    if explicit_sharding(x) is not None:
        return lax.optimization_barrier((kept, x))
    barrier: Callable[..., Any] = lambda *operands: lax.optimization_barrier(operands)  # noqa: E731
    return by_platform(lambda *operands: operands, kept, x, cuda=barrier, tpu=barrier)


def is_narrow(*dtypes: Any) -> bool:
    """Whether all dtypes are the same floating-point type of 16 bits."""
    return len(set(dtypes)) == 1 and jnp.dtype(dtypes[0]) in (jnp.bfloat16, jnp.float16)
