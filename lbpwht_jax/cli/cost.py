"""The command ``lbpwht cost``."""

import dataclasses
import json
from typing import Annotated, Literal

import tyro
from rich.table import Table

from lbpwht_jax.adaptation import LayerCounts, Train, default_train
from lbpwht_jax.cli.help import flag
from lbpwht_jax.cost import ModelCost, model_cost
from lbpwht_jax.ops.residuals import ResidualsName
from lbpwht_jax.screen import console, say, show


@dataclasses.dataclass(frozen=True)
class Cost:
    """Counts what training a model costs per image: backward FLOPs, activations kept for them, gradients and parameters.

    Nothing is computed or allocated: the counts are read off the model's layers; which of them the method adapts is the
    family's default choice, and "--when always" makes all of these low-rank, as the paper does. FLOPs are counted twice:
    "paper" as the authors of LBP-WHT did, element-wise work included; "matmul" for the products and Walsh transforms as this
    library computes them.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Name of the model; "lbpwht models" lists them."""
    method: str = "full"
    """full; lp_l1-R or lp_linf-R; lora-8 (attention layers) or lora_all-8; or a sum such as lp_l1-4+lora_all-8."""
    train: Annotated[Train | None, flag("{all,last_stage,head}", "head for lora-R and lora_all-R, else all")] = None
    """all; last_stage, with the head; or head, with LoRA's branches."""
    when: Literal["always", "faster"] = "faster"
    """Which of the method's layers are low-rank: faster (those that it is predicted to speed up) or always (all of them)."""
    residuals: ResidualsName = "plain"
    """What is kept for the backward pass: plain (what JAX keeps of itself), exact (less, without rounding), lean (8 bits) or
    tiny (2 to 8 bits)."""
    num_classes: int = 1000
    """Outputs of the head."""
    image_size: Annotated[int | None, flag("INT", "the model's")] = None
    """Height and width of the images, in pixels, such as 224."""
    per_layer: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Adds the costs of every layer."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints JSON instead of a table."""

    def prepare(self) -> None:
        """Prints the costs; raises what ``model_cost`` raises."""
        train = self.train or default_train(self.method)
        cost = model_cost(self.model, self.method, train, self.num_classes, self.image_size, self.when, self.residuals)
        if self.json:
            fields = dataclasses.asdict(cost)
            print(json.dumps(fields if self.per_layer else {k: v for k, v in fields.items() if k != "layers"}, indent=2))
            return
        shown = console()
        if self.per_layer:
            show(shown, _layers(cost))
        show(shown, _summary(cost))
        counts = LayerCounts(cost.low_rank_layers, cost.exact_by_choice, cost.exact_for_speed, cost.frozen)
        say(shown, f"Layers that low rank can adapt: {counts} (--when {cost.when}).")


def _summary(cost: ModelCost) -> Table:
    title = f"{cost.model}, {cost.method}, training {cost.train}: {cost.num_classes} classes at {cost.image_size} pixels"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("backward MFLOPs per image, as the paper counts", f"{cost.backward_flops_paper / 1e6:,.2f}")
    table.add_row("  FLOPs of full backpropagation over these", f"{cost.speedup_vs_full_paper:.2f}")
    table.add_row("backward MFLOPs per image, products and Walsh transforms", f"{cost.backward_flops_matmul / 1e6:,.2f}")
    table.add_row("MB kept per image", f"{cost.saved_activation_bytes / 1e6:,.2f}")
    table.add_row("MB of gradients", f"{cost.gradient_bytes / 1e6:,.2f}")
    table.add_row("trainable parameters", f"{cost.trainable_parameters:,}")
    return table


def _layers(cost: ModelCost) -> Table:
    table = Table(title="by layer, per image", title_justify="left")
    for title in ("path", "kind", "method"):
        table.add_column(title)
    for title in ("paper MFLOPs", "matmul MFLOPs", "MB kept", "trained"):
        table.add_column(title, justify="right")
    for layer in cost.layers:
        table.add_row(
            layer.path or "(top level)",
            layer.kind,
            layer.method,
            f"{layer.backward_flops_paper / 1e6:,.2f}",
            f"{layer.backward_flops_matmul / 1e6:,.2f}",
            f"{layer.saved_activation_bytes / 1e6:,.3f}",
            f"{layer.trainable_parameters:,}",
        )
    return table
