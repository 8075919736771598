"""What low rank saves, and costs, on an H100, a TPU v5e and a TPU v6e that are not there, by their compilers' counts.

    python experiments/compile_tables.py

compiles a training step of 64 images in bfloat16 for every model, method and machine, and writes
experiments/results/compile_tables.json after each. A run that was cut off goes on where it was; delete the file to start over.
Needs the extra [compile].
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from lbpwht_jax.compile import CompilerError, compile_model
from lbpwht_jax.runs.folder import write_json

RESULTS = Path(__file__).parent / "results"
MODELS = (
    "vit_base_patch16_224",
    "efficientformer_l1",
    "efficientformer_l7",
    "swinv2_small_window8_256",
    "efficientformerv2_s0",
)
METHODS = ("full", "lp_l1-2", "lp_l1-4")
TARGETS = ("h100", "v5e:1x1", "v6e:1x1")
KEY = ("model", "method", "train", "target")


def compile_cases(cases: Iterable[dict[str, Any]], file: Path, console: Console) -> list[dict[str, Any]]:
    """Rows of all cases, those that the file has already not compiled again; the file is written after each.

    Args:
      cases: arguments of ``compile_model``, with ``method`` instead of ``methods``.
      file: of the rows. One of a step that does not compile says why under ``error``.
    """
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    known = {tuple(row[name] for name in KEY) for row in rows}
    for case in cases:
        key = tuple(case[name] for name in KEY)
        if key in known:
            continue
        method = case["method"]
        try:
            row = compile_model(**{name: value for name, value in case.items() if name != "method"}, methods=(method,))[0]
            rows.append({**dataclasses.asdict(row), **case})
        except CompilerError as error:
            rows.append({**case, "error": str(error)})
        console.print(" ".join(map(str, key)), rows[-1].get("error", "compiled"), highlight=False, markup=False)
        write_json(file, {"jax": jax.__version__, "counts": "by the compilers, no clock's", "rows": rows})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Each method beside full backpropagation of the same model on the same machine."""
    made = Table(title="By the compilers' counts, which are no clock's", title_justify="left")
    for heading in ("model", "target", "method"):
        made.add_column(heading)
    for heading in ("temporaries MiB", "of full", "moved GB", "of full", "roofline ms", "of full", "attention"):
        made.add_column(heading, justify="right")
    full = {(row["model"], row["target"]): row for row in rows if row["method"] == "full"}
    for row in rows:
        first, cells = full.get((row["model"], row["target"]), {}), []
        for name, unit in (("temp_bytes", 2**20), ("moved_bytes", 1e9), ("roofline_seconds", 1e-3)):
            value, whole = row.get(name), first.get(name)
            cells += ["" if value is None else f"{value / unit:,.1f}", f"{value / whole:.2f}" if value and whole else ""]
        made.add_row(row["model"], row["target"], row["method"], *cells, row.get("attention") or "failed")
    return made


def main(
    models: tuple[str, ...] = MODELS,
    methods: tuple[str, ...] = METHODS,
    targets: tuple[str, ...] = TARGETS,
    batch_size: int = 64,
    output: Path = RESULTS / "compile_tables.json",
) -> None:
    """Compiles and writes the table.

    Args:
      models: names.
      methods: the first is what the others are compared with.
      targets: machines of one chip.
      batch_size: images.
      output: JSON.
    """
    fixed = {"train": "all", "batch_size": batch_size, "dtype": "bfloat16"}
    cases = [
        {"model": model, "method": method, "target": target, **fixed}
        for model, target, method in itertools.product(models, targets, methods)
    ]
    console = Console(width=160)
    console.print(table(compile_cases(cases, output, console)))


if __name__ == "__main__":
    tyro.cli(main)
