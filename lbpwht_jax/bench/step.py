"""``lbpwht bench step``: times of whole training steps, with full backpropagation and with other methods."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lbpwht_jax.adaptation.presets import Train
from lbpwht_jax.bench.program import measured_model, step_program
from lbpwht_jax.bench.timing import interleaved, keep_freed_memory, machine
from lbpwht_jax.cost.backward import backward_flops
from lbpwht_jax.data import Batch
from lbpwht_jax.runs.folder import write_json
from lbpwht_jax.train import Placement, initial_state

_MODELS = ("efficientformer_l1", "vit_small_patch16_224", "swinv2_tiny_window8_256")
_METHODS = ("full", "lp_l1-2", "lp_l1-4", "lp_l1-6", "lp_l1-8", "lora_all-8", "full+remat")
_CLASSES = 100
# The forward pass is exact: losses before the first step differ by rounding alone.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
      model: the model's name.
      method: the method's short name, with "+remat" if each block is computed again in the backward pass.
      train: what is trained.
      batch: images per step.
      seconds: time of a step: forward pass, backward pass and optimiser.
      images_per_second: images trained on per second.
      speedup: the first method's ``seconds`` over this one's.
      backward_flops: FLOPs of the backward pass's matrix products, per image.
      saved_bytes: bytes kept for the backward pass, per image.
      peak_bytes: most device memory that the compiler plans to use; ``None`` if the backend does not report it.
    """

    model: str
    method: str
    train: str
    batch: int
    seconds: float
    images_per_second: float
    speedup: float
    backward_flops: int
    saved_bytes: int
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Step:
    """Times whole jitted training steps (forward, backward, clipping, AdamW), methods in turn in one process.

    Images are random and batch normalisation uses its running statistics. Every method's first loss is compared with the first
    method's before the clock starts. Writes step.json and step.png.
    """

    models: tuple[str, ...] = _MODELS
    """Names of the models; "lbpwht models" lists them."""
    methods: tuple[str, ...] = _METHODS
    """Short names, as for "lbpwht finetune"; "+remat" computes each block again in the backward pass. The others are compared
    with the first."""
    train: Train = "all"
    """What is trained: all; last_stage, with the head; or head, with LoRA's branches."""
    batch_size: int = 16
    """Images per step."""
    dtype: DType = "float32"
    """The dtype of the computation; parameters and the optimiser's state are float32."""
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
                self._model(model, method)
        return self._run

    def _model(self, model: str, method: str) -> Any:
        return measured_model(model, method, self.train, _CLASSES, self.dtype)

    def _run(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        kept = keep_freed_memory()
        console = Console(width=None if sys.stdout.isatty() else 140)
        rows = [row for model in self.models for row in self._measure(model, console)]
        result = {"machine": machine(), "dtype": self.dtype, "rounds": self.rounds, "keeps_freed_memory": kept}
        write_json(self.output / "step.json", {**result, "rows": [dataclasses.asdict(row) for row in rows]})
        _plot(rows, self.output / "step.png", f"{result['machine']['device']}, {self.dtype}, {self.train}")
        console.print(_table(rows))
        console.print(f"Written to {self.output}/step.json and step.png", soft_wrap=True)

    def _measure(self, name: str, console: Console) -> list[Row]:
        placement = Placement(devices=jax.devices()[:1])
        models = {method: self._model(name, method) for method in self.methods}
        programs = {method: step_program(name, model, self.batch_size, _CLASSES, placement) for method, model in models.items()}
        shape = programs[self.methods[0]].image_shape
        variables = jax.jit(models[self.methods[0]].module.init)(jax.random.key(0), jnp.zeros((1, *shape)))
        batch = _batch(self.batch_size, shape)
        functions, peaks, losses, saved, flops = {}, {}, {}, {}, {}
        for method, program in programs.items():
            model = program.model
            own = model.with_branches(jax.random.key(1), variables)
            saved[method], flops[method] = residual_bytes(model, own, shape), backward_flops(model, own, shape)
            held = [initial_state(own, program.optimizer, model.trainable)]
            compiled = program.step.lower(held[0], batch).compile()
            memory = compiled.memory_analysis()
            peaks[method] = getattr(memory, "peak_memory_in_bytes", 0) if jax.default_backend() != "cpu" else 0

            def run(held: list = held, compiled: Any = compiled) -> Any:
                held[0], metrics = compiled(held[0], batch)
                return metrics

            functions[method], losses[method] = run, float(run().loss)
            console.print(f"{name} {method}: compiled, first loss {losses[method]:.4f}", highlight=False)
        first = losses[self.methods[0]]
        for method, loss in losses.items():
            if not abs(loss - first) <= _TOLERANCE[self.dtype] * abs(first):
                raise ValueError(
                    f"{name}: the first loss of {method} is {loss}, of {self.methods[0]} {first}; nothing was timed"
                )
        seconds = interleaved(functions, self.rounds)
        return [
            Row(
                name,
                method,
                self.train,
                self.batch_size,
                seconds[method],
                self.batch_size / seconds[method],
                seconds[self.methods[0]] / seconds[method],
                flops[method],
                saved[method],
                peaks[method] or None,
            )
            for method in self.methods
        ]


def _batch(size: int, shape: tuple[int, int, int]) -> Batch:
    rng = np.random.default_rng(0)
    images: Any = jnp.asarray(rng.integers(0, 256, (size, *shape), dtype=np.uint8))
    labels: Any = jnp.asarray(rng.integers(0, _CLASSES, size).astype(np.int32))
    valid: Any = jnp.ones(size, bool)
    aspect: Any = jnp.ones(size, jnp.float32)
    return Batch(images, labels, valid, aspect)


def _table(rows: list[Row]) -> Table:
    table = Table(title="A training step")
    table.add_column("model")
    table.add_column("method")
    for heading in ("ms", "images/s", "speed-up", "backward MFLOPs/image", "saved MB/image", "peak GB"):
        table.add_column(heading, justify="right")
    for row in rows:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        counts = (f"{row.backward_flops / 1e6:.0f}", f"{row.saved_bytes / 1e6:.1f}", peak)
        times = (f"{row.seconds * 1e3:.0f}", f"{row.images_per_second:.1f}", f"{row.speedup:.2f}")
        table.add_row(row.model, row.method, *times, *counts)
    return table


def _plot(rows: list[Row], file: Path, title: str) -> None:
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
