"""``adapt`` for NNX models: in a copy, the layers' public ``dot_general`` and ``conv_general_dilated`` are replaced."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import lax

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.resolution import Adaptation, Layer, Resolution
from lbpwht_jax.adaptation.shapes import abstract_call
from lbpwht_jax.ops.dot_general import LowRankDotGeneral
from lbpwht_jax.ops.pointwise import pointwise_lacks

M = TypeVar("M", bound=nnx.Module)


class FrozenParam(nnx.Variable):
    """A parameter that is not trained."""


class AdaptedNNXProduct(nnx.Module):
    """Stands in for a layer's ``lax.dot_general`` or ``lax.conv_general_dilated``, and holds the layer's LoRA branch.

    Args:
      adaptation: how the layer is adapted.
      dense: the layer's own product.
      key: the random key of ``A``.
      dtype: dtype of the branch's parameters.
    """

    def __init__(self, adaptation: Adaptation, dense: Any, key: jax.Array, dtype: Any):
        self.adaptation, self.dense = adaptation, dense
        shapes = lora.shapes(adaptation)
        self.lora_a = nnx.LoRAParam(lora.init_a(key, shapes[lora.A], dtype))
        self.lora_b = nnx.LoRAParam(lora.init_b(key, shapes[lora.B], dtype))
        if adaptation.dropout:
            self.dropout = nnx.Dropout(adaptation.dropout, rngs=nnx.Rngs(jax.random.fold_in(key, 1)))

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The product plus the branch's output; the arguments are those of the function that this stands in for."""
        dropped = self.dropout if self.adaptation.dropout else lambda x: x
        product = lora.AdaptedProduct(self.adaptation, self.dense, lambda: (self.lora_a[...], self.lora_b[...]), dropped)
        return product(lhs, rhs, *args, **kwargs)


def find_nnx_layers(model: nnx.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Layer], dict[str, int]]:
    """The dense layers that a call of the model reaches, and each module's number of own parameters by path.

    Args:
      model: left as it is.
      args: arguments of the call; arrays or ``jax.ShapeDtypeStruct``, and other values.
      kwargs: keyword arguments of the call, in the same form.
    """
    copy = nnx.clone(model)
    found: dict[str, Layer] = {}
    counts: dict[str, int] = {}
    for path, node in list(nnx.iter_graph(copy, graph=True)):
        if isinstance(node, nnx.Param):
            module = _joined(path[:-1])
            counts[module] = counts.get(module, 0) + node[...].size
        elif _is_layer(node):
            field = _field(node)
            setattr(node, field, _recorder(_joined(path), node, getattr(node, field), found))
    graph, state = nnx.split(copy)

    def call(state, *args, **kwargs):
        nnx.merge(graph, state)(*args, **kwargs)
        return ()

    abstract_call(call, (state, *args), kwargs)
    return list(found.values()), counts


def adapt_nnx(model: M, resolution: Resolution) -> M:
    """A copy of the model under resolved rules; the branches' ``A`` and dropout are drawn from ``jax.random.key(0)``.

    Raises:
      ValueError: if a layer that a rule matches has a product of its own.
    """
    copy = nnx.clone(model)
    nodes = dict(nnx.iter_graph(copy, graph=True))
    for path, node in nodes.items():
        if isinstance(node, nnx.Param) and _joined(path[:-1]) in resolution.frozen:
            setattr(nodes[path[:-1]], str(path[-1]), FrozenParam(node[...], **node.get_metadata()))
    by_path = {_joined(path): node for path, node in nodes.items() if _is_layer(node)}
    keys = jax.random.split(jax.random.key(0), max(len(resolution.adaptations), 1))
    for adaptation, key in zip(resolution.adaptations, keys, strict=False):
        layer = by_path[adaptation.layer.path]
        field = _field(layer)
        own = getattr(layer, f"{field}_cls", None) or getattr(layer, field)
        if not (own is None or own is getattr(lax, field) or isinstance(own, LowRankDotGeneral)):
            raise ValueError(f"adapt: {adaptation.layer.path} has a {field} of its own; leave it out of the rules' patterns")
        product = lora.convolution(adaptation) if isinstance(layer, nnx.Conv) else lora.dense_product(adaptation)
        if adaptation.rank:
            product = nnx.data(AdaptedNNXProduct(adaptation, product, key, layer.param_dtype))
        setattr(layer, field, product)
    return copy


def with_branches(model: M, rngs: nnx.Rngs) -> M:
    """A copy of an adapted NNX model with fresh LoRA branches: ``A`` random, each layer's from a key of its own, ``B`` zero.

    Args:
      model: an NNX model as ``adapt`` returns it.
      rngs: the stream ``params`` gives the keys.

    Raises:
      ValueError: if the model has no LoRA branch.
    """
    copy = nnx.clone(model)
    branches = _branches(copy)
    if not branches:
        raise ValueError("with_branches: the model has no LoRA branch; adapt it first with a LoRA rule")
    for _, product in branches:
        for parameter, init in ((product.lora_a, lora.init_a), (product.lora_b, lora.init_b)):
            parameter[...] = init(rngs.params(), parameter.shape, parameter.dtype)
    return copy


def merge(model: M) -> M:
    """A copy of an adapted NNX model with LoRA's branches added to the kernels and removed; outputs are equal to rounding.

    Frozen parameters are ``nnx.Param`` again, so that the copy's state fits the model that was adapted. The layers keep the
    backward pass that the rules gave them.

    Args:
      model: an NNX model as ``adapt`` returns it.
    """
    copy = nnx.clone(model)
    for layer, product in _branches(copy):
        kernel = layer.kernel[...]
        change = lora.delta(product.adaptation, product.lora_a[...], product.lora_b[...])
        layer.kernel[...] = kernel + change.astype(kernel.dtype)
        setattr(layer, _field(layer), nnx.static(product.dense))  # the attribute held data
    nodes = dict(nnx.iter_graph(copy, graph=True))
    for path, node in nodes.items():
        if isinstance(node, FrozenParam):
            setattr(nodes[path[:-1]], str(path[-1]), nnx.Param(node[...], **node.get_metadata()))
    return copy


def _branches(model: nnx.Module) -> list[tuple[Any, AdaptedNNXProduct]]:
    """The layers that have a LoRA branch, each with the product that holds it."""
    layers = [node for _, node in nnx.iter_graph(model, graph=True) if _is_layer(node)]
    products = [(layer, getattr(layer, _field(layer))) for layer in layers]
    return [(layer, product) for layer, product in products if isinstance(product, AdaptedNNXProduct)]


def _joined(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))


def _is_layer(node: Any) -> bool:
    if isinstance(node, nnx.Conv):
        dilations, groups = (node.input_dilation, node.kernel_dilation), (node.feature_group_count,)
        return not pointwise_lacks(node.kernel_size, node.strides, node.padding, dilations, groups)
    return isinstance(node, (nnx.Linear, nnx.LinearGeneral))


def _field(layer: Any) -> str:
    return "conv_general_dilated" if isinstance(layer, nnx.Conv) else "dot_general"


def _recorder(path: str, layer: Any, product: Any, found: dict[str, Layer]) -> Any:
    """``product``, noting in ``found`` what the layer is called on."""
    kernel = layer.kernel[...].shape
    contracted = len(kernel) - len(layer.out_features) if isinstance(layer, nnx.LinearGeneral) else 1

    def record(lhs, rhs, *args, **kwargs):
        inputs = (*lhs.shape[: lhs.ndim - contracted], math.prod(lhs.shape[lhs.ndim - contracted :]))
        outputs = kernel[-1] if isinstance(layer, nnx.Conv) else math.prod(kernel[contracted:])
        found.setdefault(path, Layer(path, type(layer).__name__, inputs, kernel, outputs, contracted))
        return (product or lax.dot_general)(lhs, rhs, *args, **kwargs)

    return record
