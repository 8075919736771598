"""Tells kernels that a product takes as they are stored from those that are computed first, such as standardised ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Literal

from lbpwht_jax.ops.flops import inner_program

_MARK = "kernel of "
# what leaves a kernel's numbers as they are, but for rounding
_VIEWS = {"convert_element_type", "copy", "mesh_cast", "name", "pvary", "reduce_precision", "reshape", "reshard"}
_VIEWS |= {"sharding_constraint", "squeeze", "stop_gradient", "transpose", "optimization_barrier"}


def marked(product: Callable[..., Any], path: str) -> Callable[..., Any]:
    """``product(lhs, rhs, ...)`` whose ``rhs`` is marked in traces as the kernel of the layer at ``path``."""

    def call(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return product(lhs, checkpoint_name(rhs, _MARK + path), *args, **kwargs)

    return call


def plain_kernels(program: Jaxpr, inputs: Sequence[str]) -> set[str]:
    """The paths of the layers all of whose marked kernels are parameters as they are stored.

    Args:
      program: a traced call of the model.
      inputs: for each input of the program the path of the layer whose kernel it is, or ``""``.
    """
    seen: dict[str, bool] = {}
    _walk(program, inputs, seen)
    return {path for path, plain in seen.items() if plain}


def _walk(program: Jaxpr, inputs: Sequence[str], seen: dict[str, bool]) -> list[str]:
    """Goes through a program in order; returns for each output whose kernel it is."""
    values: dict[Any, str] = dict(zip(program.invars, inputs, strict=True))

    def value(v: Any) -> str:
        return "" if isinstance(v, Literal) else values.get(v, "")

    for equation in program.eqns:
        operands = [value(v) for v in equation.invars]
        outputs = _inside(equation, operands, seen)
        if outputs is None:
            outputs = operands if equation.primitive.name in _VIEWS else [""] * len(equation.outvars)
        mark = equation.params.get("name") if equation.primitive.name == "name" else None
        if mark and mark.startswith(_MARK):
            path = mark.removeprefix(_MARK)
            seen[path] = seen.get(path, True) and operands[0] == path
        values.update(zip(equation.outvars, outputs, strict=False))
    return [value(v) for v in program.outvars]


def _inside(equation: Any, operands: list[str], seen: dict[str, bool]) -> list[str] | None:
    """Goes through the programs inside an equation; ``None`` if there are none."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _walk(params["jaxpr"].jaxpr, operands, seen)
    if name == "while":
        return _walk(params["body_jaxpr"].jaxpr, operands[params["cond_nconsts"] :], seen)
    if name == "cond":
        first, *others = [_walk(branch.jaxpr, operands[1:], seen) for branch in params["branches"]]
        return [own if all(own == other[i] for other in others) else "" for i, own in enumerate(first)]
    inner = inner_program(equation)
    return None if inner is None else _walk(inner, operands, seen)


def kernel_inputs(variables: Mapping[str, Any], count: int, layer_of: Callable[[Any], str]) -> list[str]:
    """For ``plain_kernels``: the inputs of a program traced on ``(variables, ...)``, ``count`` in all."""
    paths = [layer_of(path) for path, _ in jax.tree.leaves_with_path(variables)]
    return paths + [""] * (count - len(paths))
