"""The layers of an NNX model: found in an example call, and the module that holds a layer's LoRA branch."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.dataflow import follow, marked
from lbpwht_jax.adaptation.layer import Adaptation, Layer, Stack, called_again
from lbpwht_jax.adaptation.matching import Found
from lbpwht_jax.adaptation.shapes import abstract_program
from lbpwht_jax.ops.dot_general import LowRankDotGeneral
from lbpwht_jax.ops.pointwise import pointwise_lacks
from lbpwht_jax.ops.spec import Grid


class FrozenParam(nnx.Variable):
    """A parameter that is not trained."""


class AdaptedNNXProduct(nnx.Module):
    """Stands in for a layer's ``lax.dot_general`` or ``lax.conv_general_dilated``, and holds the layer's LoRA branch.

    Args:
      adaptation: how the layer is adapted.
      dense: the layer's own product.
      rngs: the stream ``params`` gives the keys of ``A`` and of the dropout.
      dtype: dtype of the branch's parameters.
    """

    def __init__(self, adaptation: Adaptation, dense: Any, rngs: nnx.Rngs, dtype: Any):
        self.adaptation, self.dense = adaptation, dense
        key = rngs.params()
        fresh = lora.fresh(adaptation, key, dtype)
        self.lora_a, self.lora_b = nnx.LoRAParam(fresh[lora.A]), nnx.LoRAParam(fresh[lora.B])
        if adaptation.dropout:
            self.dropout = nnx.Dropout(adaptation.dropout, rngs=nnx.Rngs(dropout=jax.random.fold_in(key, 1)))

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The product plus the branch's output; the arguments are those of the function that this stands in for."""
        dropped = self.dropout if self.adaptation.dropout else lambda x: x
        product = lora.AdaptedProduct(self.adaptation, self.dense, lambda: (self.lora_a[...], self.lora_b[...]), dropped)
        return product(lhs, rhs, *args, **kwargs)


def find_nnx_layers(model: nnx.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Found:
    """What an example call shows of a model; nothing is computed.

    Args:
      model: left as it is.
      args: arguments of the call; arrays or ``jax.ShapeDtypeStruct``, and other values.
      kwargs: keyword arguments of the call, in the same form.

    Raises:
      ValueError: if the model is adapted already.
    """
    copy = nnx.clone(model)
    layers: dict[str, Layer] = {}
    counts: dict[str, int] = {}
    maps: dict[Grid, str] = {}
    dense: set[str] = set()
    for path, node in list(nnx.iter_graph(copy, graph=True)):
        if isinstance(node, FrozenParam | AdaptedNNXProduct):
            raise ValueError(
                "adapt: the model is adapted already; give all rules at once, on the model as it was or merge(model)"
            )
        if isinstance(node, nnx.Param):
            module = joined(path[:-1])
            counts[module] = counts.get(module, 0) + node[...].size
        elif isinstance(node, nnx.Conv) or is_layer(node):
            field = product_field(node)
            record = _recorder(joined(path), node, getattr(node, field), layers if is_layer(node) else None, maps)
            setattr(node, field, record)
            dense |= {joined(path)} if is_layer(node) else set()
    graph, state = nnx.split(copy)

    def call(state, *args, **kwargs):
        nnx.merge(graph, state)(*args, **kwargs)
        return ()

    program = abstract_program(call, (state, *args), kwargs)

    def layer_of(path):
        *module, leaf = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return joined(module) if leaf == "kernel" and joined(module) in layers else ""

    seen = follow(program, state, layer_of)
    found = [seen.told(layer) for layer in layers.values()]
    return Found(found, counts, maps, frozenset(dense - layers.keys()))


def branches_of(model: nnx.Module) -> list[tuple[Any, AdaptedNNXProduct]]:
    """The layers that have a LoRA branch, each with the product that holds it."""
    layers = [node for _, node in nnx.iter_graph(model, graph=True) if is_layer(node)]
    products = [(layer, getattr(layer, product_field(layer))) for layer in layers]
    return [(layer, product) for layer, product in products if isinstance(product, AdaptedNNXProduct)]


def joined(path: Sequence[Any]) -> str:
    """The path of a node of the graph, joined by "/"."""
    return "/".join(map(str, path))


def as_rngs(rngs: Any) -> nnx.Rngs:
    """Keys as users give them: an ``nnx.Rngs``, or what one is made of, such as a key."""
    return rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)


def with_rngs(model: nnx.Module, kwargs: Mapping[str, Any], rngs: Any) -> dict[str, Any]:
    """Keyword arguments of a call of the model, ``rngs`` among them if it is given and the call takes it."""
    parameters = inspect.signature(type(model).__call__).parameters
    takes = "rngs" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {**kwargs, "rngs": rngs} if takes and rngs is not None else dict(kwargs)


def is_layer(node: Any) -> bool:
    """Whether a node of the graph is a layer that rules can adapt."""
    if isinstance(node, nnx.Conv):
        return node.feature_group_count == 1
    return isinstance(node, (nnx.Linear, nnx.LinearGeneral))


def _is_pointwise(layer: Any) -> bool:
    dilations, groups = (layer.input_dilation, layer.kernel_dilation), (layer.feature_group_count,)
    return not pointwise_lacks(layer.kernel_size, layer.strides, layer.padding, dilations, groups)


def product_field(layer: Any) -> str:
    """The name of the layer's attribute that holds its product."""
    return "conv_general_dilated" if isinstance(layer, nnx.Conv) else "dot_general"


def _recorder(path: str, layer: Any, product: Any, layers: dict[str, Layer] | None, maps: dict[Grid, str]) -> Any:
    """``product``, noting in ``layers`` what the layer is called on, and in ``maps`` the sizes of a convolution's output."""
    is_conv = isinstance(layer, nnx.Conv)
    stored = layer.kernel[...].shape
    features = len(layer.out_features) if isinstance(layer, nnx.LinearGeneral) else 1
    field = product_field(layer)
    given = getattr(layer, f"{field}_cls", None) or product
    own = "" if given in (None, getattr(lax, field)) or isinstance(given, LowRankDotGeneral) else field
    product = product or getattr(lax, field)

    def record(lhs, rhs, *args, **kwargs):
        output = marked(product, path)(lhs, rhs, *args, **kwargs)
        if is_conv:
            maps.setdefault(output.shape[1:-1], path)
        if layers is not None:
            contracted = 1 if is_conv else rhs.ndim - features
            shape = (*lhs.shape[: lhs.ndim - contracted], math.prod(lhs.shape[lhs.ndim - contracted :]))
            axes = tuple(range(len(stored) - rhs.ndim))
            stack = Stack(stored[: len(axes)], axes, axes)
            outputs = rhs.shape[-1] if is_conv else math.prod(rhs.shape[contracted:])
            kind, window = type(layer).__name__, rhs.shape[:-2] if is_conv and not _is_pointwise(layer) else ()
            described = Layer(path, kind, shape, rhs.shape, outputs, is_conv, window, contracted, stack=stack, own_product=own)
            layers[path] = called_again(layers[path], shape) if path in layers else described
        return output

    return record
