"""What a model's forward pass consists of, read off its own trace: products, each with its layer, and element-wise work.

Shapes alone are traced. Named scopes that an interceptor opens around the modules' calls say which module each equation
belongs to; following the parameters through the program says which operands need cotangents.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import Jaxpr, Literal

from lbpwht_jax.adaptation.loops import told_apart
from lbpwht_jax.layers.linen import LowRankDense
from lbpwht_jax.ops.convolution import ConvProduct
from lbpwht_jax.ops.flops import equation_macs, inner_program, plain_branch
from lbpwht_jax.ops.spec import Grid

# What a module that does element-wise work alone counts as, all its equations together: the first of these found in the name
# of its class or of a class it derives from. Norms of any source and kind are among them.
_ELEMENTWISE_MODULES = {
    "BatchNorm": "batch_norm",
    r"(Layer|RMS|Group|Instance)_?Norm": "layer_norm",
    "LayerScale": "layer_scale",
    "AveragePool": "pooling",
}
# What single equations count as elsewhere.
_ELEMENTWISE_EQUATIONS = {"erf": "gelu", "erfc": "gelu", "exp": "softmax", "reduce_window_sum": "pooling", "add": "add"}
# Equations through which a parameter stays recognisable (a stem pads its kernel to four channels).
_VIEWS = ("reshape", "transpose", "pad", "convert_element_type", "squeeze", "broadcast_in_dim", "stop_gradient")
_SCOPE = re.compile(r"<module ([^>]*)>")


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution in one image's forward pass.

    Attributes:
      path: path of the module it belongs to.
      kind: ``"dense"`` with a kernel ``[in, out]``; ``"conv"``; ``"depthwise"``; ``"attention"`` between two activations; or
        ``"constant"`` with numbers known beforehand, such as an interpolation's.
      parameter: name of the kernel within the module, such as ``"kernel"``; empty for attention and constants.
      macs: multiply-accumulates as usually counted: a convolution's padding included, channels of zeros added to it not.
      inside_macs: multiply-accumulates as computed, without the padding.
      tokens: rows of the input of a dense layer; positions of a convolution's output.
      channels: input and output channels; zeros for attention and constants.
      input_elements: elements of the left operand.
      grid: tokens along each axis, known for this library's dense layers; else ``None``.
      prefix_tokens: leading tokens outside the grid.
      input_bits: in how many bits the input or its coefficients are kept, where ``residuals`` rounds them; else ``None``.
      needs_dx: how many of the operands besides the kernel need a cotangent: up to 1, for attention up to 2.
      needs_dw: whether the kernel is trained.
      needs_db: whether the module has a trained bias.
    """

    path: str
    kind: str
    parameter: str
    macs: int
    inside_macs: int
    tokens: int
    channels: tuple[int, int]
    input_elements: int
    grid: Grid | None
    prefix_tokens: int
    input_bits: int | None
    needs_dx: int
    needs_dw: bool
    needs_db: bool


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """Element-wise work on one image that the backward pass goes through.

    Attributes:
      path: path of the module it belongs to.
      kind: ``"gelu"``, ``"batch_norm"``, ``"layer_norm"`` (every other norm too), ``"layer_scale"``, ``"pooling"``,
        ``"softmax"`` or ``"add"``.
      elements: numbers in the array.
    """

    path: str
    kind: str
    elements: int


Record = Product | Elementwise


def layer_records(
    model: Any,
    variables: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    trained: Callable[[str], bool] = lambda path: True,
) -> list[Record]:
    """The products and the element-wise work of one image's forward pass in training, in order.

    Nothing is computed or allocated.

    Args:
      model: a Linen module or ``AdaptedModule``, called as ``model.apply(variables, images, train=True)``; its blocks are
        taken one by one where they run as loops of ``create_model``, and norms apart from the layers in front of them.
      variables: its variables, arrays or ``jax.ShapeDtypeStruct``.
      image_shape: height, width and channels.
      trained: whether the parameter at a path, such as ``"blocks_0/mlp/fc1/kernel"``, is trained.

    Returns:
      Every product, and the element-wise work on what depends on a trained parameter.

    Raises:
      ValueError: if the model has a loop or a branch of JAX's, such as ``nn.scan`` makes.
    """
    model = told_apart(model)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params: dict[str, Any] = flatten_dict(variables["params"], sep="/")
    others = {name: tree for name, tree in variables.items() if name != "params"}
    modules = _Modules()

    def forward(params: Mapping[str, Any], others: Any, images: jax.Array) -> Any:
        tree = {"params": unflatten_dict(params, sep="/"), **others}
        with nn.intercept_methods(modules):
            return model.apply(tree, images, train=True, rngs={"dropout": jax.random.key(0)}, mutable=list(others))

    program = jax.make_jaxpr(forward)(params, others, images).jaxpr
    names = sorted(params)  # JAX flattens dictionaries in this order
    values = [_Value(name, trained(name)) for name in names]
    sizes = {name: math.prod(params[name].shape) for name in names}
    walk = _Walk(modules.kinds(), modules.grids, modules.input_bits, {name for name in names if trained(name)}, sizes)
    walk(program, values + [_Value()] * (len(program.invars) - len(values)), "")
    return walk.records


class _Modules:
    """An interceptor that notes the modules' classes, grids and bits, and opens a named scope around each call."""

    def __init__(self):
        self.classes: dict[str, type] = {}
        self.grids: dict[str, tuple[Grid, int]] = {}
        self.input_bits: dict[str, int | None] = {}

    def __call__(self, call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*arguments, **keywords)
        module, path = context.module, "/".join(context.module.path)
        self.classes[path] = type(module)
        if isinstance(module, LowRankDense):
            grid = tuple(jnp.shape(arguments[0])[1:-1]) if module.grid is None else module.grid
            self.grids[path] = grid, module.prefix_tokens
            self.input_bits[path] = module.input_bits if module.dot_general is None else None
        if isinstance(module, nn.Conv):
            product = module.conv_general_dilated
            self.input_bits[path] = product.bits if isinstance(product, ConvProduct) else None
        with jax.named_scope(f"<module {path}>"):
            return call(*arguments, **keywords)

    def kinds(self) -> dict[str, str]:
        """The kinds of the modules that do element-wise work alone, by path; modules with others inside do more."""
        found = {path: kind for path, cls in self.classes.items() if (kind := _elementwise_kind(cls))}
        inside = {path: path and f"{path}/" for path in found}
        return {
            path: kind
            for path, kind in found.items()
            if not any(other != path and other.startswith(inside[path]) for other in self.classes)
        }


def _elementwise_kind(cls: type) -> str:
    names = [base.__name__ for base in cls.__mro__]
    return next((kind for pattern, kind in _ELEMENTWISE_MODULES.items() if any(re.search(pattern, n) for n in names)), "")


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of an array: the parameter that it is, if any; whether it depends on trained ones; or on nothing."""

    parameter: str = ""
    active: bool = False
    constant: bool = False


class _Walk:
    """Goes through a program in order and collects the records."""

    def __init__(
        self,
        kinds: Mapping[str, str],
        grids: Mapping[str, Any],
        input_bits: Mapping[str, int | None],
        trained: set[str],
        sizes: Mapping[str, int],
    ):
        self.kinds, self.grids, self.input_bits, self.trained, self.sizes = kinds, grids, input_bits, trained, sizes
        self.records: list[Record] = []

    def __call__(self, program: Jaxpr, inputs: list[_Value], path: str) -> list[_Value]:
        """Goes through ``program``, called in the module at ``path`` on ``inputs``; returns what is known of its outputs."""
        values: dict[Any, _Value] = dict(zip(program.invars, inputs, strict=True))

        def value(v: Any) -> _Value:
            return _Value(constant=True) if isinstance(v, Literal) else values.get(v, _Value(constant=True))

        for equation in program.eqns:
            scopes = _SCOPE.findall(str(equation.source_info.name_stack))
            outputs = self._equation(equation, [value(v) for v in equation.invars], scopes[-1] if scopes else path)
            values.update(zip(equation.outvars, outputs, strict=True))
        return [value(v) for v in program.outvars]

    def _equation(self, equation: Any, operands: list[_Value], path: str) -> list[_Value]:
        name = equation.primitive.name
        inner = inner_program(equation)
        if inner is not None:
            return self(inner, operands, path)
        branch = plain_branch(equation)
        if branch is not None:
            return self(branch, operands[1:], path)
        if name in ("scan", "while", "cond"):
            raise ValueError(f"{path or 'the model'}: the layers inside a {name} cannot be told apart; unroll it")
        active = name != "stop_gradient" and any(operand.active for operand in operands)
        constant = all(operand.constant for operand in operands)
        if name in ("dot_general", "conv_general_dilated") and not constant:
            self.records.append(self._product(equation, operands, path))
        elif active:
            self._elementwise(equation, operands, path)
        parameter = operands[0].parameter if name in _VIEWS else ""
        return [_Value(parameter, active, constant)] * len(equation.outvars)

    def _product(self, equation: Any, operands: list[_Value], path: str) -> Product:
        kernel = operands[1]
        shapes = [v.aval.shape for v in equation.invars]
        output = equation.outvars[0].aval.shape
        channels, tokens, kind = (0, 0), 0, "attention"
        if equation.primitive.name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            channels = (shapes[0][numbers.lhs_spec[1]], output[numbers.out_spec[1]])
            kind = "depthwise" if equation.params["feature_group_count"] > 1 else "conv"
        elif kernel.parameter:
            channels, kind = shapes[1], "dense"
        elif any(operand.constant for operand in operands):
            kind = "constant"
        layer = kind in ("dense", "conv", "depthwise")
        if layer:
            tokens = math.prod(output) // channels[1]
        grid, prefix_tokens = self.grids.get(path, (None, 0)) if kind == "dense" else (None, 0)
        module, _, parameter = kernel.parameter.rpartition("/")
        stored = self.sizes.get(kernel.parameter, math.prod(shapes[1])) if layer else math.prod(shapes[1])
        return Product(
            path=path,
            kind=kind,
            parameter=parameter if layer else "",
            macs=equation_macs(equation, padding=True) * stored // math.prod(shapes[1]),
            inside_macs=equation_macs(equation),
            tokens=tokens,
            channels=channels,
            input_elements=math.prod(shapes[0]),
            grid=grid,
            prefix_tokens=prefix_tokens,
            input_bits=self.input_bits.get(path) if layer and len(shapes[0]) > 2 else None,
            needs_dx=sum(operand.active for operand in (operands[:1] if layer else operands)),
            needs_dw=layer and kernel.active,
            needs_db=parameter == "kernel" and f"{module}/bias" in self.trained,
        )

    def _elementwise(self, equation: Any, operands: list[_Value], path: str) -> None:
        elements = math.prod(equation.outvars[0].aval.shape)
        kind = self.kinds.get(path) or _ELEMENTWISE_EQUATIONS.get(equation.primitive.name)
        if kind is None or (kind == "add" and not all(operand.active and not operand.parameter for operand in operands)):
            return
        before = self.records[-1] if self.records else None
        if path in self.kinds and isinstance(before, Elementwise) and before.path == path:
            self.records.pop()
        self.records.append(Elementwise(path, kind, elements))
