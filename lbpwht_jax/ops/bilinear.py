"""Products of an array and weights, whose backward pass keeps the array in few bits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lbpwht_jax.ops.coders import Rows
from lbpwht_jax.ops.platforms import apart
from lbpwht_jax.ops.sharding import vary_alike

Transposes = tuple[Callable[..., jax.Array], Callable[..., jax.Array]]


def bilinear(
    function: Callable[[Any, Any], jax.Array],
    x: jax.Array,
    weights: jax.Array,
    *,
    bits: int | None,
    transposes: Transposes | None = None,
) -> jax.Array:
    """``function(x, weights)``, keeping x in few bits for the weights' cotangent, and neither operand where that is not wanted.

    Args:
      function: a pure function, linear in each operand, such as a convolution; hashable.
      x: ``[..., channels]``, floating point.
      weights: floating point.
      bits: 4 or 8, with a scale for each row along the last axis of x; ``None`` keeps x whole.
      transposes: what computes the cotangents, hashable: that of x from an array like x, the weights and the result's
        cotangent, and that of the weights from x, an array like them and the result's cotangent; those arrays have shape and
        dtype alone. ``None`` for JAX's own.

    Returns:
      What ``function`` returns.
    """
    if bits is None and transposes is None:
        return function(x, weights)
    transposes = transposes or (functools.partial(_of_x, function), functools.partial(_of_weights, function))
    return _bilinear(function, bits, transposes, *vary_alike(x, weights))


def _of_x(function: Callable[[Any, Any], jax.Array], like: Any, weights: jax.Array, g: jax.Array) -> jax.Array:
    return jax.linear_transpose(lambda x: function(x, weights), like)(g)[0]


def _of_weights(function: Callable[[Any, Any], jax.Array], x: jax.Array, like: Any, g: jax.Array) -> jax.Array:
    return jax.linear_transpose(lambda weights: function(x, weights), like)(g)[0]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ArrayType:
    """The type of an array, as a part of residuals that is no array; ``None`` of one that is not differentiated."""

    type: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _bilinear(
    function: Callable[[Any, Any], jax.Array], bits: int | None, transposes: Transposes, x: Any, weights: Any
) -> jax.Array:
    return function(x, weights)


def _forward(
    function: Callable[[Any, Any], jax.Array], bits: int | None, transposes: Transposes, x: Any, weights: Any
) -> tuple[jax.Array, tuple]:
    value, kept = x.value, None
    if weights.perturbed:
        kept, value = (value, value) if bits is None else apart((Rows.of(value, bits), value))
    kept_weights, like = (weights.value, jax.typeof(value)) if x.perturbed else (None, None)
    return function(value, weights.value), (kept, kept_weights, ArrayType(like), ArrayType(jax.typeof(weights.value)))


def _backward(
    function: Callable[[Any, Any], jax.Array],
    bits: int | None,
    transposes: Transposes,
    residuals: tuple,
    g: Any,
) -> tuple:
    if isinstance(g, SymbolicZero):
        return None, None
    if bits is not None:
        residuals, g = apart((residuals, g))
    kept, weights, x, like = residuals
    of_x, of_weights = transposes
    dx = None if x.type is None else of_x(x.type, weights, g)
    if kept is None:
        return dx, None
    if weights is None:  # their values are not read
        weights = vary_alike(jnp.zeros(like.type.shape, like.type.dtype), g)[0]
    return dx, of_weights(kept.decoded() if isinstance(kept, Rows) else kept, weights, g)


_bilinear.defvjp(_forward, _backward, symbolic_zeros=True)
