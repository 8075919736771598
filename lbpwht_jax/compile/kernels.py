"""FLOPs of the Pallas kernels in a step: a compiler sees a kernel as a closed box, JAX's own program of the step does not."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from lbpwht_jax.compile.hlo import Array, Instruction
from lbpwht_jax.ops.flops import equation_macs

Shapes = tuple[tuple[int, ...], ...]
# By a kernel's operands' and results' shapes: its name and its FLOPs.
KernelFlops = Mapping[Shapes, Sequence[tuple[str, int]]]


def kernel_flops(jaxpr: Any) -> dict[Shapes, list[tuple[str, int]]]:
    """FLOPs of every Pallas kernel in a program: its ``cost_estimate``, or else the products of its body times its grid.

    Args:
      jaxpr: of the traced step.
    """
    found: dict[Shapes, list[tuple[str, int]]] = {}
    for equation in _kernels(jaxpr):
        estimate, grid = equation.params["cost_estimate"], equation.params["grid_mapping"].grid
        flops = 2 * _macs(equation.params["jaxpr"]) * math.prod(n for n in grid if isinstance(n, int))
        shapes = tuple(tuple(v.aval.shape) for v in (*equation.invars, *equation.outvars))
        name = equation.params["name"] or "pallas_call"
        found.setdefault(shapes, []).append((name, flops if estimate is None else int(estimate.flops)))
    return found


def flops_of_call(instruction: Instruction, operands: Sequence[Array], known: KernelFlops) -> int:
    """FLOPs of a call of a kernel, from its shapes and name; 0 for a kernel that is not known."""
    shapes = tuple(array.shape for array in (*operands, *instruction.results))
    named = [flops for name, flops in known.get(shapes, ()) if name in instruction.source]
    return named[0] if named else 0


def _kernels(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in _programs(equation):
                yield from _kernels(inner)


def _macs(jaxpr: Any) -> int:
    """Multiply-adds of a kernel's body, a loop's as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        inner = sum(map(_macs, _programs(equation)))
        total += equation_macs(equation) + inner * equation.params.get("length", 1)
    return total


def _programs(equation: Any) -> Iterator[Any]:
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
        if _is_program(value):
            yield getattr(value, "jaxpr", value)


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns")
