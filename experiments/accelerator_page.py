"""Writes docs/accelerators.md from the JSON files of ``experiments/accelerator.py``.

python experiments/accelerator_page.py          writes it
python experiments/accelerator_page.py --check  fails if the page is not what was measured
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from accelerator_results import read
from transfer_report import markdown, prose

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "experiments" / "results", ROOT / "docs" / "accelerators.md"
Rows = Sequence[Mapping[str, Any]]
HEAD = """
    What `python experiments/accelerator.py` measured, device by device. `python experiments/accelerator_page.py` makes this
    page from the JSON files `experiments/results/accelerator_*.json`. Computations are in bfloat16, parameters and the
    optimiser's state in float32. Every method is timed in turn with full backpropagation in one process; times are medians.
    Where a row was not measured, the page says so.
"""
NOTHING = "No accelerator has been timed yet."
_COMMAND = "```sh\npython experiments/accelerator.py\n```"
_SHORT = 60
_SHOWN = 4


def _some(names: Sequence[str]) -> str:
    shown = "; ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}; and {len(names) - _SHOWN} more"


def _number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


def numerics(rows: Rows) -> str:
    """The largest difference of each way to compute, beside its bound."""
    table = []
    for numbers in dict.fromkeys(row["numbers"] for row in rows):
        these = [row for row in rows if row["numbers"] == numbers]
        worst = max(these, key=lambda row: max(row["errors"].values()))
        within = sum(row["within"] for row in these)
        error, bound = max(worst["errors"].values()), worst["bound"]
        where = f"{worst['subject']}, {worst['case']}"
        table.append([numbers, f"{within} of {len(these)}", f"{error:.1e}", where, f"{bound:.0e}"])
    text = "Value and cotangents of the operation and the layers against float64. Differences are over the largest value."
    return f"{text}\n\n{markdown(['numbers', 'within the bound', 'largest difference', 'of', 'bound'], table)}"


def layers(rows: Rows) -> str:
    """Times of layers."""
    table = [
        [
            f"{row['inputs']}->{row['outputs']}",
            "x".join(map(str, row["grid"])),
            str(row["r"]),
            _number(row["dense_seconds"], 1e-3, 3),
            _number(row["seconds"], 1e-3, 3),
            f"{row['speedup']:.2f}",
            f"{row['predicted']:.2f}",
            f"{row['flop_ratio']:.1f}",
            _number(row["floor_seconds"], 1e-3, 3),
            _number(row["authors_seconds"], 1e-3, 1) or "does not fit",
        ]
        for row in rows
    ]
    header = ["layer", "grid", "r", "exact, ms", "low-rank, ms", "speed-up", "predicted", "FLOP ratio", "floor, ms"]
    return (
        f"Times of the backward pass of one layer, {rows[0]['batch']} images, the projection of the input included. The floor "
        "is the time that FLOPs or bytes take at the measured limits.\n\n" + markdown([*header, "authors' form, ms"], table)
    )


def steps(rows: Rows, memory: Mapping[str, Any], predicted: Mapping[str, Any]) -> str:
    """Times of training steps, beside their memory and what a compiler's counts predict."""
    table = []
    for row in rows:
        real, least = memory.get(row["name"], {}), predicted.get(row["name"], {})
        table.append(
            [
                row["model"],
                row["method"],
                _number(row["seconds"], 1e-3, 1),
                f"{row['images_per_second']:,.0f}",
                _number(row["speedup"], 1, 2),
                _number(_least(least), 1e-3, 1),
                _number(real.get("peak_bytes"), 1e9, 2),
                _number(row["planned_peak_bytes"], 1e9, 2),
                f"{row['saved_bytes'] / 1e6:,.1f}",
            ]
        )
    header = ["model", "method", "step, ms", "images/s", "speed-up", "predicted, ms", "peak, GB", "planned, GB"]
    text = f"""
        Whole training steps, {rows[0]["batch"]} images. "Predicted" is the least time that the limits of the device allow for
        what a compiler plans (`lbpwht compile`): no clock's time. "Peak" is the memory that the device had in use at most,
        state and images included; "planned" is what the compiler said before.
    """
    return f"{prose(text)}\n\n{markdown([*header, 'MB kept per image'], table)}"


def _least(row: Mapping[str, Any]) -> float | None:
    """The roofline by kernel where there is one, else the longest of its floors."""
    floors = [row[name] for name in ("compute_seconds", "memory_seconds") if row.get(name) is not None]
    return row.get("roofline_seconds") or max(floors, default=None)


def profile(rows: Rows) -> str:
    """The dearest kernels."""
    table = [
        [
            row["model"],
            row["method"],
            f"`{kernel['name'][:_SHORT].replace('|', ' ')}`",
            f"{kernel['runs']:g}",
            _number(kernel["seconds"], 1e-3, 2),
            f"{100 * kernel['share']:.0f} %",
        ]
        for row in rows
        for kernel in row["kernels"]
    ]
    text = "The kernels that take the most time in a step; shares are of the time of all kernels."
    return f"{text}\n\n{markdown(['model', 'method', 'kernel', 'runs', 'ms', 'share'], table)}"


def finetune(rows: Rows) -> str:
    """The fine-tuning."""
    parts = []
    for row in rows:
        accuracies = ", ".join(f"{100 * epoch['test_accuracy']:.1f} %" for epoch in row["epochs"]) or "no epoch was finished"
        weights = "random weights" if row["pretrained"] == "none" else row["pretrained"]
        text = f"""
            `{row["model"]}` with {row["method"]} on CIFAR-10 from {weights}, batch {row["batch"]}: {row["steps"]:,} steps in
            {row["training_seconds"]:,.0f} s, {row["images_per_second"]:,.0f} images/s at the median, loading included. Test
            accuracy after each epoch: {accuracies}.
        """
        parts.append(prose(text))
    return "\n\n".join(parts)


def device(results: Mapping[str, Any]) -> str:
    """The section of one device."""
    parts = results["parts"]
    good = {name: [row for row in part["rows"] if "failed" not in row] for name, part in parts.items()}
    by_name = {name: {row["name"]: row for row in good.get(name, [])} for name in ("memory", "roofline")}
    writers = {
        "numerics": ("Numerics", numerics),
        "layers": ("Layers", layers),
        "steps": ("Training steps", lambda rows: steps(rows, by_name["memory"], by_name["roofline"])),
        "profile": ("Kernels", profile),
        "finetune": ("Fine-tuning", finetune),
    }
    text = [f"## {results['device']}"]
    machines = [part["facts"]["machine"] for part in parts.values() if "machine" in part["facts"]]
    if machines:
        machine = machines[0]
        text.append(f"JAX {machine['jax']}, Python {machine['python']}, {machine['processor']}, {machine['cores']} cores.")
    for name, (title, write) in writers.items():
        text.append(f"### {title}")
        text.append(write(good[name]) if good.get(name) else "Not measured yet.")
    missing = [f"- {name}: {_some(part['left_out'])}" for name, part in parts.items() if part["left_out"]]
    missing += [
        f"- {name}: {row['name']}: {row['failed']}" for name, part in parts.items() for row in part["rows"] if "failed" in row
    ]
    if missing:
        text += ["### Not measured", "\n".join(missing)]
    return "\n\n".join(text)


def render() -> str:
    """The page."""
    files = sorted(RESULTS.glob("accelerator_*.json"))
    sections = [device(read(file)) for file in files] or [NOTHING]
    return "\n\n".join(["# Accelerators", prose(HEAD), _COMMAND, *sections]) + "\n"


def main(check: bool = False) -> None:
    """Writes the page.

    Args:
      check: writes nothing, and fails if the page is not what was measured.
    """
    if not check:
        PAGE.write_text(render())
    elif not PAGE.exists() or render() != PAGE.read_text():
        raise SystemExit("docs/accelerators.md is not what was measured; run: python experiments/accelerator_page.py")


if __name__ == "__main__":
    tyro.cli(main)
