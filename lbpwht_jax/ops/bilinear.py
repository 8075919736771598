"""Products of an array and weights, whose backward pass keeps the array in few bits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from lbpwht_jax.ops.coders import Rows
from lbpwht_jax.ops.platforms import apart
from lbpwht_jax.ops.sharding import vary_alike


def bilinear(function: Callable[[Any, Any], jax.Array], x: jax.Array, weights: jax.Array, *, bits: int | None) -> jax.Array:
    """``function(x, weights)``, keeping x in few bits for the weights' cotangent, and not at all where that is not wanted.

    Args:
      function: a pure function, linear in each operand, such as a convolution; hashable.
      x: ``[..., channels]``, floating point.
      weights: floating point.
      bits: 4 or 8, with a scale for each row along the last axis of x; ``None`` keeps x whole.

    Returns:
      What ``function`` returns.
    """
    if bits is None:
        return function(x, weights)
    return _bilinear(function, bits, *vary_alike(x, weights))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Type:
    """The type of an array, as a part of residuals that is no array; ``None`` of one that is not differentiated."""

    type: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _bilinear(function: Callable[[Any, Any], jax.Array], bits: int, x: Any, weights: Any) -> jax.Array:
    return function(x, weights)


def _forward(function: Callable[[Any, Any], jax.Array], bits: int, x: Any, weights: Any) -> tuple[jax.Array, tuple]:
    value, kept = x.value, None
    if weights.perturbed:
        kept, value = apart((Rows.of(value, bits), value))
    like = jax.typeof(value) if x.perturbed else None
    return function(value, weights.value), (kept, weights.value, _Type(like))


def _backward(function: Callable[[Any, Any], jax.Array], bits: int, residuals: tuple, g: jax.Array | SymbolicZero) -> tuple:
    if isinstance(g, SymbolicZero):
        return None, None
    (kept, weights, x), g = apart((residuals, g))
    dx = dweights = None
    if x.type is not None:
        (dx,) = jax.linear_transpose(lambda x: function(x, weights), x.type)(g)
    if kept is not None:
        (dweights,) = jax.linear_transpose(lambda weights: function(kept.decoded(), weights), weights)(g)
    return dx, dweights


_bilinear.defvjp(_forward, _backward, symbolic_zeros=True)
