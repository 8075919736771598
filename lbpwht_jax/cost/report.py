"""What training a model by a method costs per image, read off the model's own layers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from flax.traverse_util import flatten_dict

from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.presets import Train, adapted_model, layer_counts
from lbpwht_jax.cost.backward import abstract_variables, residual_bytes
from lbpwht_jax.cost.layers import matmul_flops, saved_bytes
from lbpwht_jax.cost.paper import paper_flops
from lbpwht_jax.cost.trace import Product, Record, layer_records
from lbpwht_jax.models import model_info
from lbpwht_jax.ops.residuals import ResidualsName

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one module costs per image: its products, or its element-wise work of one kind.

    Attributes:
      path: the module's path.
      kind: that of its records, such as ``"dense"``, ``"attention"`` or ``"gelu"``; ``"other"`` for further parameters.
      method: ``"full"``, ``"low-rank"``, ``"LoRA"``, ``"low-rank + LoRA"`` or ``"frozen"`` for layers; else empty.
      backward_flops_paper: FLOPs as the authors count.
      backward_flops_matmul: FLOPs of products and Walsh transforms, as computed here.
      saved_activation_bytes: for layers, what the gradients of kernel and branch need: inputs or their coefficients, in
        float32 or in codes. Attention and element-wise work keep more, which the whole model's bytes include.
      trainable_parameters: numbers trained in the module itself.
    """

    path: str
    kind: str
    method: str = ""
    backward_flops_paper: int = 0
    backward_flops_matmul: int = 0
    saved_activation_bytes: int = 0
    trainable_parameters: int = 0


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """What training a model by a method costs.

    Attributes:
      model: its name.
      method, train, when, num_classes, image_size: what was asked for.
      backward_flops_paper: per image, as the authors count (``lbpwht_jax.cost.paper``).
      backward_flops_matmul: per image, products and Walsh transforms as computed here.
      saved_activation_bytes: per image, in float32: all residuals of ``jax.vjp`` that grow with the batch.
      gradient_bytes: bytes of the trained parameters' gradients, in float32, whatever the batch.
      trainable_parameters: numbers trained.
      speedup_vs_full_paper: the authors' count for exact backpropagation, of the last stage if that is trained and else of
        the whole model, over this one's.
      low_rank_layers, exact_by_choice, exact_for_speed, frozen: how many of the layers that low rank adapts by default are
        backpropagated how, as in ``lbpwht_jax.adaptation.LayerCounts``.
      layers: the same by module, in the order of the forward pass.
    """

    model: str
    method: str
    train: Train
    when: Literal["always", "faster"]
    num_classes: int
    image_size: int
    backward_flops_paper: int
    backward_flops_matmul: int
    saved_activation_bytes: int
    gradient_bytes: int
    trainable_parameters: int
    speedup_vs_full_paper: float
    low_rank_layers: int
    exact_by_choice: int
    exact_for_speed: int
    frozen: int
    layers: tuple[LayerCost, ...]


def model_cost(
    model: str,
    method: str = "full",
    train: Train = "all",
    num_classes: int = 1000,
    image_size: int | None = None,
    when: Literal["always", "faster"] = "always",
    residuals: ResidualsName = "plain",
) -> ModelCost:
    """Counts what training costs from shapes alone: nothing is computed or allocated.

    The layers adapted are the family's default choice; batch normalisation is on its running statistics.

    Args:
      model: its name.
      method: ``"full"``, ``"lp_l1-R"``, ``"lp_linf-R"``, ``"lora-R"``, ``"lora_all-R"``, or a sum, as for ``adapted_model``.
      train: ``"all"``, ``"last_stage"`` or ``"head"``, as for ``adapted_model``.
      num_classes: outputs of the head.
      image_size: height and width of the images, in pixels; by default the model's.
      when: ``"always"`` makes every layer that the method names low-rank, as the paper does; ``"faster"`` those that low rank
        is predicted to speed up, which is the commands' default.
      residuals: what is kept for the backward pass, as in ``create_model``. FLOPs do not tell what is computed again for it.

    Raises:
      ValueError: if a name is unknown, or the image size does not suit the model.
    """
    adapted = adapted_model(model, method, train, num_classes, image_size, when, residuals=residuals)
    shape = (adapted.module.image_size, adapted.module.image_size, model_info(model).images.channels)
    variables = abstract_variables(adapted, shape)
    layers = layer_costs(adapted, variables, shape)
    paper = sum(layer.backward_flops_paper for layer in layers)
    baseline = adapted_model(model, "full", "last_stage" if train == "last_stage" else "all", num_classes, image_size)
    records = layer_records(baseline, abstract_variables(baseline, shape), shape, baseline.trainable)
    full = sum(paper_flops(record) for record in records)
    parameters = sum(layer.trainable_parameters for layer in layers)
    counts = layer_counts(model_info(model), adapted)
    return ModelCost(
        model=model,
        method=method,
        train=train,
        when=when,
        num_classes=num_classes,
        image_size=shape[0],
        backward_flops_paper=paper,
        backward_flops_matmul=sum(layer.backward_flops_matmul for layer in layers),
        saved_activation_bytes=residual_bytes(adapted, variables, shape),
        gradient_bytes=_FLOAT32 * parameters,
        trainable_parameters=parameters,
        speedup_vs_full_paper=full / paper,
        low_rank_layers=counts.low_rank,
        exact_by_choice=counts.exact_by_choice,
        exact_for_speed=counts.exact_for_speed,
        frozen=counts.frozen,
        layers=layers,
    )


def layer_costs(
    adapted: AdaptedModule, variables: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> tuple[LayerCost, ...]:
    """The costs by module, in the order of the forward pass.

    Args:
      adapted: the model, as ``adapt`` returns it.
      variables: its variables, arrays or ``jax.ShapeDtypeStruct``.
      image_shape: height, width and channels.
    """
    rows: dict[tuple[str, str], LayerCost] = {}
    for record in layer_records(adapted, variables, image_shape, adapted.trainable):
        row = _record_cost(adapted, record)
        before = rows.get((row.path, row.kind))
        rows[row.path, row.kind] = row if before is None else _sum(before, row)
    kinds = dict(reversed(rows))
    params: dict[str, Any] = flatten_dict(variables["params"], sep="/")
    for path, leaf in params.items():
        if adapted.trainable(path):
            module = path.rpartition("/")[0]
            kind = kinds.get(module, "other")
            own = LayerCost(module, kind, trainable_parameters=math.prod(leaf.shape))
            rows[module, kind] = _sum(rows[module, kind], own) if (module, kind) in rows else own
    return tuple(rows.values())


def _record_cost(adapted: AdaptedModule, record: Record) -> LayerCost:
    spec = adapted.spec(record.path)
    if not isinstance(record, Product):
        return LayerCost(record.path, record.kind, backward_flops_paper=paper_flops(record))
    trained = adapted.trainable(f"{record.path}/kernel")
    parts = ["low-rank"] * (spec is not None) + ["LoRA"] * (adapted.rank(record.path) > 0)
    return LayerCost(
        record.path,
        record.kind,
        (" + ".join(parts) or ("full" if trained else "frozen")) if record.parameter else "",
        paper_flops(record, spec),
        matmul_flops(record, spec),
        saved_bytes(record, spec),
    )


def _sum(a: LayerCost, b: LayerCost) -> LayerCost:
    added = ("backward_flops_paper", "backward_flops_matmul", "saved_activation_bytes", "trainable_parameters")
    return dataclasses.replace(a, **{name: getattr(a, name) + getattr(b, name) for name in added})
