"""Counts multiplications of a function from its jaxpr, without running it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_macs(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-accumulates of the matrix products and convolutions of a function.

    The body of a ``lax.scan`` counts as often as it runs; both branches of a ``lax.cond`` count, a ``lax.while_loop`` once.

    Args:
      function: traced, not run.
      *arguments: arrays, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
      The number for these shapes.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    equation: Any
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        shapes = [variable.aval.shape for variable in equation.invars]
        output = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            total += output * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = parameters["dimension_numbers"].rhs_spec
            total += output * math.prod(shapes[1][axis] for axis in kernel[1:])
        else:
            repeats = parameters["length"] if name == "scan" else 1
            total += repeats * sum(_count(inner) for value in parameters.values() for inner in _jaxprs(value))
    return total


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [inner for item in value for inner in _jaxprs(item)] if isinstance(value, tuple | list) else []
