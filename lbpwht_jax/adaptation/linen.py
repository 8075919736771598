"""Linen models under rules, through public interfaces; the models' source and parameter names stay as they are."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import in_filter
from jax import lax

from lbpwht_jax.adaptation.branches import add_branches, check_branches, merge_branches, merge_weighted, unmerge_branches
from lbpwht_jax.adaptation.layer import Adaptation
from lbpwht_jax.adaptation.lean import is_lean, lean_call, lean_module
from lbpwht_jax.adaptation.linen_layers import DROPOUT, is_adapted, is_layer_call, joined, twin
from lbpwht_jax.adaptation.marker import BRANCHES, with_marker, without_marker
from lbpwht_jax.adaptation.replace import call_in_place
from lbpwht_jax.adaptation.resolution import Resolution, TrainableParameters
from lbpwht_jax.ops.residuals import Residuals
from lbpwht_jax.ops.spec import LowRankSpec


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """A Linen model under rules; its ``init`` and ``apply`` take the same arguments as the model's.

    The variables are the model's own. LoRA adds ``lora_a``, ``[inputs, rank]``, and ``lora_b``, ``[rank, outputs]``, beside
    the kernels, and the empty collection ``"lora_branches"``, which makes ``module.apply`` of such variables an error. Without
    it, as in ``{"params": variables["params"]}``, Flax leaves out the branches like all that a model does not ask for. Frozen
    parameters get zero gradients, and no computation is spent on them.

    Attributes:
      module: the model as it was.
      resolution: how the rules apply to the model's layers; ``print`` shows it as a table.
    """

    module: nn.Module
    resolution: Resolution

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Fresh variables as ``module.init`` makes them, together with those of the LoRA branches."""
        with nn.intercept_methods(self.intercept):
            return with_marker(self.module.init(rngs, *args, **kwargs), self.resolution.branches)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what ``module.apply`` returns; the backward pass follows the rules.

        With ``rngs={"dropout": key}`` the branches' inputs undergo the rules' dropout.

        Raises:
          TypeError: if ``variables`` has no ``"params"``.
          ValueError: if a LoRA branch is missing, or there are branches and no rule has any; if a branch's dropout gets no key,
            as in a loop such as ``nn.scan`` that does not pass the rng on.
        """
        check_branches(variables, self.resolution.branches, "apply")

        def stop(path, leaf):
            return leaf if self.trainable(joined(path)) else lax.stop_gradient(leaf)

        variables = {**variables, "params": jax.tree.map_with_path(stop, variables["params"])}
        rngs = kwargs.get("rngs")
        drops = isinstance(rngs, Mapping) and DROPOUT in rngs
        with nn.intercept_methods(functools.partial(self.intercept, drops=drops)):
            own = without_marker(variables) if self.resolution.branches else variables
            result = self.module.apply(own, *args, **kwargs)
        if BRANCHES in variables and in_filter(kwargs.get("mutable", False), BRANCHES):
            return result[0], with_marker(result[1], self.resolution.branches)
        return result

    def trainable(self, path: str) -> bool:
        """Whether the parameter at ``path``, such as ``"blocks_0/mlp/fc1/kernel"``, is trained."""
        return self.resolution.trainable(path)

    def trainable_parameters(self) -> TrainableParameters:
        """How many parameters are trained, how many there are, and the percentage; ``print`` shows it as PEFT does."""
        return self.resolution.trainable_parameters()

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

        Returns:
          Variables of this adapted model, with an empty collection ``"lora_branches"``: ``module.apply`` of them is an error.

        Raises:
          TypeError: if ``variables`` has no ``"params"``.
          ValueError: if the variables have branches already, or lack a layer's kernel.
        """
        return add_branches(key, variables, self.resolution.branches)

    def merge(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Adds LoRA's branches to the kernels: variables of ``module`` that compute the same, to rounding.

        Args:
          variables: variables of this adapted model.

        Raises:
          ValueError: if a branch is missing, or if a layer with a branch computes its kernel before it is used, as
            weight-standardised convolutions do: no stored kernel would then compute the same.
        """
        return merge_branches(variables, self.resolution.branches)

    def merge_weighted(
        self, variables: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]
    ) -> dict[str, Any]:
        """Adds the weighted changes of several adapters to the parameters: variables of ``module``.

        Args:
          variables: variables of ``module`` that all adapters started from.
          adapters: variables of this adapted model by the adapters' names, such as ``load_adapter`` returns them.
          weights: the weights by name; adapters that it does not name are left out.

        Returns:
          ``variables`` with ``w + sum(weight * (merge(adapter) - w))`` for each parameter ``w``: the branches, and all else
          that was trained.

        Raises:
          TypeError: if variables have no ``"params"``.
          ValueError: if a name is unknown, if parameters differ in shape, and as ``merge`` does.
        """
        return merge_weighted(variables, adapters, weights, self.resolution.branches)

    def unmerge(self, variables: Mapping[str, Any], branches: Mapping[str, Any]) -> dict[str, Any]:
        """Undoes ``merge``, to rounding.

        Args:
          variables: variables of ``module``, as ``merge`` returns them.
          branches: variables that hold the branches, such as those that ``merge`` was given.

        Raises:
          ValueError: if ``variables`` have branches, if ``branches`` lack one, and as ``merge`` does.
        """
        return unmerge_branches(variables, branches, self.resolution.branches)

    @functools.cached_property
    def _by_path(self) -> dict[str, Adaptation]:
        return {adaptation.layer.path: adaptation for adaptation in self.resolution.adaptations}

    @functools.cached_property
    def _lean(self) -> dict[str, Residuals]:
        return dict(self.resolution.lean)

    @staticmethod
    def _becomes_lean(context: Any) -> bool:
        module = context.module
        called = context.method_name == "__call__" and lean_module(module) is not None
        return called and not module.is_initializing() and not is_lean(module)

    def intercept(self, call: Any, args: Any, kwargs: Any, context: Any, drops: bool = False) -> Any:
        """Calls a layer as the rules say: an interceptor for ``nn.intercept_methods``, around calls of ``module``.

        ``drops`` says whether the branches' inputs undergo dropout.
        """
        path = "/".join(context.module.path)
        if path in self._lean and self._becomes_lean(context):
            return lean_call(context.module, self._lean[path], args, kwargs)
        adaptation = self._by_path.get(path)
        if adaptation is None or not is_layer_call(context) or is_adapted(context.module, adaptation):
            return call(*args, **kwargs)
        return call_in_place(twin(context.module, adaptation, drops), args, kwargs)


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
