"""FLOPs of matrix products and convolutions, read off JAX's own programs, 2 per multiply-add.

Like XLA's count, this leaves out multiplications with the zeros of a convolution's padding and dilation. Element-wise work is
left out too. Walsh transforms are products here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def product_flops(function: Callable, *arguments: Any, padding: bool = False) -> int:
    """FLOPs of the matrix products and convolutions that ``function``'s results depend on.

    Args:
      function: a function of arrays.
      *arguments: its arguments, arrays or ``jax.ShapeDtypeStruct``; nothing is computed.
      padding: whether to count multiplications with the zeros of convolutions' padding and dilation too, as the literature
        does for forward passes.

    Returns:
      FLOPs, 2 per multiply-add. A scan's body counts once per step, a while loop's once; of a conditional, the dearest branch;
      of a choice by platform, what CPUs run.
    """
    program = jax.make_jaxpr(function)(*arguments)
    return _flops(program.jaxpr, [True] * len(program.jaxpr.outvars), padding)[0]


def equation_macs(equation: Any, padding: bool = False) -> int:
    """Multiply-accumulates of one equation of a program: 0 unless it is a product or convolution.

    Args:
      equation: an equation of a jaxpr.
      padding: see ``product_flops``.
    """
    shapes = [v.aval.shape for v in equation.invars if hasattr(v.aval, "shape")]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][d] for d in contracted)
    if equation.primitive.name != "conv_general_dilated":
        return 0
    params, output = equation.params, equation.outvars[0].aval.shape
    numbers = params["dimension_numbers"]
    axes = zip(
        (shapes[0][d] for d in numbers.lhs_spec[2:]),
        (shapes[1][d] for d in numbers.rhs_spec[2:]),
        (output[d] for d in numbers.out_spec[2:]),
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    pairs = [outputs * kernel if padding else _pairs(size, kernel, outputs, *rest) for size, kernel, outputs, *rest in axes]
    return math.prod(output[d] for d in numbers.out_spec[:2]) * shapes[1][numbers.rhs_spec[1]] * math.prod(pairs)


def _pairs(size: int, kernel: int, outputs: int, stride: int, padding: tuple[int, int], dilation: int, spread: int) -> int:
    """How many pairs of an output and a kernel's entry meet an input, along one axis of a convolution.

    Args:
      size, kernel, outputs: lengths of input, kernel and output.
      stride, padding: stride and padding of the windows.
      dilation: the input's, ``lhs_dilation``.
      spread: the kernel's, ``rhs_dilation``.
    """
    at = stride * np.arange(outputs)[:, None] + spread * np.arange(kernel) - padding[0]
    return int(np.sum((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)))


def inner_program(equation: Any) -> Jaxpr | None:
    """The program that an equation runs once on its operands (a call, or a function with its own derivative), or ``None``."""
    inner = _inner_programs(equation)
    if len(inner) != 1 or equation.primitive.name in ("scan", "while", "cond"):
        return None
    same = len(inner[0].invars) == len(equation.invars) and len(inner[0].outvars) == len(equation.outvars)
    return inner[0] if same else None


def plain_branch(equation: Any) -> Jaxpr | None:
    """The plain form of a choice by platform, on the operands but for the first; ``None`` for all other equations."""
    platforms = equation.params.get("branches_platforms")
    if platforms is None:
        return None
    return equation.params["branches"][platforms.index(None)].jaxpr


def _inner_programs(equation: Any) -> list[Jaxpr]:
    return [
        item.jaxpr if isinstance(item, ClosedJaxpr) else item
        for value in equation.params.values()
        for item in (value if isinstance(value, (tuple, list)) else (value,))
        if isinstance(item, (ClosedJaxpr, Jaxpr))
    ]


def _flops(jaxpr: Jaxpr, wanted: list[bool], padding: bool) -> tuple[int, list[bool]]:
    """FLOPs that the wanted outputs need, and which inputs they need."""
    live = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not isinstance(v, Literal)}
    total = 0
    for equation in reversed(jaxpr.eqns):
        outputs = [v in live for v in equation.outvars]
        if not any(outputs) and not equation.effects:
            continue
        count, inputs = _equation_flops(equation, outputs, padding)
        total += count
        live |= {v for v, need in zip(equation.invars, inputs, strict=True) if need and not isinstance(v, Literal)}
    return total, [v in live for v in jaxpr.invars]


def _equation_flops(equation: Any, outputs: list[bool], padding: bool) -> tuple[int, list[bool]]:
    every_input = [True] * len(equation.invars)
    called = inner_program(equation)
    if called is not None:
        return _flops(called, outputs, padding)
    branch = plain_branch(equation)
    if branch is not None:
        count, inputs = _flops(branch, outputs, padding)
        return count, [True, *inputs]
    counts = [_flops(jaxpr, [True] * len(jaxpr.outvars), padding)[0] for jaxpr in _inner_programs(equation)]
    if equation.primitive.name == "cond":
        return max(counts), every_input
    return 2 * equation_macs(equation, padding) + sum(counts) * equation.params.get("length", 1), every_input
