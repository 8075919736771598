"""``lbpwht bench layers``: times of the backward pass of single dense layers, exact and low-rank."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro
from matplotlib.figure import Figure
from rich.table import Table

from lbpwht_jax.bench.layer import STAGES, TABLE_8, LayerRow, Limits, measure_layer
from lbpwht_jax.bench.timing import machine
from lbpwht_jax.ops.spec import LowRankSpec, lp_l1
from lbpwht_jax.runs.folder import write_json
from lbpwht_jax.screen import console, say, show
from lbpwht_jax.train import keep_freed_memory

_BATCHES, _STAGE_BATCHES = (1, 64), (1, 16)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Times the backward pass of single dense layers, exact and with LP_{L1-r}, in turn in one process.

    The layers are those of the paper's Table 8 and one of each other stage of EfficientFormer-L1. Inputs are random, and every
    result is compared with a slow reference before the clock starts. Writes layers.json and layers.png.
    """

    batch: Annotated[
        tuple[int, ...], tyro.conf.arg(help_behavior_hint="(default: 1 64 for Table 8, 1 16 for the other stages)")
    ] = ()
    """Numbers of images."""
    ranks: tuple[int, ...] = (2, 4, 6, 8)
    """Values of r of LP_{L1-r}."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of inputs and kernel."""
    rounds: int = 15
    """Number of samples of each time; the median counts."""
    only: Literal["all", "table8", "stages"] = "all"
    """The layers to time: all, Table 8's or those of the other stages."""
    authors: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also times the form of the authors' code, which takes long."""
    output: Path = Path("bench")
    """Folder for the results."""

    def prepare(self) -> Callable[[], None]:
        """Checks the arguments.

        Raises:
          ValueError: if a number is out of range.
        """
        specs = {r: lp_l1(r) for r in self.ranks}
        for name, values in (("batch", self.batch), ("rounds", (self.rounds,))):
            if any(value < 1 for value in values):
                raise ValueError(f"--{name} must be positive, got {' '.join(map(str, values))}")
        if not specs:
            raise ValueError("--ranks needs at least one rank, such as 2 4 6 8")
        return lambda: self._run(specs)

    def _run(self, specs: dict[int, LowRankSpec]) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        kept = keep_freed_memory()
        limits = Limits.measured(jnp.dtype(self.dtype))
        cases = [(layer, self.batch or _BATCHES) for layer in TABLE_8] * (self.only != "stages")
        cases += [(layer, self.batch or _STAGE_BATCHES) for layer in STAGES] * (self.only != "table8")
        rows: list[LayerRow] = []
        shown = console()
        for layer, batches in cases:
            for batch in batches:
                new = measure_layer(layer, batch, specs, self.dtype, self.rounds, limits, self.authors)
                rows += new
                for row in new:
                    say(shown, _line(row))
        facts = {"machine": machine(), "dtype": self.dtype, "rounds": self.rounds, "keeps_freed_memory": kept}
        result = {**facts, **limits._asdict(), "rows": [dataclasses.asdict(row) for row in rows]}
        write_json(self.output / "layers.json", result)
        _plot(rows, self.output / "layers.png", f"{result['machine']['device']}, {self.dtype}")
        show(shown, _table(rows))
        say(shown, f"Written to {self.output}/layers.json and layers.png")


def _line(row: LayerRow) -> str:
    name = f"{row.inputs}->{row.outputs} {row.grid[0]}x{row.grid[1]} batch {row.batch} r={row.r}"
    return f"{name}: {row.dense_seconds * 1e3:.2f} -> {row.seconds * 1e3:.2f} ms, {row.speedup:.2f}x"


def _table(rows: list[LayerRow]) -> Table:
    table = Table(title="Backward pass of a dense layer; times in ms", title_justify="left")
    headings = (
        "layer",
        "grid",
        "batch",
        "r",
        "exact",
        "low-rank",
        "speed-up",
        "FLOP ratio",
        "of it",
        "floor",
        "over floor",
    )
    for heading in (*headings, "predicted", *["authors' form"] * any(row.authors_seconds is not None for row in rows)):
        table.add_column(heading, justify="right")
    for row in rows:
        authors = [] if row.authors_seconds is None else [f"{row.authors_seconds * 1e3:.1f}"]
        numbers = (f"{row.dense_seconds * 1e3:.2f}", f"{row.seconds * 1e3:.2f}", f"{row.speedup:.2f}", f"{row.flop_ratio:.1f}")
        limits = (
            f"{row.efficiency:.0%}",
            f"{row.floor_seconds * 1e3:.2f}",
            f"{row.over_floor:.1f}",
            f"{row.predicted:.2f}",
            *authors,
        )
        grid = "x".join(map(str, row.grid))
        table.add_row(f"{row.inputs}->{row.outputs}", grid, str(row.batch), str(row.r), *numbers, *limits)
    return table


def _plot(rows: list[LayerRow], file: Path, title: str) -> None:
    """Plots speed-up against FLOP ratio, one mark per row; on the diagonal, FLOPs run at the rate of the exact pass."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    layers = list(dict.fromkeys((row.inputs, row.outputs, row.grid) for row in rows))
    markers = dict(zip(sorted({row.batch for row in rows}), itertools.cycle("os^vD*"), strict=False))
    for (n, layer), (batch, marker) in itertools.product(enumerate(layers), markers.items()):
        chosen = [row for row in rows if (row.inputs, row.outputs, row.grid) == layer and row.batch == batch]
        if chosen:
            label = f"{layer[0]}->{layer[1]}, {layer[2][0]}x{layer[2][1]}, batch {batch}"
            style = {"color": f"C{n}", "marker": marker, "markersize": 4, "linewidth": 0.8}
            axes.plot([row.flop_ratio for row in chosen], [row.speedup for row in chosen], label=label, **style)
    ends = [min(row.flop_ratio for row in rows), max(row.flop_ratio for row in rows)]
    axes.plot(ends, ends, color="grey", linestyle="--", linewidth=0.8, label="as many FLOP/s as exact")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP ratio, exact over low-rank", ylabel="speed-up", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
    figure.savefig(file, dpi=120)
