"""A plan: which Walsh functions each layer keeps, chosen for one model under a budget; as rules, and as a JSON file."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lbpwht_jax.adaptation.rules import NOTHING, LoRA, LowRank, Rule
from lbpwht_jax.adaptation.table import text_table
from lbpwht_jax.ops.spec import Basis, Grid, LowRankSpec

Unit = Literal["flops", "bytes", "seconds"]
Train = Literal["all", "last_stage", "head"]


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """What a plan says of one layer.

    Attributes:
      path: the module's path.
      functions: the Walsh functions that its backward pass keeps; ``None`` for an exact one.
      grid: tokens along each axis; ``None`` for channels-last maps.
      prefix_tokens: leading tokens outside the grid.
      dw_kept: how much of the kernel's gradient the functions keep, as an energy in [0, 1].
      dx_kept: how much of the input's cotangent.
      share: the layer's part of what the planned layers cost together, in the budget's unit.
    """

    path: str
    functions: tuple[Basis, ...] | None
    grid: Grid | None
    prefix_tokens: int
    dw_kept: float
    dx_kept: float
    share: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which Walsh functions each layer keeps; ``print`` shows it as a table.

    Attributes:
      layers: the planned layers, in the order of the forward pass.
      block: edge of a block in tokens.
      budget: what the budget counts.
      limit: the budget, as a share of full backpropagation.
      used: what the plan comes to, as a share of full backpropagation.
      cost: what it comes to per image: FLOPs of the backward pass's products, bytes kept, or seconds of the planned layers'
        backward passes.
      loss: the loss predicted, see ``lbpwht_jax.plan``.
      gap: at most this much of the loss lies above the least possible one under the budget.
      model: name of the registry's model; empty for others.
      image_size: height and width of its images, in pixels; 0 for others.
      train: what is trained.
    """

    layers: tuple[PlannedLayer, ...]
    block: int
    budget: Unit
    limit: float
    used: float
    cost: float
    loss: float
    gap: float
    model: str = ""
    image_size: int = 0
    train: Train = "all"

    def rules(self, branches: str = NOTHING, **lora: Any) -> tuple[Rule, ...]:
        """The rules for ``adapt``.

        Args:
          branches: regular expression, searched in the paths, for layers that get a LoRA branch.
          **lora: fields of ``LoRA``, such as ``rank``.
        """
        groups: dict[Any, list[str]] = {}
        for layer in self.layers:
            branched = re.search(branches, layer.path) is not None
            if branched or layer.functions is not None:
                key = (branched, layer.functions, layer.grid, layer.prefix_tokens)
                groups.setdefault(key, []).append(re.escape(layer.path))
        rules: list[Rule] = []
        for (branched, functions, grid, prefix_tokens), paths in groups.items():
            spec = None if functions is None else LowRankSpec(functions, block=self.block)
            fields = {"pattern": f"^({'|'.join(paths)})$", "spec": spec, "grid": grid, "prefix_tokens": prefix_tokens}
            rules.append(LoRA(**fields, **lora) if branched else LowRank(**fields))
        return tuple(rules)

    def check(self, model: str, image_size: int, train: Train | None = None) -> None:
        """Checks that the plan was made for this model of the registry, image size and, if given, trained part.

        Raises:
          ValueError: if it was made for others.
        """
        made = {"model": self.model, "image size": self.image_size, "--train": self.train}
        given = {"model": model, "image size": image_size, "--train": train or self.train}
        for name, value in made.items():
            if value != given[name]:
                raise ValueError(f"the plan was made for {name} {value!r}, not {given[name]!r}; make another by lbpwht plan")

    def save(self, file: Path) -> None:
        """Writes the plan as JSON."""
        Path(file).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def __str__(self) -> str:
        rows = [
            (
                layer.path,
                "all" if layer.functions is None else str(len(layer.functions)),
                f"{layer.dw_kept:.1%}",
                f"{layer.dx_kept:.1%}",
                f"{layer.share:.1%}",
            )
            for layer in self.layers
        ]
        columns = {"layer": "<", "functions": ">", "dW kept": ">", "dx kept": ">", f"share of {self.budget}": ">"}
        return text_table(columns, rows, (f"{self.used:.4f} of full", "", "", "", "100.0%"))


def load_plan(file: Path | str) -> Plan:
    """Reads a plan that ``Plan.save`` wrote.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it holds no plan.
    """
    try:
        return plan_from(json.loads(Path(file).read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} holds no plan ({error}); lbpwht plan writes one") from None


def plan_from(values: dict[str, Any]) -> Plan:
    """The plan of the values that ``dataclasses.asdict`` gave, read from JSON."""
    layers = [PlannedLayer(**_tuples(layer)) for layer in values["layers"]]
    plan = Plan(**{**values, "layers": tuple(layers)})
    plan.rules()
    return plan


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _tuple(value) for name, value in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(each) for each in value) if isinstance(value, Sequence) and not isinstance(value, str) else value
