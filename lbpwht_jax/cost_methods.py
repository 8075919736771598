"""A model under a method, for counting: which layers are low-rank, which have a LoRA branch, what is trained."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lbpwht_jax.layers import LowRankDense
from lbpwht_jax.matmul import low_rank_matmul
from lbpwht_jax.models import create_model, model_info
from lbpwht_jax.spec import LowRankSpec, lp_l1, lp_linf

Train = Literal["all", "last_stage", "head"]

_SELECTIONS = {"lp_l1": lp_l1, "lp_linf": lp_linf}
_HELP = "write full, lp_l1-R, lp_linf-R, lora-R, lora_all-R, or a sum of two such as lp_l1-4+lora_all-8"


@dataclasses.dataclass(frozen=True)
class Treatment:
    """How a layer is trained.

    Attributes:
      spec: of its backward pass; ``None`` for an exact one.
      rank: of its LoRA branch, 0 without one; kernel and bias are then frozen.
    """

    spec: LowRankSpec | None
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class TreatedModel:
    """A model of the registry with its treatments, for tracing: ``init`` and ``apply`` as the model's.

    Attributes:
      module: the model, its low-rank layers with their backward pass.
      treatments: by the paths of the layers that have one.
      scope: regular expression of the modules that are trained, searched in their paths.
    """

    module: nn.Module
    treatments: Mapping[str, Treatment]
    scope: str

    def init(self, key: jax.Array, images: jax.Array) -> dict[str, Any]:
        """The model's variables, with the branches'."""
        variables = self.module.init(key, images)
        params: dict[str, Any] = flatten_dict(variables["params"], sep="/")
        for path, treatment in self.treatments.items():
            if treatment.rank:
                inputs, outputs = params[f"{path}/kernel"].shape
                params[f"{path}/lora_a"] = jnp.zeros((inputs, treatment.rank))
                params[f"{path}/lora_b"] = jnp.zeros((treatment.rank, outputs))
        return {**variables, "params": unflatten_dict(params, sep="/")}

    def variables(self, image_shape: tuple[int, int, int]) -> Any:
        """Shapes and dtypes of the variables, for images of a height, width and number of channels."""
        return jax.eval_shape(self.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))

    def apply(self, variables: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """What the model returns; gradients reach the trained parameters alone."""
        params = flatten_dict(variables["params"], sep="/")
        params = {path: leaf if self.trainable(path) else jax.lax.stop_gradient(leaf) for path, leaf in params.items()}
        with nn.intercept_methods(self._with_branch):
            return self.module.apply({**variables, "params": unflatten_dict(params, sep="/")}, *arguments, **keywords)

    def trainable(self, path: str) -> bool:
        """Whether the parameter at ``path``, such as ``"blocks_0/mlp/fc1/kernel"``, is trained."""
        module, _, leaf = path.rpartition("/")
        if leaf in ("lora_a", "lora_b"):
            return True
        return re.search(self.scope, path) is not None and not self.rank(module)

    def rank(self, path: str) -> int:
        """Rank of the LoRA branch of the layer at ``path``, 0 without one."""
        return self.treatments[path].rank if path in self.treatments else 0

    def spec(self, path: str) -> LowRankSpec | None:
        """Of the backward pass of the layer at ``path``; ``None`` for an exact one."""
        return self.treatments[path].spec if path in self.treatments else None

    def _with_branch(self, call: Any, arguments: tuple, keywords: dict, context: Any) -> Any:
        y = call(*arguments, **keywords)
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__" or not isinstance(module, LowRankDense) or not self.rank(path):
            return y
        x, spec = arguments[0], self.spec(path)
        for name in ("lora_a", "lora_b"):
            factor = module.get_variable("params", name)
            x = x @ factor if spec is None else low_rank_matmul(x, factor, spec, module.grid, module.prefix_tokens)
        return y + x


def treated_model(
    name: str,
    method: str = "full",
    train: Train = "all",
    num_classes: int = 1000,
    image_size: int | None = None,
    layers: str | None = None,
) -> TreatedModel:
    """A model under a method, batch normalisation on its running statistics.

    Args:
      name: of the model.
      method: ``"full"``; ``"lp_l1-R"`` or ``"lp_linf-R"``; ``"lora-R"``, on the attention layers; ``"lora_all-R"``, on every
        layer of the family's default choice; or a sum of the two kinds, where the low-rank backward serves the branches too.
        Layers that make query, key and value at once have three times the rank.
      train: ``"all"``; ``"last_stage"`` and head alone, treatments included; or ``"head"``, branches and head alone.
      num_classes: outputs of the head.
      image_size: height and width of the images, in pixels; by default the model's.
      layers: regular expression of the layers the method adapts, searched in module paths; by default the family's.

    Raises:
      ValueError: if a name is unknown.
    """
    info = model_info(name)
    layers = info.layers if layers is None else layers
    scopes = {"all": "", "last_stage": info.last_stage, "head": info.head}
    if train not in scopes:
        raise ValueError(f"train must be one of {', '.join(scopes)}, got {train!r}")
    spec, branches, rank = _parse(method)
    module = create_model(name, num_classes=num_classes, image_size=image_size, frozen_batch_norm=True)
    treatments = {}
    for path in _layers(name, module.image_size):
        adapted = re.search(layers, path) and (train != "last_stage" or re.search(info.last_stage, path))
        branch = adapted and branches and (branches == "all" or re.search(info.attention, path))
        if branch:
            treatments[path] = Treatment(spec, rank * (3 if re.search(info.fused, path) else 1))
        elif adapted and spec is not None and train != "head":
            treatments[path] = Treatment(spec)
    low_rank = "|".join(f"^{re.escape(path)}$" for path, treatment in treatments.items() if treatment.spec)
    if low_rank:
        module = create_model(
            name, num_classes=num_classes, image_size=image_size, frozen_batch_norm=True, spec=spec, layers=low_rank
        )
    return TreatedModel(module, treatments, scopes[train])


@functools.lru_cache(maxsize=64)
def _layers(name: str, image_size: int) -> tuple[str, ...]:
    """Paths of the modules that have a kernel."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, model_info(name).channels), jnp.float32)
    params = jax.eval_shape(create_model(name, image_size=image_size).init, jax.random.key(0), images)["params"]
    return tuple(path.removesuffix("/kernel") for path in flatten_dict(params, sep="/") if path.endswith("/kernel"))


def _parse(method: str) -> tuple[LowRankSpec | None, Literal["", "attention", "all"], int]:
    """The spec, the layers with branches, and their rank."""
    spec, branches, rank = None, "", 0
    for part in method.split("+") if method != "full" else ():
        match = re.fullmatch(r"(lp_l1|lp_linf|lora|lora_all)-(\d+)", part)
        if match is None or (spec if match[1] in _SELECTIONS else branches):
            raise ValueError(f"unknown method {method!r}; {_HELP}")
        if match[1] in _SELECTIONS:
            spec = _SELECTIONS[match[1]](int(match[2]))
        else:
            branches, rank = ("attention" if match[1] == "lora" else "all"), int(match[2])
            if not rank:
                raise ValueError(f"method {method!r}: LoRA's rank must be at least 1")
    return spec, branches, rank
