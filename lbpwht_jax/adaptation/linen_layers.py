"""The layers of a Linen model: found in an example call, and called with another product."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import flax.linen as nn
import jax
from jax import lax

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.dataflow import marked
from lbpwht_jax.adaptation.layer import Adaptation, Layer, Stack, called_again
from lbpwht_jax.adaptation.lean import LeanModule, lean_module
from lbpwht_jax.adaptation.matching import Found
from lbpwht_jax.adaptation.shapes import abstract_call
from lbpwht_jax.layers.linen import LowRankDense
from lbpwht_jax.ops.convolution import ConvProduct
from lbpwht_jax.ops.heuristic import Place
from lbpwht_jax.ops.matmul import Link
from lbpwht_jax.ops.pointwise import pointwise_lacks
from lbpwht_jax.ops.spec import Grid

DROPOUT = "dropout"
_DENSE = (nn.Dense, nn.DenseGeneral, LowRankDense)
# parameters of unusual sizes, put beside each kernel while shapes are traced: where the other axes are, there is a stack
_PROBES = {"stack_probe": (1009, 1013, 1019, 1021, 1031, 1033, 1039), "stack_probe_matrix": (1049, 1051)}


def find_layers(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Found:
    """What an example call shows of a model; nothing is computed.

    Args:
      model: a Linen module.
      args: the example call's arguments: arrays or ``jax.ShapeDtypeStruct``, and other things.
      kwargs: its keyword arguments.
    """
    layers: dict[str, Layer] = {}
    maps: dict[Grid, str] = {}
    lean: dict[str, LeanModule] = {}

    def record(call, args, kwargs, context):
        _refuse_jit(context.module)
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and (found := lean_module(context.module)) is not None:
            lean[found.path] = found
        if is_layer_call(context):
            layer = dataclasses.replace(_describe(context.module, args[0].shape), place=_place(context.module, args, kwargs))
            layers[layer.path] = called_again(layers[layer.path], layer.input_shape) if layer.path in layers else layer
            _probe(context.module.scope, len(layer.kernel_shape))
        if isinstance(context.module, nn.Conv) and output.ndim > 2:
            maps.setdefault(output.shape[1:-1], "/".join(context.module.path))
        return output

    def init(*args, **kwargs):
        with nn.intercept_methods(record):
            return model.init(jax.random.key(0), *args, **kwargs)

    counts: dict[str, int] = {}
    stored: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree.leaves_with_path(abstract_call(init, args, kwargs).get("params", {})):
        module, _, name = joined(path).rpartition("/")
        if name in _PROBES:
            stored[joined(path)] = leaf.shape
        elif not any(probe in joined(path) for probe in _PROBES):  # a wrapper may normalise them as well
            counts[module] = counts.get(module, 0) + leaf.size
    found = [dataclasses.replace(layer, stack=_stack(layer, stored)) for layer in layers.values()]
    return Found(found, counts, maps, lean=list(lean.values()))


def joined(path: Any) -> str:
    """The path of a leaf of nested dictionaries, joined by "/"."""
    return "/".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def is_layer_call(context: Any) -> bool:
    """Whether an interceptor is around the call of a layer that rules can adapt."""
    module = context.module
    if context.method_name != "__call__":
        return False
    return isinstance(module, _DENSE) or (isinstance(module, nn.Conv) and module.feature_group_count == 1)


def product_field(module: Any) -> str:
    """The name of the layer's attribute that holds its product."""
    return "conv_general_dilated" if isinstance(module, nn.Conv) else "dot_general"


def is_adapted(module: Any, adaptation: Adaptation) -> bool:
    """Whether the layer computes as the rules say already."""
    if isinstance(module, LowRankDense) and not _needs_product(adaptation):
        own = (module.dot_general, module.spec, module.grid, module.prefix_tokens)
        return own == (None, adaptation.spec, adaptation.grid, adaptation.prefix_tokens)
    return isinstance(getattr(module, product_field(module)), lora.AdaptedProduct)


def twin(module: Any, adaptation: Adaptation, drops: bool) -> Any:
    """The bound layer with the same parameters and another product; ``drops``: whether the branch's dropout acts.

    Raises:
      ValueError: if the branch's dropout gets no key.
    """
    scope: Any = module.scope

    def branch() -> tuple[jax.Array, jax.Array]:
        shapes = lora.shapes(adaptation)
        a = scope.param(lora.A, lora.init_a, shapes[lora.A], module.param_dtype)
        return a, scope.param(lora.B, lora.init_b, shapes[lora.B], module.param_dtype)

    def dropped(x: jax.Array) -> jax.Array:
        if not (drops and adaptation.dropout):
            return x
        if not scope.has_rng(DROPOUT):
            raise ValueError(
                f"adapt: the rng 'dropout' does not reach {adaptation.layer.shown}, whose branch has dropout; the nn.scan or "
                "nn.vmap around it must pass it on: split_rngs={'dropout': True}"
            )
        return lora.drop(scope.make_rng(DROPOUT), x, adaptation.dropout)

    if isinstance(module, LowRankDense) and not _needs_product(adaptation):
        at = {"grid": adaptation.grid, "prefix_tokens": adaptation.prefix_tokens}
        return module.clone(parent=scope, dot_general=None, spec=adaptation.spec, **at)
    if not isinstance(module, nn.Conv):
        dense = lora.dense_product(adaptation)
    else:
        dense = _product(module) if adaptation.spec is None else lora.convolution(adaptation)
    replaced: dict[str, Any] = {product_field(module): lora.AdaptedProduct(adaptation, dense, branch, dropped)}
    return module.clone(parent=scope, **replaced)


def intercept_marked(paths: Set[str]) -> Callable[..., Any]:
    """An interceptor that marks the kernels of the layers at ``paths`` in a trace, as ``follow`` wants them."""

    def mark(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if path not in paths or not is_layer_call(context) or _has_own_product(module):
            return call(*args, **kwargs)
        replaced: dict[str, Any] = {product_field(module): marked(_product(module), path)}
        return module.clone(parent=module.scope, **replaced)(*args, **kwargs)

    return mark


def _has_own_product(module: Any) -> bool:
    """Whether the layer's product is neither Flax's nor this library's for convolutions."""
    product = getattr(module, product_field(module))
    return product is not None and not isinstance(product, ConvProduct)


def _product(module: Any) -> Callable[..., Any]:
    product = getattr(module, product_field(module))
    return product or (lax.conv_general_dilated if isinstance(module, nn.Conv) else lax.dot_general)


def _needs_product(adaptation: Adaptation) -> bool:
    """Whether even a ``LowRankDense`` needs another product: its ``spec`` does not do all that is asked."""
    return bool(adaptation.rank) or adaptation.layer.on_vectors


def _probe(scope: Any, ndim: int) -> None:
    if scope.is_mutable_collection("params"):
        for (name, sizes), count in zip(_PROBES.items(), (ndim, 2), strict=True):
            if not scope.has_variable("params", name):
                scope.param(name, nn.initializers.zeros, sizes[:count])


def _stack(layer: Layer, stored: Mapping[str, tuple[int, ...]]) -> Stack:
    """How the layer's parameters are stacked, by the stored shapes of the probes."""

    def axes(name: str) -> dict[int, int]:
        shape = stored.get(f"{layer.path}/{name}" if layer.path else name, ())
        return {axis: size for axis, size in enumerate(shape) if size not in _PROBES[name]}

    kernel, matrix = axes("stack_probe"), axes("stack_probe_matrix")
    return Stack(tuple(kernel.values()), tuple(kernel), tuple(matrix))


def _is_pointwise(module: nn.Conv) -> bool:
    dilations, groups = (module.input_dilation, module.kernel_dilation), (module.feature_group_count,)
    return not pointwise_lacks(module.kernel_size, module.strides, module.padding, dilations, groups)


def _describe(module: Any, shape: tuple[int, ...]) -> Layer:
    kernel = module.get_variable("params", "kernel")
    kernel = jax.tree.leaves(kernel)[0].shape
    path, kind, field = "/".join(module.path), type(module).__name__, product_field(module)
    has_own = not isinstance(module, LowRankDense) and (_has_own_product(module) or getattr(module, f"{field}_cls"))
    own = field if has_own else ""
    if isinstance(module, nn.Conv):
        spatial = len(kernel) - 2
        batch = math.prod(shape[: len(shape) - 1 - spatial])
        window = () if _is_pointwise(module) else kernel[:-2]
        inputs = (batch, *shape[len(shape) - 1 - spatial :])
        return Layer(path, kind, inputs, kernel, kernel[-1], convolution=True, window=window, own_product=own)
    features = len(module.features) if isinstance(module.features, Sequence) else 1
    contracted = len(kernel) - features
    inputs = (*shape[: len(shape) - contracted], math.prod(kernel[:contracted]))
    layer = Layer(path, kind, inputs, kernel, math.prod(kernel[contracted:]), contracted=contracted, own_product=own)
    if isinstance(module, LowRankDense):
        return dataclasses.replace(layer, grid=module.grid, prefix_tokens=module.prefix_tokens)
    return layer


def _place(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Place | None:
    """Which of two joined layers a call is of."""
    if not isinstance(module, LowRankDense) or not any(isinstance(value, Link) for value in (*args, *kwargs.values())):
        return None
    before = kwargs.get("before", args[3] if len(args) > 3 else None)
    return "second" if module.activation is not None or before is not None else "first"


def _refuse_jit(module: nn.Module) -> None:
    own, *bases = type(module).__mro__
    if own.__name__ == f"Jit{bases[0].__name__}":
        raise ValueError(
            f"adapt: the model has a {bases[0].__name__} made by nn.jit, whose traces hide the paths inside and are kept "
            "between models, adapted or not; leave nn.jit out and compile the whole step with jax.jit"
        )
