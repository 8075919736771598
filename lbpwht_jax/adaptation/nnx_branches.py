"""LoRA's branches of NNX models: drawn, merged into the kernels, taken out again."""

from typing import Any, TypeVar

from flax import nnx

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.branches import check_plain
from lbpwht_jax.adaptation.nnx import resolution_attribute, resolution_of
from lbpwht_jax.adaptation.nnx_layers import AdaptedNNXProduct, FrozenParam, as_rngs, branches_of, product_field

M = TypeVar("M", bound=nnx.Module)


def with_branches(model: M, rngs: Any) -> M:
    """A copy of an adapted NNX model with fresh LoRA branches, those that ``adapt(..., rngs=rngs)`` makes.

    Each layer draws its ``A``, and its dropout if the rule has some, from a key of its own; ``B`` is zero.

    Args:
      model: an NNX model as ``adapt`` returns it.
      rngs: an ``nnx.Rngs``, whose stream ``params`` gives the keys, or a key.

    Raises:
      ValueError: if the model has no LoRA branch.
    """
    copy = nnx.clone(model)
    branches = branches_of(copy)
    if not branches:
        raise ValueError("with_branches: the model has no LoRA branch; adapt it first with a LoRA rule")
    products = {product.adaptation.layer.path: product for _, product in branches}
    rngs = as_rngs(rngs)
    for adaptation in resolution_of(copy).branches:
        old = products[adaptation.layer.path]
        fresh = AdaptedNNXProduct(adaptation, old.dense, rngs, old.lora_a.dtype)
        nnx.update(old, nnx.state(fresh))
    return copy


def merge(model: M) -> M:
    """A copy of an adapted NNX model with LoRA's branches added to the kernels and removed; outputs are equal to rounding.

    Frozen parameters are ``nnx.Param`` again, so that the copy's state fits the model that was adapted. The layers keep the
    backward pass that the rules gave them.

    Args:
      model: an NNX model as ``adapt`` returns it.

    Raises:
      ValueError: if the model is not adapted, or merged already; if a layer with a branch computes its kernel before it is
        used, as ``nnx.WeightNorm`` does: no stored kernel would then compute the same.
    """
    resolution_of(model)
    copy = nnx.clone(model)
    check_plain([product.adaptation for _, product in branches_of(copy)], "merge")
    for layer, product in branches_of(copy):
        kernel = layer.kernel[...]
        change = lora.delta(product.adaptation, product.lora_a[...], product.lora_b[...])
        layer.kernel[...] = kernel + change.astype(kernel.dtype)
        setattr(layer, product_field(layer), nnx.static(product.dense))  # the attribute held data
    delattr(copy, resolution_attribute(copy))
    nodes = dict(nnx.iter_graph(copy, graph=True))
    for path, node in nodes.items():
        if isinstance(node, FrozenParam):
            setattr(nodes[path[:-1]], str(path[-1]), nnx.Param(node[...], **node.get_metadata()))
    return copy


def unmerge(model: nnx.Module, branches: M) -> M:
    """Undoes ``merge``, to rounding: a copy of ``branches`` with the kernels and other variables of ``model``.

    Args:
      model: an NNX model as ``merge`` returns it.
      branches: an adapted model that holds the branches, such as the one that ``merge`` was given.

    Raises:
      ValueError: if ``model`` has branches, if ``branches`` is not adapted, and as ``merge`` does.
    """
    resolution_of(branches)
    if branches_of(model):
        raise ValueError("unmerge: the first model has LoRA branches: it is not merged")
    copy = nnx.clone(branches)
    check_plain([product.adaptation for _, product in branches_of(copy)], "unmerge")
    nodes = dict(nnx.iter_graph(copy, graph=True))
    for path, node in nnx.iter_graph(model, graph=True):
        if isinstance(node, nnx.Variable):
            nodes[path][...] = node[...]
    for layer, product in branches_of(copy):
        kernel = layer.kernel[...]
        change = lora.delta(product.adaptation, product.lora_a[...], product.lora_b[...])
        layer.kernel[...] = kernel - change.astype(kernel.dtype)
    return copy
