"""``adapt`` for NNX models: in a copy, the layers' public ``dot_general`` and ``conv_general_dilated`` are replaced."""

from typing import TypeVar

from flax import nnx

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.nnx_layers import AdaptedNNXProduct, FrozenParam, is_layer, joined, product_field
from lbpwht_jax.adaptation.resolution import Resolution

M = TypeVar("M", bound=nnx.Module)


def adapt_nnx(model: M, resolution: Resolution, rngs: nnx.Rngs) -> M:
    """A copy of the model under resolved rules.

    Args:
      model: left as it is.
      resolution: how the rules apply.
      rngs: the stream ``params`` gives each branch the key of its ``A`` and dropout; not asked where there is no branch.

    Raises:
      ValueError: if a parameter of a Linen module inside ``nnx.bridge.ToNNX`` is frozen.
    """
    copy = nnx.clone(model)
    nodes = dict(nnx.iter_graph(copy, graph=True))
    for path, node in nodes.items():
        if isinstance(node, nnx.Param) and joined(path[:-1]) in resolution.frozen:
            if any(isinstance(nodes.get(path[:depth]), nnx.bridge.ToNNX) for depth in range(len(path))):
                raise ValueError(
                    f"adapt: {joined(path)} belongs to a Linen module inside nnx.bridge.ToNNX, which knows its parameters by "
                    "their class nnx.Param, so it cannot be frozen; leave it out of nnx.grad and nnx.Optimizer with wrt="
                )
            setattr(nodes[path[:-1]], str(path[-1]), FrozenParam(node[...], **node.get_metadata()))
    by_path = {joined(path): node for path, node in nodes.items() if is_layer(node)}
    for adaptation in resolution.adaptations:
        layer = by_path[adaptation.layer.path]
        product = lora.convolution(adaptation) if isinstance(layer, nnx.Conv) else lora.dense_product(adaptation)
        if adaptation.rank:
            product = nnx.data(AdaptedNNXProduct(adaptation, product, rngs, layer.param_dtype))
        setattr(layer, product_field(layer), product)
    setattr(copy, resolution_attribute(copy), nnx.static(resolution))
    return copy


def resolution_of(model: nnx.Module) -> Resolution:
    """How the rules apply to an NNX model as ``adapt`` returns it: ``model.resolution``, unless its class has its own.

    Raises:
      ValueError: if the model is not adapted.
    """
    for name in _ATTRIBUTES:
        if isinstance(found := getattr(model, name, None), Resolution):
            return found
    raise ValueError("resolution_of: the model is not adapted, or merged; adapt it first")


_ATTRIBUTES = ("resolution", "resolution_of_rules")


def resolution_attribute(model: nnx.Module) -> str:
    """The attribute that holds the resolution: the first name that the model has no use for."""
    return next(name for name in _ATTRIBUTES if not hasattr(model, name) or isinstance(getattr(model, name), Resolution))
