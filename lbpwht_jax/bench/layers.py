"""``lbpwht bench layers``: the backward pass of single dense layers, exact against low-rank."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lbpwht_jax.bench import authors_form
from lbpwht_jax.bench.timing import bandwidth, interleaved, keep_freed_memory, machine, peak_flops
from lbpwht_jax.ops.basis import projection_matrices
from lbpwht_jax.ops.flops import product_flops
from lbpwht_jax.ops.heuristic import predicted_speedup
from lbpwht_jax.ops.matmul import low_rank_matmul
from lbpwht_jax.ops.spec import LowRankSpec, lp_l1
from lbpwht_jax.runs.folder import write_json

# Input and output channels and grid: the layers of the paper's Table 8, then one of each other stage of EfficientFormer-L1.
TABLE_8 = ((448, 1792, (7, 7)), (1792, 448, (7, 7)), (768, 3072, (7, 7)), (3072, 768, (7, 7)))
STAGES = ((48, 192, (56, 56)), (96, 384, (28, 28)), (224, 896, (14, 14)))
_BATCHES, _STAGE_BATCHES = (1, 64), (1, 16)
# Largest difference from the reference, over the largest value: rounding of sums of up to 50,000 products.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer at one rank.

    Attributes:
      inputs: input channels.
      outputs: output channels.
      grid: height and width.
      batch: images.
      r: the rank, as in LP_{L1-r}.
      dense_seconds: time of the exact backward pass, two products.
      seconds: time of the low-rank backward pass, with the input's projection in the forward pass.
      speedup: ``dense_seconds`` over ``seconds``.
      flop_ratio: FLOPs of the exact products over those of the low-rank ones, transforms included.
      efficiency: speed-up over FLOP ratio.
      floor_seconds: the least the low-rank one can take: its FLOPs at the measured peak or the bytes of inputs and outputs,
        each once, at the measured bandwidth, whichever is more.
      over_floor: ``seconds`` over ``floor_seconds``.
      authors_seconds: time of the authors' form, where asked for.
      predicted: the speed-up that the automatic choice (``lbpwht_jax.ops.heuristic``) goes by.
      error: largest difference of a cotangent from the reference, over its largest value.
    """

    inputs: int
    outputs: int
    grid: tuple[int, int]
    batch: int
    r: int
    dense_seconds: float
    seconds: float
    speedup: float
    flop_ratio: float
    efficiency: float
    floor_seconds: float
    over_floor: float
    authors_seconds: float | None
    predicted: float
    error: float


@dataclasses.dataclass(frozen=True)
class Layers:
    """Times the backward pass of single dense layers, exact and with LP_{L1-r}, in turn in one process.

    The layers are those of the paper's Table 8 and one of each other stage of EfficientFormer-L1. Inputs are random, and every
    result is compared with a slow reference before the clock starts. Writes layers.json and layers.png.
    """

    batch: tuple[int, ...] = ()
    """Images; by default 1 and 64 for Table 8 and 1 and 16 for the maps."""
    ranks: tuple[int, ...] = (2, 4, 6, 8)
    """r of LP_{L1-r}."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of inputs and kernel."""
    rounds: int = 15
    """Samples of each time; the median counts."""
    only: Literal["all", "table8", "stages"] = "all"
    """Which layers."""
    authors: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also times the form of the authors' code, which is slow."""
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
        limits = {"peak_flops": peak_flops(jnp.dtype(self.dtype)), "bandwidth": bandwidth()}
        cases = [(layer, self.batch or _BATCHES) for layer in TABLE_8] * (self.only != "stages")
        cases += [(layer, self.batch or _STAGE_BATCHES) for layer in STAGES] * (self.only != "table8")
        rows: list[Row] = []
        console = Console(width=None if sys.stdout.isatty() else 140)
        for layer, batches in cases:
            for batch in batches:
                new = self._measure(*layer, batch, specs, limits)
                rows += new
                for row in new:
                    console.print(_line(row), highlight=False)
        result = {"machine": machine(), "dtype": self.dtype, "rounds": self.rounds, "keeps_freed_memory": kept, **limits}
        write_json(self.output / "layers.json", {**result, "rows": [dataclasses.asdict(row) for row in rows]})
        _plot(rows, self.output / "layers.png", f"{result['machine']['device']}, {self.dtype}")
        console.print(_table(rows))
        console.print(f"Written to {self.output}/layers.json and layers.png", soft_wrap=True)

    def _measure(
        self,
        inputs: int,
        outputs: int,
        grid: tuple[int, int],
        batch: int,
        specs: dict[int, LowRankSpec],
        limits: dict[str, float],
    ) -> list[Row]:
        keys = jax.random.split(jax.random.key(batch * inputs), 3)
        tokens = math.prod(grid)
        shapes = ((batch, tokens, inputs), (inputs, outputs), (batch, tokens, outputs))
        x, kernel, g = (jax.random.normal(key, shape, self.dtype) for key, shape in zip(keys, shapes, strict=True))
        passes = {0: _backward(lambda x, kernel: x @ kernel)}
        for r, spec in specs.items():
            passes[r] = _backward(lambda x, kernel, spec=spec: low_rank_matmul(x, kernel, spec, grid))
        errors = {r: _error(passes[r](x, kernel, g), _reference(x, kernel, g, spec, grid)) for r, spec in specs.items()}
        for r, error in errors.items():
            if not error < _TOLERANCE[self.dtype]:
                raise ValueError(f"{inputs}->{outputs} on {grid}, r={r}: off the reference by {error:.1e}; nothing was timed")
        seconds = interleaved({str(r): (lambda f=f: f(x, kernel, g)) for r, f in passes.items()}, self.rounds)
        slow = {}
        if self.authors:
            forms = {
                r: jax.jit(lambda x, kernel, g, spec=spec: authors_form.backward(x, kernel, g, spec, grid))
                for r, spec in specs.items()
            }
            slow = interleaved({str(r): (lambda f=f: f(x, kernel, g)) for r, f in forms.items()}, min(self.rounds, 3))
        flops = {r: product_flops(f, x, kernel, g) for r, f in passes.items()}
        moved = sum(array.nbytes for array in (x, kernel, g, x, kernel))
        rows = []
        for r in specs:
            floor = max(flops[r] / limits["peak_flops"], moved / limits["bandwidth"])
            speedup, ratio = seconds["0"] / seconds[str(r)], flops[0] / flops[r]
            times = (seconds["0"], seconds[str(r)], speedup, ratio, speedup / ratio, floor, seconds[str(r)] / floor)
            rows.append(
                Row(
                    inputs,
                    outputs,
                    grid,
                    batch,
                    r,
                    *times,
                    slow.get(str(r)),
                    predicted_speedup(specs[r], grid, 0, inputs, outputs),
                    errors[r],
                )
            )
        return rows


def _backward(product: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The compiled cotangents of input and kernel; the forward product is not used and so not computed."""
    return jax.jit(lambda x, kernel, g: jax.vjp(product, x, kernel)[1](g))


def _reference(x: Any, kernel: Any, g: Any, spec: LowRankSpec, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cotangents in float64 by the written-out matrices: dx of the first image, dW of all."""
    analysis, synthesis = projection_matrices(spec, grid)
    dw = np.zeros(kernel.shape)
    for one_x, one_g in zip(x, g, strict=True):
        dw += (analysis @ np.asarray(one_x, np.float64)).T @ (analysis @ np.asarray(one_g, np.float64))
    return synthesis @ (analysis @ np.asarray(g[0], np.float64)) @ np.asarray(kernel, np.float64).T, dw


def _error(cotangents: tuple[jax.Array, jax.Array], reference: tuple[np.ndarray, np.ndarray]) -> float:
    pairs = zip((cotangents[0][0], cotangents[1]), reference, strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - e).max() / np.abs(e).max()) for a, e in pairs)


def _line(row: Row) -> str:
    name = f"{row.inputs}->{row.outputs} {row.grid[0]}x{row.grid[1]} batch {row.batch} r={row.r}"
    return f"{name}: {row.dense_seconds * 1e3:.2f} -> {row.seconds * 1e3:.2f} ms, {row.speedup:.2f}x"


def _table(rows: list[Row]) -> Table:
    table = Table(title="Backward pass of a dense layer")
    headings = (
        "layer",
        "grid",
        "batch",
        "r",
        "exact ms",
        "low-rank ms",
        "speed-up",
        "FLOP ratio",
        "of it",
        "floor ms",
        "over floor",
    )
    for heading in (*headings, "predicted", "authors' form ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        authors = "" if row.authors_seconds is None else f"{row.authors_seconds * 1e3:.1f}"
        numbers = (f"{row.dense_seconds * 1e3:.2f}", f"{row.seconds * 1e3:.2f}", f"{row.speedup:.2f}", f"{row.flop_ratio:.1f}")
        limits = (
            f"{row.efficiency:.0%}",
            f"{row.floor_seconds * 1e3:.2f}",
            f"{row.over_floor:.1f}",
            f"{row.predicted:.2f}",
            authors,
        )
        grid = "x".join(map(str, row.grid))
        table.add_row(f"{row.inputs}->{row.outputs}", grid, str(row.batch), str(row.r), *numbers, *limits)
    return table


def _plot(rows: list[Row], file: Path, title: str) -> None:
    """Draws speed-up over FLOP ratio, a mark per row, with the diagonal that spending FLOPs at an equal rate would give."""
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
