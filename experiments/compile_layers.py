"""The layers of the paper's Table 8 on an H100 that is not there, by its compiler's count.

    python experiments/compile_layers.py

compiles the backward pass of each layer alone, 256 images in bfloat16, exact and low-rank, the projection of the input in the
forward pass counted, and writes experiments/results/compile_layers.json. Needs the extra [compile].
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from lbpwht_jax import low_rank_matmul, lp_l1
from lbpwht_jax.bench import TABLE_8, Layer
from lbpwht_jax.bench.layer import backward_pass
from lbpwht_jax.compile.lowered import compile_traced
from lbpwht_jax.compile.targets import Target, parse_target
from lbpwht_jax.ops.heuristic import choosing_for, chosen
from lbpwht_jax.ops.spec import LowRankSpec
from lbpwht_jax.runs.folder import write_json

RESULTS = Path(__file__).parent / "results"
HEADINGS = ("layer", "r", "exact, us", "low rank, us", "exact / low rank", "at most", "the choice")


def seconds(layer: Layer, spec: LowRankSpec | None, batch: int, target: Target) -> float:
    """Least time of a layer's backward pass, summed over its kernels; that of the exact one without a spec."""
    limits = target.limits
    if limits is None:
        raise ValueError(f"target {target.name!r} has no known limits; take h100")
    whole = NamedSharding(Mesh(np.array(target.open()), ("chip",)), PartitionSpec())
    tokens = math.prod(layer.grid)
    shapes = ((batch, tokens, layer.inputs), (layer.inputs, layer.outputs), (batch, tokens, layer.outputs))
    arrays = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=whole) for shape in shapes]
    product = (lambda x, kernel: x @ kernel) if spec is None else (lambda x, w: low_rank_matmul(x, w, spec, layer.grid))
    _, _, counts = compile_traced(backward_pass(product).trace(*arrays), target)
    return sum(kernel.seconds(limits.flops, limits.bandwidth) for kernel in counts.kernels)


def measure(layer: Layer, ranks: tuple[int, ...], batch: int, target: Target) -> list[dict[str, Any]]:
    """A layer at each rank.

    Returns:
      A row for each rank. ``bound`` is what a pass would gain that does nothing but read x, g and the kernel once and write
      their cotangents once; ``choice`` is what ``when="faster"`` takes on a GPU.
    """
    exact, rows = seconds(layer, None, batch, target), []
    moved = 2 * (batch * math.prod(layer.grid) * (2 * layer.inputs + layer.outputs) + 2 * layer.inputs * layer.outputs)
    for r in ranks:
        taken = seconds(layer, lp_l1(r), batch, target)
        with choosing_for("cuda"):
            spec = chosen(lp_l1(r, when="faster"), layer.grid, 0, layer.inputs, layer.outputs)
        bound = exact / (moved / target.limits.bandwidth) if target.limits else None
        choice = "exact" if (spec.dx, spec.dw) == ("exact", "exact") else "low rank"
        row = {"inputs": layer.inputs, "outputs": layer.outputs, "grid": layer.grid, "r": r, "exact_seconds": exact}
        rows.append({**row, "seconds": taken, "speedup": exact / taken, "bound": bound, "choice": choice})
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, under ``HEADINGS``."""
    layer = f"{row['inputs']} -> {row['outputs']}"
    microseconds = [f"{1e6 * row[name]:.1f}" for name in ("exact_seconds", "seconds")]
    return [layer, str(row["r"]), *microseconds, f"{row['speedup']:.2f}", f"{row['bound']:.2f}", row["choice"]]


def main(
    ranks: tuple[int, ...] = (2, 4, 6),
    batch_size: int = 256,
    layers: tuple[Layer, ...] = TABLE_8,
    output: Path = RESULTS / "compile_layers.json",
) -> None:
    """Compiles and writes the table.

    Args:
      ranks: the r of LP_{L1-r}.
      batch_size: images.
      layers: channels and grid of each.
      output: JSON.
    """
    jax.config.update("jax_platforms", "cpu")  # the compiler is asked; no device is
    target = parse_target("h100")
    target.check_installed()
    rows = [row for layer in layers for row in measure(layer, ranks, batch_size, target)]
    facts = {"jax": jax.__version__, "counts": "by the compiler, no clock's", "target": target.name}
    write_json(output, {**facts, "batch_size": batch_size, "dtype": "bfloat16", "rows": rows})
    made = Table(title="By the compiler's count, which is no clock's", title_justify="left")
    for heading in HEADINGS:
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(*cells(row))
    Console(width=120).print(made)


if __name__ == "__main__":
    tyro.cli(main)
