"""What reaches a layer's product, followed through a traced call: the kernel as it is stored? tokens along the right axis?"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Literal

from lbpwht_jax.adaptation.layer import Layer
from lbpwht_jax.ops.flops import inner_program

_KERNEL, _INPUT = "kernel of ", "input of "
# what leaves a kernel's numbers as they are, but for rounding
_VIEWS = {"convert_element_type", "copy", "mesh_cast", "name", "pvary", "reduce_precision", "reshape", "reshard"}
_VIEWS |= {"sharding_constraint", "squeeze", "stop_gradient", "transpose", "optimization_barrier"}

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of an array.

    Attributes:
      kernel: the path of the layer whose stored kernel it is, or ``""``.
      tokens: the axes along which tokens lie; none if a layer has contracted them; ``None`` if that is not known.
    """

    kernel: str = ""
    tokens: Axes | None = None


_UNKNOWN = Value()


@dataclasses.dataclass
class Seen:
    """What reaches the marked products.

    Attributes:
      plain: by the layers' paths, whether each kernel is a parameter as it is stored.
      token_axes: by the layers' paths, the axes along which tokens lie in the inputs, where that is known, counted from
        behind.
    """

    plain: dict[str, bool] = dataclasses.field(default_factory=dict)
    token_axes: dict[str, set[Axes]] = dataclasses.field(default_factory=dict)

    def told(self, layer: Layer) -> Layer:
        """The layer with what was seen of it; a layer whose product was not found counts as one that computes its kernel."""
        mixes = any(not axes or max(axes) >= -layer.contracted for axes in self.token_axes.get(layer.path, ()))
        return dataclasses.replace(layer, plain=self.plain.get(layer.path, False), mixes_tokens=mixes)


def marked(product: Callable[..., Any], path: str) -> Callable[..., Any]:
    """``product(lhs, rhs, ...)`` whose operands are marked in traces as input and kernel of the layer at ``path``."""

    def call(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return product(checkpoint_name(lhs, _INPUT + path), checkpoint_name(rhs, _KERNEL + path), *args, **kwargs)

    return call


def follow(program: Jaxpr, variables: Mapping[str, Any], layer_of: Callable[[Any], str]) -> Seen:
    """Follows kernels and tokens to the products that ``marked`` marks.

    Args:
      program: a call of the model, traced on ``(variables, ...)``.
      variables: the variables, whose leaves are the program's first inputs.
      layer_of: for a leaf's path in ``variables``, the path of the layer whose kernel it is, or ``""``.
    """
    seen = Seen()
    kernels = [Value(layer_of(path)) for path, _ in jax.tree.leaves_with_path(variables)]
    _walk(program, kernels + [_UNKNOWN] * (len(program.invars) - len(kernels)), seen)
    return seen


def _walk(program: Jaxpr, inputs: Sequence[Value], seen: Seen) -> list[Value]:
    """Goes through a program in order; returns what is known of its outputs."""
    values: dict[Any, Value] = dict(zip(program.invars, inputs, strict=True))

    def value(v: Any) -> Value:
        return _UNKNOWN if isinstance(v, Literal) else values.get(v, _UNKNOWN)

    for equation in program.eqns:
        operands = [value(v) for v in equation.invars]
        outputs = _inside(equation, operands, seen)
        if outputs is None:
            views = equation.primitive.name in _VIEWS
            kernels = [operand.kernel for operand in operands] if views else []
            kernels += [""] * (len(equation.outvars) - len(kernels))
            tokens = _tokens(equation, operands)
            outputs = [Value(kernel, tokens) for kernel, _ in zip(kernels, equation.outvars, strict=False)]
        if equation.primitive.name == "name":
            _note(equation, operands[0], seen)
        values.update(zip(equation.outvars, outputs, strict=False))
    return [value(v) for v in program.outvars]


def _note(equation: Any, operand: Value, seen: Seen) -> None:
    mark, ndim = equation.params["name"], equation.invars[0].aval.ndim
    if mark.startswith(_KERNEL):
        path = mark.removeprefix(_KERNEL)
        seen.plain[path] = seen.plain.get(path, True) and operand.kernel == path
    elif mark.startswith(_INPUT) and operand.tokens is not None:
        seen.token_axes.setdefault(mark.removeprefix(_INPUT), set()).add(tuple(axis - ndim for axis in operand.tokens))


def _inside(equation: Any, operands: list[Value], seen: Seen) -> list[Value] | None:
    """Goes through the programs inside an equation; ``None`` if there are none."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        step = params["jaxpr"].jaxpr
        slices = [Value(operand.kernel) for operand in operands]
        inputs = [
            whole if _alike(*pair) else part
            for whole, part, *pair in zip(operands, slices, equation.invars, step.invars, strict=True)
        ]
        outputs = zip(_walk(step, inputs, seen), equation.outvars, step.outvars, strict=True)
        return [value if _alike(*pair) else _UNKNOWN for value, *pair in outputs]
    if name == "while":
        return _walk(params["body_jaxpr"].jaxpr, operands[params["cond_nconsts"] :], seen)
    if name == "cond":
        first, *others = [_walk(branch.jaxpr, operands[1:], seen) for branch in params["branches"]]
        return [own if all(own == other[i] for other in others) else _UNKNOWN for i, own in enumerate(first)]
    inner = inner_program(equation)
    return None if inner is None else _walk(inner, operands, seen)


def _alike(outside: Any, inside: Any) -> bool:
    """Whether each step of a loop has the whole array, and not a slice of it: versions of JAX say it in ways of their own."""
    return outside.aval.ndim == inside.aval.ndim


def _tokens(equation: Any, operands: list[Value]) -> Axes | None:
    """``Value.tokens`` of an equation's first output."""
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        return tuple(sorted(params["dimension_numbers"].out_spec[2:]))
    known = {i: operand.tokens for i, operand in enumerate(operands) if operand.tokens is not None}
    if not known or (name == "dot_general" and 0 not in known):
        return None
    index = 0 if name == "dot_general" else next((i for i, axes in known.items() if axes), min(known))
    axes = known[index]
    if not axes:
        return axes
    before, after = equation.invars[index].aval.shape, equation.outvars[0].aval.shape
    if name == "transpose":
        return tuple(sorted(params["permutation"].index(axis) for axis in axes))
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        order = [*batch, *(axis for axis in range(len(before)) if axis not in (*contracted, *batch))]
        if set(axes) & set(contracted):
            return () if operands[1].kernel else None
    elif name == "broadcast_in_dim":
        places = params["broadcast_dimensions"]
        return tuple(places[axis] for axis in axes)
    elif name == "reshape":
        return _reshaped(axes, before, after)
    elif len(after) == len(before):
        return axes
    else:
        dropped = params.get("axes", params.get("dimensions", ()))
        order = [axis for axis in range(len(before)) if axis not in dropped]
    return tuple(order.index(axis) for axis in axes) if set(axes) <= set(order) else None


def _reshaped(axes: Axes, before: Sequence[int], after: Sequence[int]) -> Axes | None:
    """Where neighbouring axes go that a reshape keeps or joins."""
    if list(axes) != list(range(axes[0], axes[-1] + 1)):
        return None
    size = math.prod(before[axis] for axis in axes)
    for axis in range(len(after)):
        if math.prod(after[:axis]) == math.prod(before[: axes[0]]):
            if after[axis] == size:
                return (axis,)
            if tuple(after[axis : axis + len(axes)]) == tuple(before[axis] for axis in axes):
                return tuple(range(axis, axis + len(axes)))
    return None
