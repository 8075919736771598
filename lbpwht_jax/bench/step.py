"""``lbpwht bench step``: times of whole training steps, with full backpropagation and with other methods."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lbpwht_jax.adaptation import Train
from lbpwht_jax.bench.model_steps import DType, ModelSteps, StepRow
from lbpwht_jax.bench.timing import machine
from lbpwht_jax.ops.residuals import ResidualsName
from lbpwht_jax.runs.folder import write_json
from lbpwht_jax.screen import console, say, show
from lbpwht_jax.train import keep_freed_memory

_MODELS = ("efficientformer_l1", "vit_small_patch16_224", "swinv2_tiny_window8_256")
_METHODS = ("full", "lp_l1-2", "lp_l1-4", "lp_l1-6", "lp_l1-8", "lora_all-8", "full+remat")


@dataclasses.dataclass(frozen=True)
class Step:
    """Times whole jitted training steps (forward, backward, clipping, AdamW), methods in turn in one process.

    Images are random and batch normalisation uses its running statistics. Every method's first loss is compared with the first
    method's before the clock starts. Writes step.json and step.png.
    """

    models: tuple[str, ...] = _MODELS
    """Names of the models; "lbpwht models" lists them."""
    methods: tuple[str, ...] = _METHODS
    """Short names, as for "lbpwht finetune"; "+remat" at the end computes each block again in the backward pass, "+scan" runs
    equal blocks as a loop, and "+lean" or the like says what is kept for that method. All are compared with the first."""
    train: Annotated[
        Train | None,
        tyro.conf.arg(
            metavar="{all,last_stage,head}", help_behavior_hint="(default: head for lora-R and lora_all-R, else all)"
        ),
    ] = None
    """What is trained: all; last_stage, with the head; or head, with LoRA's branches."""
    batch_size: int = 16
    """Images per step."""
    dtype: DType = "float32"
    """The dtype of the computation; parameters and the optimiser's state are float32."""
    when: Literal["always", "faster"] = "faster"
    """Which of a method's layers are low-rank: faster (those that it is predicted to speed up) or always (all of them)."""
    residuals: ResidualsName = "plain"
    """What is kept for the backward pass: plain (what JAX keeps of itself), exact (less, without rounding), lean (8 bits) or
    tiny (2 to 8 bits)."""
    rounds: int = 7
    """Number of samples of each time; the median counts."""
    output: Path = Path("bench")
    """Folder for the results."""

    def prepare(self) -> Callable[[], None]:
        """Checks the arguments.

        Raises:
          ValueError: if a number is out of range, or a model or method is unknown.
        """
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if not (self.models and self.methods):
            raise ValueError("--models and --methods need at least one each")
        for model in self.models:
            for method in self.methods:
                self._steps(model).adapted(method)
        return self._run

    def _steps(self, model: str) -> ModelSteps:
        return ModelSteps(model, self.train, self.batch_size, self.dtype, self.when, self.residuals)

    def _run(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        kept = keep_freed_memory()
        shown = console()
        rows = [row for model in self.models for row in self._measure(self._steps(model), shown)]
        result = {
            "machine": machine(),
            "dtype": self.dtype,
            "when": self.when,
            "residuals": self.residuals,
            "rounds": self.rounds,
            "keeps_freed_memory": kept,
        }
        write_json(self.output / "step.json", {**result, "rows": [dataclasses.asdict(row) for row in rows]})
        _plot(rows, self.output / "step.png", f"{result['machine']['device']}, {self.dtype}, {_trained(rows)}")
        show(shown, _table(rows))
        say(shown, f"Written to {self.output}/step.json and step.png")

    def _measure(self, steps: ModelSteps, shown: Console) -> list[StepRow]:
        prepared = {}
        for method in self.methods:
            prepared[method] = steps.prepare(method)
            loss = prepared[method].loss
            say(shown, f"{steps.model} {method}: compiled, first loss {loss:.4f}; layers: {steps.counts(method)}")
        return steps.rows(prepared, self.rounds)


def _trained(rows: list[StepRow]) -> str:
    """What is trained: once for all rows, or by method."""
    trained = {row.method: row.train for row in rows}
    if len({*trained.values()}) == 1:
        return rows[0].train
    return "; ".join(
        f"{train}: {', '.join(method for method in trained if trained[method] == train)}"
        for train in dict.fromkeys(trained.values())
    )


def _table(rows: list[StepRow]) -> Table:
    table = Table(title="A training step; FLOPs and bytes kept are per image", title_justify="left")
    for heading in ("model", "method", "trained"):
        table.add_column(heading)
    for heading in ("ms", "images/s", "speed-up", "backward MFLOPs", "MB kept", "peak GB"):
        table.add_column(heading, justify="right")
    for row in rows:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        counts = (f"{row.backward_flops / 1e6:.0f}", f"{row.saved_bytes / 1e6:.1f}", peak)
        times = (f"{row.seconds * 1e3:.0f}", f"{row.images_per_second:.1f}", f"{row.speedup:.2f}")
        table.add_row(row.model, row.method, row.train, *times, *counts)
    return table


def _plot(rows: list[StepRow], file: Path, title: str) -> None:
    """Plots the speed-up of every method, models side by side."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    models = list(dict.fromkeys(row.model for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    width = 0.8 / len(models)
    for n, model in enumerate(models):
        heights = [row.speedup for row in rows if row.model == model]
        bars = axes.bar(np.arange(len(methods)) + n * width, heights, width, label=model)
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(np.arange(len(methods)) + 0.4 - width / 2, methods, rotation=20)
    axes.set(ylabel=f"speed-up over {methods[0]}", title=title)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=120)
