"""Functions whose backward pass computes them again, from operands kept whole or in few bits."""

import functools
from collections.abc import Callable

import jax

from lbpwht_jax.ops.coders import Rows
from lbpwht_jax.ops.platforms import apart
from lbpwht_jax.ops.sharding import vary_alike


def recomputed(function: Callable[..., jax.Array], *operands: jax.Array, bits: tuple[int | None, ...]) -> jax.Array:
    """``function(*operands)``, of which nothing but the operands is kept for the backward pass.

    Args:
      function: a pure function of the operands; hashable, so that equal calls share a program.
      *operands: arrays.
      bits: for each operand, 4 or 8 to keep its rows (along the last axis) in so few bits, ``None`` to keep it whole.

    Returns:
      What ``function`` returns. Cotangents are those of ``function`` at the operands kept. On GPUs and TPUs it is truly
      computed again; XLA's CPU backend may find that an operand kept whole gives what it has, and keep that.
    """
    return _recomputed(function, bits, *vary_alike(*operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(function: Callable[..., jax.Array], bits: tuple[int | None, ...], *operands: jax.Array) -> jax.Array:
    return function(*operands)


def _forward(function: Callable[..., jax.Array], bits: tuple[int | None, ...], *operands: jax.Array) -> tuple:
    kept = tuple(x if b is None else Rows.of(x, b) for x, b in zip(operands, bits, strict=True))
    kept, operands = apart((kept, operands))
    return function(*operands), kept


def _backward(function: Callable[..., jax.Array], bits: tuple[int | None, ...], kept: tuple, g: jax.Array) -> tuple:
    kept, g = apart((kept, g))
    operands = [x.decoded() if isinstance(x, Rows) else x for x in kept]
    return jax.vjp(function, *operands)[1](g)


_recomputed.defvjp(_forward, _backward)
