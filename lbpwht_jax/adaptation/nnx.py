"""``adapt`` for NNX models: on a copy, the layers' public ``dot_general`` and ``conv_general_dilated`` are replaced."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.rules import Adaptation, Layer, Resolution
from lbpwht_jax.adaptation.shapes import abstract_call
from lbpwht_jax.ops.dot_general import LowRankDotGeneral
from lbpwht_jax.ops.pointwise import pointwise_lacks


class FrozenParam(nnx.Variable):
    """A parameter that is not trained."""


class AdaptedNNXProduct(nnx.Module):
    """Stands in for ``lax.dot_general`` or ``lax.conv_general_dilated`` in a layer, and holds its LoRA branch.

    Args:
      adaptation: of the layer.
      dense: the product of the layer itself.
      key: of the random ``A``.
      dtype: of the branch's parameters.
    """

    def __init__(self, adaptation: Adaptation, dense: Any, key: jax.Array, dtype: Any):
        self.adaptation, self.dense = adaptation, dense
        shapes = lora.shapes(adaptation)
        self.lora_a = nnx.LoRAParam(lora.init_a(key, shapes[lora.A], dtype))
        self.lora_b = nnx.LoRAParam(lora.init_b(key, shapes[lora.B], dtype))

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The product, plus the branch's; arguments as of the function it stands for."""
        product = lora.AdaptedProduct(self.adaptation, self.dense, lambda: (self.lora_a[...], self.lora_b[...]))
        return product(lhs, rhs, *args, **kwargs)


def find_nnx_layers(model: nnx.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Layer], dict[str, int]]:
    """The dense layers that a call of the model reaches, and the number of parameters of each module, by path.

    Args:
      model: left as it is.
      args: of the call; arrays or ``jax.ShapeDtypeStruct``, and other things.
      kwargs: of the call, likewise.
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


def adapt_nnx(model: nnx.Module, resolution: Resolution) -> nnx.Module:
    """A copy of the model under resolved rules; ``A`` of the LoRA branches is drawn from ``jax.random.key(0)``.

    Raises:
      ValueError: if a layer that a rule takes has a product of its own.
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
