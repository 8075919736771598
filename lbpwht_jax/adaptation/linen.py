"""``adapt``: puts a Flax model under rules, through public interfaces; its source and parameter names stay as they are."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import flax.linen as nn
import jax
from flax import nnx, traverse_util
from jax import lax

from lbpwht_jax.adaptation import lora
from lbpwht_jax.adaptation.loops import has_loops, with_loops
from lbpwht_jax.adaptation.nnx import adapt_nnx, find_nnx_layers
from lbpwht_jax.adaptation.resolution import Adaptation, Layer, Resolution, resolve_rules
from lbpwht_jax.adaptation.rules import Rule
from lbpwht_jax.adaptation.shapes import abstract_call
from lbpwht_jax.layers.linen import LowRankDense
from lbpwht_jax.ops.pointwise import pointwise_lacks
from lbpwht_jax.ops.spec import LowRankSpec

M = TypeVar("M", bound=nnx.Module)

_DROPOUT = "dropout"
_DENSE = (nn.Dense, nn.DenseGeneral, LowRankDense)


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """A Linen model under rules; its ``init`` and ``apply`` take the same arguments as the model's.

    The variables are the model's own. LoRA adds ``lora_a``, ``[inputs, rank]``, and ``lora_b``, ``[rank, outputs]``, beside
    the kernels. Frozen parameters get zero gradients, and no computation is spent on them.

    Attributes:
      module: the model as it was.
      resolution: how the rules apply to the model's layers; ``print`` shows it as a table.
    """

    module: nn.Module
    resolution: Resolution

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Fresh variables as ``module.init`` makes them, together with those of the LoRA branches."""
        with nn.intercept_methods(self.intercept):
            return self.module.init(rngs, *args, **kwargs)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what ``module.apply`` returns; the backward pass follows the rules.

        With ``rngs={"dropout": key}`` the branches' inputs undergo the rules' dropout.

        Raises:
          ValueError: if a branch's dropout gets no key, as in a loop such as ``nn.scan`` that does not pass the rng on.
        """

        def stop(path, leaf):
            return leaf if self.trainable(_joined(path)) else lax.stop_gradient(leaf)

        variables = {**variables, "params": jax.tree.map_with_path(stop, variables["params"])}
        rngs = kwargs.get("rngs")
        drops = isinstance(rngs, Mapping) and _DROPOUT in rngs
        with nn.intercept_methods(functools.partial(self.intercept, drops=drops)):
            return self.module.apply(variables, *args, **kwargs)

    def trainable(self, path: str) -> bool:
        """Whether the parameter at ``path``, such as ``"blocks_0/mlp/fc1/kernel"``, is trained."""
        module, _, leaf = path.rpartition("/")
        return module not in self.resolution.frozen or (leaf in (lora.A, lora.B) and module in self._branches)

    def spec(self, path: str) -> LowRankSpec | None:
        """The spec the rules gave the layer at ``path``; ``None`` for an exact backward pass."""
        return self._by_path[path].spec if path in self._by_path else None

    def rank(self, path: str) -> int:
        """The rank of the LoRA branch at the layer at ``path``, 0 if it has none."""
        return self._by_path[path].rank if path in self._by_path else 0

    def with_branches(self, key: jax.Array, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Adds fresh LoRA branches to variables of ``module``; its output stays the same.

        Args:
          key: the random key; each layer draws its ``A`` from a key of its own.
          variables: variables of ``module``.
        """
        flat = _flat(variables)
        for path, adaptation in self._branches.items():
            key, own = jax.random.split(key)
            kernel = flat[_leaf(path, "kernel")]
            stack = kernel.shape[: kernel.ndim - len(adaptation.layer.kernel_shape)]
            wanted = {name: (*stack, *shape) for name, shape in lora.shapes(adaptation).items()}
            flat[_leaf(path, lora.A)] = lora.init_a(own, wanted[lora.A], kernel.dtype)
            flat[_leaf(path, lora.B)] = lora.init_b(own, wanted[lora.B], kernel.dtype)
        return {**variables, "params": traverse_util.unflatten_dict(flat, sep="/")}

    def merge(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Adds LoRA's branches to the kernels: variables of ``module`` that compute the same, to rounding.

        Args:
          variables: variables of this adapted model.
        """
        flat = _flat(variables)
        for path, adaptation in self._branches.items():
            kernel = flat[_leaf(path, "kernel")]
            change = lora.delta(adaptation, flat.pop(_leaf(path, lora.A)), flat.pop(_leaf(path, lora.B)))
            flat[_leaf(path, "kernel")] = kernel + change.astype(kernel.dtype)
        return {**variables, "params": traverse_util.unflatten_dict(flat, sep="/")}

    def unmerge(self, variables: Mapping[str, Any], branches: Mapping[str, Any]) -> dict[str, Any]:
        """Undoes ``merge``, to rounding.

        Args:
          variables: variables of ``module``, as ``merge`` returns them.
          branches: variables that hold the branches, such as those that ``merge`` was given.
        """
        flat = _flat(variables)
        source = _flat(branches)
        for path, adaptation in self._branches.items():
            kernel = flat[_leaf(path, "kernel")]
            a, b = (source[_leaf(path, name)] for name in (lora.A, lora.B))
            flat |= {_leaf(path, lora.A): a, _leaf(path, lora.B): b}
            flat[_leaf(path, "kernel")] = kernel - lora.delta(adaptation, a, b).astype(kernel.dtype)
        return {**variables, "params": traverse_util.unflatten_dict(flat, sep="/")}

    @functools.cached_property
    def _by_path(self) -> dict[str, Adaptation]:
        return {adaptation.layer.path: adaptation for adaptation in self.resolution.adaptations}

    @functools.cached_property
    def _branches(self) -> dict[str, Adaptation]:
        return {path: adaptation for path, adaptation in self._by_path.items() if adaptation.rank}

    def intercept(self, call: Any, args: Any, kwargs: Any, context: Any, drops: bool = False) -> Any:
        """Calls a layer as the rules say: an interceptor for ``nn.intercept_methods``, around calls of ``module``.

        ``drops`` says whether the branches' inputs undergo dropout.
        """
        adaptation = self._by_path.get("/".join(context.module.path))
        if adaptation is None or not _is_layer_call(context) or _is_adapted(context.module, adaptation):
            return call(*args, **kwargs)
        return _twin(context.module, adaptation, drops)(*args, **kwargs)


class LowRankModel(nn.Module):
    """A Linen model whose layers are backpropagated as resolved rules say, itself a Linen module.

    Attributes:
      module: the model as it was; its variables are this module's own, under the same names.
      resolution: the ``LowRank`` rules, resolved on its layers.
    """

    module: nn.Module
    resolution: Resolution = dataclasses.field(repr=False)

    def setup(self):
        nn.share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of ``module``."""
        with nn.intercept_methods(AdaptedModule(self.module, self.resolution).intercept):
            return self.module(*args, **kwargs)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.module.image_size

    @property
    def num_classes(self) -> int:
        """Outputs of the head."""
        return self.module.num_classes


@overload
def adapt(model: nn.Module, rules: Sequence[Rule], *args: Any, **kwargs: Any) -> AdaptedModule: ...


@overload
def adapt(model: M, rules: Sequence[Rule], *args: Any, **kwargs: Any) -> M: ...


def adapt(model: Any, rules: Sequence[Rule], *args: Any, **kwargs: Any) -> Any:
    """Puts a model under rules; the model itself stays as it is.

    Args:
      model: any Linen module whose dense layers are ``nn.Dense``, ``nn.DenseGeneral``, 1x1 ``nn.Conv`` or ``LowRankDense``;
        or an NNX module with ``nnx.Linear``, ``nnx.LinearGeneral`` and 1x1 ``nnx.Conv``.
      rules: ``LowRank``, ``LoRA`` and ``Freeze``. For each module the first rule that matches its path holds, and a module
        that no rule matches is trained with exact backpropagation. A layer under ``LowRank`` or ``LoRA`` backpropagates as
        the rule says, whatever it did before.
      *args, **kwargs: an example call of the model: arrays or ``jax.ShapeDtypeStruct``, and anything else as it is. Nothing
        is computed; the grids of maps and the shapes of LoRA's branches are read from it.

    Returns:
      For a Linen module an ``AdaptedModule``. For an NNX module a copy of its class: frozen parameters are ``FrozenParam``,
      which ``nnx.grad`` and ``nnx.Optimizer`` leave out by default, and LoRA's branches are submodules of the layers. Their
      ``A`` is drawn from key 0 at first; ``lbpwht_jax.adaptation.with_branches`` draws it from yours.

    Raises:
      TypeError: if ``model`` is not a Flax module, or one of ``rules`` is not a rule.
      ValueError: if a rule matches nothing, with the nearest paths; if a layer's grid cannot be known or does not fit; if a
        layer that a rule matches has a ``dot_general`` of its own; if a Linen model has modules made by ``nn.jit``.
    """
    resolution = resolve(model, rules, *args, **kwargs)
    if isinstance(model, nnx.Module):
        return adapt_nnx(model, resolution)
    module = model.module if isinstance(model, LowRankModel) else model
    adapted = AdaptedModule(module, resolution)
    if has_loops(module):  # rules may treat the blocks of a loop differently
        adapted = with_loops(adapted, *args, **kwargs)
    abstract_call(lambda *args, **kwargs: adapted.init(jax.random.key(0), *args, **kwargs), args, kwargs)
    return adapted


def resolve(model: Any, rules: Sequence[Rule], *args: Any, **kwargs: Any) -> Resolution:
    """How rules apply to a model's layers; arguments and errors are those of ``adapt``."""
    if isinstance(model, nnx.Module):
        return resolve_rules(*find_nnx_layers(model, args, kwargs), rules)
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt: model must be a Linen or an NNX module, got {type(model).__name__}")
    if not isinstance(model, LowRankModel):
        return resolve_rules(*find_layers(model, args, kwargs), rules)
    resolution = resolve(model.module, rules, *args, **kwargs)
    taken = {adaptation.layer.path for adaptation in resolution.adaptations}
    kept = [adaptation for adaptation in model.resolution.adaptations if adaptation.layer.path not in taken]
    return dataclasses.replace(resolution, adaptations=(*resolution.adaptations, *kept))


def find_layers(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Layer], dict[str, int]]:
    """The dense layers that a call of the model reaches, and the number of parameters of each module, by path.

    Args:
      model: a Linen module.
      args: the example call's arguments: arrays or ``jax.ShapeDtypeStruct``, and other things.
      kwargs: its keyword arguments.
    """
    layers: dict[str, Layer] = {}

    def record(call, args, kwargs, context):
        _refuse_jit(context.module)
        output = call(*args, **kwargs)
        if _is_layer_call(context):
            layer = _describe(context.module, args[0].shape)
            layers.setdefault(layer.path, layer)
        return output

    def init(*args, **kwargs):
        with nn.intercept_methods(record):
            return model.init(jax.random.key(0), *args, **kwargs)

    counts: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(abstract_call(init, args, kwargs).get("params", {})):
        module = _joined(path).rpartition("/")[0]
        counts[module] = counts.get(module, 0) + leaf.size
    return list(layers.values()), counts


def _joined(path: Any) -> str:
    return "/".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by path."""
    return traverse_util.flatten_dict(dict(variables["params"]), sep="/")


def _leaf(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _is_layer_call(context: Any) -> bool:
    module = context.module
    if context.method_name != "__call__":
        return False
    return isinstance(module, _DENSE) or (isinstance(module, nn.Conv) and _is_pointwise(module))


def _is_pointwise(module: nn.Conv) -> bool:
    dilations, groups = (module.input_dilation, module.kernel_dilation), (module.feature_group_count,)
    return not pointwise_lacks(module.kernel_size, module.strides, module.padding, dilations, groups)


def _describe(module: Any, shape: tuple[int, ...]) -> Layer:
    kernel = module.get_variable("params", "kernel")
    kernel = jax.tree.leaves(kernel)[0].shape
    path, kind = "/".join(module.path), type(module).__name__
    if isinstance(module, nn.Conv):
        spatial = len(kernel) - 2
        batch = math.prod(shape[: len(shape) - 1 - spatial])
        return Layer(path, kind, (batch, *shape[len(shape) - 1 - spatial :]), kernel, kernel[-1])
    features = len(module.features) if isinstance(module.features, Sequence) else 1
    contracted = len(kernel) - features
    inputs = (*shape[: len(shape) - contracted], math.prod(kernel[:contracted]))
    layer = Layer(path, kind, inputs, kernel, math.prod(kernel[contracted:]), contracted)
    if isinstance(module, LowRankDense):
        return dataclasses.replace(layer, grid=module.grid, prefix_tokens=module.prefix_tokens)
    return layer


def _is_adapted(module: Any, adaptation: Adaptation) -> bool:
    if isinstance(module, LowRankDense) and not adaptation.rank:
        own = (module.dot_general, module.spec, module.grid, module.prefix_tokens)
        return own == (None, adaptation.spec, adaptation.grid, adaptation.prefix_tokens)
    field = "conv_general_dilated" if isinstance(module, nn.Conv) else "dot_general"
    return isinstance(getattr(module, field), lora.AdaptedProduct)


def _refuse_jit(module: nn.Module) -> None:
    own, *bases = type(module).__mro__
    if own.__name__ == f"Jit{bases[0].__name__}":
        raise ValueError(
            f"adapt: the model has a {bases[0].__name__} made by nn.jit, whose traces hide the paths inside and are kept "
            "between models, adapted or not; leave nn.jit out and compile the whole step with jax.jit"
        )


def _twin(module: Any, adaptation: Adaptation, drops: bool) -> Any:
    """The bound module with the same parameters and another product; ``drops``: whether the branch's dropout acts."""
    field = "conv_general_dilated" if isinstance(module, nn.Conv) else "dot_general"
    if not isinstance(module, LowRankDense) and (getattr(module, field) or getattr(module, f"{field}_cls")):
        raise ValueError(f"adapt: {adaptation.layer.path} has a {field} of its own; leave it out of the rules' patterns")
    scope: Any = module.scope

    def branch() -> tuple[jax.Array, jax.Array]:
        shapes = lora.shapes(adaptation)
        a = scope.param(lora.A, lora.init_a, shapes[lora.A], module.param_dtype)
        return a, scope.param(lora.B, lora.init_b, shapes[lora.B], module.param_dtype)

    def dropped(x: jax.Array) -> jax.Array:
        if not (drops and adaptation.dropout):
            return x
        if not scope.has_rng(_DROPOUT):
            raise ValueError(
                f"adapt: the rng 'dropout' does not reach {adaptation.layer.path}, whose branch has dropout; the nn.scan or "
                "nn.vmap around it must pass it on: split_rngs={'dropout': True}"
            )
        return lora.drop(scope.make_rng(_DROPOUT), x, adaptation.dropout)

    if isinstance(module, LowRankDense) and not adaptation.rank:
        at = {"grid": adaptation.grid, "prefix_tokens": adaptation.prefix_tokens}
        return module.clone(parent=scope, dot_general=None, spec=adaptation.spec, **at)
    dense = lora.convolution(adaptation) if isinstance(module, nn.Conv) else lora.dense_product(adaptation)
    replaced: dict[str, Any] = {field: lora.AdaptedProduct(adaptation, dense, branch, dropped)}
    return module.clone(parent=scope, **replaced)
