"""Writes docs/results.md and its plots from the JSON files in experiments/results.

    python experiments/results_page.py          writes them
    python experiments/results_page.py --check  fails if the page, or a figure in the README, is not what was measured

Every table names the command that measured it. For what has not been measured yet, the page gives the command alone.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kept_by_kind
import results_accuracy as accuracy
import results_compile as compiled
import results_costs as costs
import results_readme
import transfer_plots
import transfer_report
import tyro
from transfer_report import prose

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, IMAGES = ROOT / "experiments" / "results", ROOT / "docs" / "results.md", ROOT / "docs" / "images"
HEAD = """
    Every number here was measured by the command above it and comes from the JSON file that the command writes.
    `python experiments/results_page.py` makes this page from those files. Unless stated otherwise, FLOPs are those of the
    matrix products of the backward pass, Walsh transforms included, per image. Saved bytes are everything kept for the backward
    pass that grows with the batch.
"""


_STEP = "lbpwht bench step --models efficientformer_l1 --train {train} --rounds 5"
_OTHERS = "lbpwht bench step --models vit_small_patch16_224 swinv2_tiny_window8_256 --train all --batch-size 8 --rounds 3"

_BACKBONES = "lbpwht bench step --models vit_small_patch14_dinov2 convnext_tiny --methods full lp_l1-2 lp_l1-4 lora_all-8"

Section = Callable[[Mapping[str, Any]], str]
SECTIONS: tuple[tuple[str, str, str, Section], ...] = (
    ("Digits", "digits", "digits.py", accuracy.digits),
    ("Tiny-ImageNet to CIFAR-10", "transfer", "transfer.py --data cifar10.zip", accuracy.transfer),
    ("Times of the sweep's training steps", "transfer_steps", "transfer_steps.py", accuracy.transfer_steps),
    ("How much of the gradient survives", "transfer_gradients", "transfer_gradients.py --data cifar10.zip", accuracy.gradients),
    ("Gradients by a plan", "plan_gradients", "plan_gradients.py --data cifar10.zip", accuracy.plans),
    ("What planning costs", "plan_times", "plan_times.py", costs.plan_times),
    (
        "Times of a layer (the paper's Table 8)",
        "bench_layers",
        "lbpwht bench layers --authors --rounds 11",
        costs.bench_layers,
    ),
    ("Times of a training step", "bench_step", _STEP.format(train="all"), costs.bench_step),
    ("Times of a step that trains the last stage", "bench_step_last_stage", _STEP.format(train="last_stage"), costs.bench_step),
    ("Times of other models' steps", "bench_step_others", _OTHERS, costs.bench_step),
    ("Times of newer backbones' steps", "bench_step_backbones", _BACKBONES, costs.bench_step),
    ("Projections by grid", "transform_times", "transform_times.py", costs.transform_times),
    ("Steps beside PyTorch's", "step_profile", "step_profile.py", costs.step_profile),
    ("Inference beside PyTorch's", "inference_speed", "inference_speed.py", costs.inference_speed),
    ("Convolutions of other people's models", "lean_convolutions", "lean_convolutions.py", costs.lean_convolutions),
    ("Steps on machines that are not there", "compile_tables", "compile_tables.py", compiled.tables),
    ("Table 8's layers on one of them", "compile_layers", "compile_layers.py", compiled.layers),
    ("What compiles for them", "compile_families", "compile_families.py", compiled.families),
    ("Speed of the loader", "loader_speed", "loader_speed.py", costs.loader_speed),
    ("Interrupted and resumed runs", "kill_and_resume", "kill_and_resume.py", costs.kill_and_resume),
    ("A long run", "soak", "soak.py", costs.soak),
    ("The paper's cost tables", "cost_tables", "cost_tables.py", costs.cost_tables),
    ("Bytes kept", "saved_bytes", "saved_bytes.py", costs.kept_bytes),
    ("Bytes kept, by what needs them", "kept_by_kind", "kept_by_kind.py", costs.kept_by_kind),
    ("What steps hold on a CPU", "temporaries", "temporaries.py", costs.temporaries),
    ("Accuracy, the paper's Table 5", "paper_table_5", "paper_tables.py 5 --data DATA --hub", accuracy.paper_table),
    ("Accuracy, the paper's Table 6", "paper_table_6", "paper_tables.py 6 --data DATA --hub", accuracy.paper_table),
    ("Accuracy, the paper's Table 7", "paper_table_7", "paper_tables.py 7 --data DATA --hub", accuracy.paper_table),
)


def read(name: str) -> dict | None:
    """The results of an experiment, if they are there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def render() -> str:
    """The page."""
    parts = ["# Results", prose(HEAD)]
    for title, name, command, section in SECTIONS:
        results = read(name) or {}
        shown = results.get("command", command if command.startswith("lbpwht") else f"python experiments/{command}")
        parts += [f"## {title}", f"```sh\n{shown}\n```", section(results) if results else "Not measured yet."]
    return "\n\n".join(parts) + "\n"


def main(check: bool = False) -> None:
    """Writes the page and its plots.

    Args:
      check: writes nothing, and fails if the page or a figure in the README is not what was measured.
    """
    if check:
        wrong = results_readme.problems()
        if render() != PAGE.read_text():
            wrong.append("docs/results.md is not what was measured; run: python experiments/results_page.py")
        if wrong:
            raise SystemExit("\n".join(wrong))
        return
    PAGE.write_text(render())
    IMAGES.mkdir(parents=True, exist_ok=True)
    if (sweep := read("transfer")) and (steps := read("transfer_steps")):
        transfer_plots.plot(sweep["runs"], steps["seconds"], IMAGES / "transfer.png")
        shown = ("all",), transfer_report.README_FAMILIES
        transfer_plots.plot(sweep["runs"], steps["seconds"], IMAGES / "transfer_summary.png", *shown)
    if compared := read("transfer_gradients"):
        transfer_plots.plot_gradients(compared["rows"], IMAGES / "transfer_gradients.png")
    if kept := read("kept_by_kind"):
        kept_by_kind.draw(kept["rows"], IMAGES / "kept_by_kind.png")


if __name__ == "__main__":
    tyro.cli(main)
