"""The command ``lbpwht cost``."""

import dataclasses
import json
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from lbpwht_jax.adaptation import Train
from lbpwht_jax.cost import ModelCost, model_cost


@dataclasses.dataclass(frozen=True)
class Cost:
    """Counts what training a model costs per image: backward FLOPs, activations kept for them, gradients and parameters.

    Nothing is computed or allocated: the counts are read off the model's layers; which of them the method adapts is the
    family's default choice. FLOPs are counted twice: "paper" as the authors of LBP-WHT did, element-wise work included;
    "matmul" for the products and Walsh transforms as this library computes them.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Name of the model; `lbpwht models` lists them."""
    method: str = "full"
    """full; lp_l1-R or lp_linf-R; lora-8 (attention layers) or lora_all-8; or a sum such as lp_l1-4+lora_all-8."""
    train: Train = "all"
    """all; last_stage, with the head; or head, with LoRA's branches."""
    num_classes: int = 1000
    """Outputs of the head."""
    image_size: int | None = None
    """Height and width of the images, in pixels; by default the model's."""
    per_layer: bool = False
    """Adds the costs of every layer."""
    json: bool = False
    """Prints JSON instead of a table."""

    def prepare(self) -> None:
        """Prints the costs; raises what ``model_cost`` raises."""
        cost = model_cost(self.model, self.method, self.train, self.num_classes, self.image_size)
        if self.json:
            fields = dataclasses.asdict(cost)
            print(json.dumps(fields if self.per_layer else {k: v for k, v in fields.items() if k != "layers"}, indent=2))
            return
        console = Console()
        if self.per_layer:
            console.print(_layers(cost))
        console.print(_summary(cost))


def _summary(cost: ModelCost) -> Table:
    title = f"{cost.model}, {cost.method}, training {cost.train}: {cost.num_classes} classes at {cost.image_size} pixels"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("backward MFLOPs per image, as the paper counts", f"{cost.backward_flops_paper / 1e6:,.2f}")
    table.add_row("  speed-up over full backpropagation", f"{cost.speedup_vs_full_paper:.2f}x")
    table.add_row("backward MFLOPs per image, products and Walsh transforms", f"{cost.backward_flops_matmul / 1e6:,.2f}")
    table.add_row("activations kept per image, MB", f"{cost.saved_activation_bytes / 1e6:,.2f}")
    table.add_row("gradients, MB", f"{cost.gradient_bytes / 1e6:,.2f}")
    table.add_row("trainable parameters", f"{cost.trainable_parameters:,}")
    return table


def _layers(cost: ModelCost) -> Table:
    table = Table(title="by layer, per image", title_justify="left")
    for title in ("path", "kind", "method"):
        table.add_column(title)
    for title in ("MFLOPs, paper", "MFLOPs, matmul", "kept, kB", "trainable"):
        table.add_column(title, justify="right")
    for layer in cost.layers:
        table.add_row(
            layer.path or "(top level)",
            layer.kind,
            layer.method,
            f"{layer.backward_flops_paper / 1e6:,.2f}",
            f"{layer.backward_flops_matmul / 1e6:,.2f}",
            f"{layer.saved_activation_bytes / 1e3:,.1f}",
            f"{layer.trainable_parameters:,}",
        )
    return table
