"""Writes docs/results.md and its plots from the JSON files in experiments/results.

    python experiments/results_page.py

Every table names the command that measured it. What has not been measured yet is left out, and the page says how to.
"""

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transfer_report
import tyro
from transfer_report import markdown

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, IMAGES = ROOT / "experiments" / "results", ROOT / "docs" / "results.md", ROOT / "docs" / "images"
HEAD = """
    Every number here was measured by the command above it and is generated from the JSON file that the command writes; this
    page by `python experiments/results_page.py`. FLOPs, where not said otherwise, are those of matrix products, Walsh
    transforms included, of the backward pass of one image; saved bytes are all residuals of the backward pass that grow with
    the batch.
"""


def prose(text: str) -> str:
    """A paragraph, wrapped."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _means(runs: list[dict], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def digits(results: Mapping[str, Any]) -> str:
    """The embedded default: digits."""
    rows = [
        [
            method,
            f"{100 * _means(runs, 'test_accuracy'):.2f} %",
            str(len(runs)),
            f"{runs[0]['backward_flops'] / 1e6:.1f}",
            f"{runs[0]['saved_bytes'] / 1e3:,.0f}",
            f"{results['step_ratios'][method]:.2f}",
        ]
        for method, runs in results["runs"].items()
    ]
    header = ["method", "test accuracy, mean", "seeds", "backward MFLOPs/image", "saved KB/image", "step time over full's"]
    text = f"""
        The bundled vision transformer, pretrained on Fashion-MNIST, fine-tuned on scikit-learn's digits; 360 test images.
        Measured at version 0.1.0, before today's loader.
        {results["device"]}, JAX {results["jax"]}, Python {results["python"]}.
    """
    return f"{prose(text)}\n\n{markdown(header, rows)}"


def transfer(results: Mapping[str, Any]) -> str:
    """The transfer sweep."""
    setting, runs = results["setting"], results["runs"]
    devices = sorted({f"{run['device']}, JAX {run['versions']['jax']}, Python {run['versions']['python']}" for run in runs})
    hours = sum(run["run_seconds"] for run in runs) / 3600
    text = f"""
        A narrow EfficientFormer (`experiments/transfer_backbone.py`: 56 pixels, grids of 14x14 and 7x7), pretrained on
        Tiny-ImageNet to {100 * results["pretrained_test_accuracy"]:.1f} % of its 200 classes, adapted to CIFAR-10, which it has
        not seen: {10 * setting["train_per_class"]:,} training and {10 * setting["test_per_class"]:,} test images, the same ones
        always; {setting["epochs"]} epochs, batch {setting["batch_size"]}, AdamW at {setting["lr"]:g}, flips and shifts.
        {len(runs)} runs, {hours:.1f} hours in all, on {"; ".join(devices)}. Step times are medians of a run's
        and of the runs'.
    """
    claims = """
        Differences are paired over seeds, in points of accuracy, with 95 % intervals by Student's t. A claim holds or does not
        hold if the whole interval says so, and is open otherwise.
    """
    parts = [
        prose(text),
        "![accuracy against backward FLOPs, saved bytes and step time](images/transfer.png)",
        "### Claims",
        prose(claims),
        transfer_report.claims_table(runs),
    ]
    for train, words in transfer_report.TRAINS.items():
        if any(run["train"] == train for run in runs):
            parts += [f"### Training the {words}", transfer_report.table(runs, train)]
    return "\n\n".join(parts)


def gradients(results: Mapping[str, Any]) -> str:
    """Gradients by layer and rank."""
    text = f"""
        Cosine similarity of the kernels' gradients with those of full backpropagation, on one batch of {results["batch_size"]}
        images, of the pretrained backbone with a head trained on CIFAR-10: the mean over the layers, and the worst layer in
        brackets. With low rank on dx too, the errors of later layers reach the earlier ones.
    """
    table = transfer_report.gradients_table(results["rows"])
    return f"{prose(text)}\n\n{table}\n\n![cosine similarity by layer](images/transfer_gradients.png)"


def cost_tables(results: Mapping[str, Any]) -> str:
    """The paper's cost tables."""
    text = f"""
        Counted on shapes. Root mean square difference of a row of Tables 5 and 7: {100 * results["rms_difference"]:.1f} %; the
        worst: {100 * results["worst_difference"]:.1f} % of FLOPs,
        {100 * results["worst_speedup_difference"]:.1f} % of speed-up.
    """
    parts = [prose(text)]
    for name in ("table_5", "table_7"):
        rows = [
            [
                row["model"],
                row["row"],
                f"{row['paper_mflops']:,.1f}",
                f"{row['our_mflops']:,.1f}",
                f"{100 * row['difference']:+.1f} %",
                f"{row['paper_speedup']:.2f}",
                f"{row['our_speedup']:.2f}",
            ]
            for row in results[name]
        ]
        header = ["model", "method", "paper, MFLOPs", "ours, MFLOPs", "difference", "paper, speed-up", "ours, speed-up"]
        parts += [f"### Table {name[-1]}", markdown(header, rows)]
    return "\n\n".join(parts)


def kept_bytes(results: Mapping[str, Any]) -> str:
    """Kept bytes, with and without recomputation."""
    rows = [
        [
            row["model"],
            row["method"],
            *(
                f"{row[key]:.1f}"
                for key in ("layers_mb", "model_mb", "remat_model_mb", "backward_mflops", "remat_backward_mflops")
            ),
        ]
        for row in results["rows"]
    ]
    header = ["model", "method", "MB kept: layers", "whole model", "with remat", "backward MFLOPs", "with remat"]
    return f"An image, float32, 100 classes.\n\n{markdown(header, rows)}"


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, device {machine['device']}, JAX {machine['jax']}, "
        f"Python {machine['python']}, {results['dtype']}; medians of {results['rounds']} interleaved samples."
    )


def bench_layers(results: Mapping[str, Any]) -> str:
    """Layers on the clock."""
    rows = []
    for row in results["rows"]:
        authors = row["authors_seconds"]
        rows.append(
            [
                f"{row['inputs']}->{row['outputs']}",
                "x".join(map(str, row["grid"])),
                str(row["batch"]),
                str(row["r"]),
                f"{1e3 * row['dense_seconds']:.2f}",
                f"{1e3 * row['seconds']:.2f}",
                f"{row['speedup']:.2f}",
                f"{row['flop_ratio']:.1f}",
                f"{100 * row['efficiency']:.0f} %",
                f"{1e3 * row['floor_seconds']:.2f}",
                f"{row['over_floor']:.1f}",
                f"{row['predicted']:.1f}",
                "" if authors is None else f"{authors / row['seconds']:.0f}",
            ]
        )
    text = f"""
        The backward pass of one dense layer (the paper's Table 8, and a layer of each other stage of EfficientFormer-L1), the
        projection of the input in the forward pass included. The floor is what its FLOPs take at the measured
        {results["peak_flops"] / 1e9:.0f} GFLOP/s, or its inputs and outputs at {results["bandwidth"] / 1e9:.0f} GB/s; predicted
        is the speed-up that the automatic choice goes by. {_machine(results)}
    """
    header = ["layer", "grid", "batch", "r", "exact, ms", "low-rank, ms", "speed-up", "FLOP ratio", "of it", "floor, ms"]
    header += ["over floor", "predicted", "authors' form over ours"]
    return f"{prose(text)}\n\n{markdown(header, rows)}\n\n![speed-up against FLOP ratio](images/bench_layers.png)"


def bench_step(results: Mapping[str, Any]) -> str:
    """Training steps on the clock."""
    rows = [
        [
            row["model"],
            row["method"],
            row["train"],
            str(row["batch"]),
            f"{1e3 * row['seconds']:.0f}",
            f"{row['images_per_second']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['backward_flops'] / 1e6:,.0f}",
            f"{row['saved_bytes'] / 1e6:.1f}",
        ]
        for row in results["rows"]
    ]
    header = [
        "model",
        "method",
        "trained",
        "batch",
        "step, ms",
        "images/s",
        "speed-up",
        "backward MFLOPs/image",
        "saved MB/image",
    ]
    return f"{prose(_machine(results))}\n\n{markdown(header, rows)}"


def kill_and_resume(results: Mapping[str, Any]) -> str:
    """Interrupted runs."""
    rows = [
        [
            run["signal"],
            str(run["last_step_written"]),
            str(run["resumed_after"]),
            "yes" if run["unfinished_checkpoint"] else "no",
            "equal" if run["same_metrics"] else "differ",
            "equal" if run["same_weights"] else "differ",
        ]
        for run in results["runs"]
    ]
    text = f"""
        A run of {results["steps"]} steps, with a moving average and augmentation, ended at random moments and gone on with: its
        loss curve and weights beside those of the uninterrupted run, bit for bit. {results["device"]}, JAX
        {results["jax"]}.
    """
    header = ["ended by", "last step written", "resumed after step", "in the middle of a save", "loss curve", "weights"]
    return f"{prose(text)}\n\n{markdown(header, rows)}"


def soak(results: Mapping[str, Any]) -> str:
    """A long run."""
    memory = results["resident_mib"]
    return prose(
        f"""
        {results["steps"]:,} steps on digits with {results["checkpoints_written"]} checkpoints in {results["seconds"]:,.0f} s:
        every step {"once" if results["every_step_once"] else "NOT once"} in the metrics, the last checkpoint
        {"equal" if results["last_checkpoint_is_the_export"] else "NOT equal"} to the exported weights. Resident memory
        {memory["at_half"]:.0f} MiB at half time, {memory["at_end"]:.0f} MiB at the end, {memory["most"]:.0f} MiB at most;
        {results["mib_per_1000_steps_second_half"]:.1f} MiB per 1,000 steps by regression over the second half.
        {results["device"]}, JAX {results["jax"]}.
        """
    )


def loader_speed(results: Mapping[str, Any]) -> str:
    """The loader beside a step."""
    loader = results["loader_images_per_second_by_workers"]
    workers = list(next(iter(loader.values())))
    rows = [
        [source, *(f"{rates[w]:,.0f}" for w in workers), f"{results['loader_over_step'][source]:.0f}"]
        for source, rates in loader.items()
    ]
    text = f"""
        Images a second of the loader alone, from JPEG files, by threads; and over the
        {results["step_images_per_second"]:.1f} images/s of a training step ({results["model"]}) on the same machine.
        {results["device"]}, JAX {results["jax"]}.
    """
    return f"{prose(text)}\n\n{markdown(['images', *(f'{w} threads' for w in workers), 'over the step'], rows)}"


def readme_steps(results: Mapping[str, Any]) -> str:
    """The README's table of training steps: the methods people choose between."""
    rows = [
        [
            row["method"],
            f"{1e3 * row['seconds']:,.0f}",
            f"{row['images_per_second']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['backward_flops'] / 1e6:,.0f}",
            f"{row['saved_bytes'] / 1e6:.1f}",
        ]
        for row in results["rows"]
        if row["method"] in ("full", "lp_l1-2", "lp_l1-4", "lora_all-8")
    ]
    return markdown(["method", "step, ms", "images/s", "speed-up", "backward MFLOPs/image", "saved MB/image"], rows)


def paper_table(results: Mapping[str, Any]) -> str:
    """The runs of one of the paper's tables."""
    rows = [
        [
            row["dataset"],
            row["model"],
            row["method"],
            row["train"],
            str(row["epochs"]),
            f"{100 * row['test_accuracy']:.2f} %",
            f"{row['backward_flops'] / 1e6:,.1f}",
            f"{row['saved_bytes'] / 1e6:,.1f}",
            f"{row['step_seconds'] * 1e3:.0f}",
        ]
        for row in results["rows"]
    ]
    header = ["data set", "model", "method", "trained", "epochs", "test accuracy", "MFLOPs/image", "saved MB/image", "step, ms"]
    return f"{results['device']}, JAX {results['jax']}.\n\n{markdown(header, rows)}"


_STEP = "lbpwht bench step --models efficientformer_l1 --train {train} --rounds 5"
_OTHERS = "lbpwht bench step --models vit_small_patch16_224 swinv2_tiny_window8_256 --batch-size 8 --rounds 3"

Section = Callable[[Mapping[str, Any]], str]
SECTIONS: tuple[tuple[str, str, str, Section], ...] = (
    ("Digits", "digits", "digits.py", digits),
    ("Tiny-ImageNet to CIFAR-10", "transfer", "transfer.py --data cifar10.zip", transfer),
    ("How much of the gradient survives", "transfer_gradients", "transfer_gradients.py --data cifar10.zip", gradients),
    ("A layer on the clock, the paper's Table 8", "bench_layers", "lbpwht bench layers --authors --rounds 11", bench_layers),
    ("A training step on the clock", "bench_step", _STEP.format(train="all"), bench_step),
    ("The last stage alone", "bench_step_last_stage", _STEP.format(train="last_stage"), bench_step),
    ("Other models", "bench_step_others", _OTHERS, bench_step),
    ("The loader", "loader_speed", "loader_speed.py", loader_speed),
    ("Ended and resumed", "kill_and_resume", "kill_and_resume.py", kill_and_resume),
    ("A long run", "soak", "soak.py", soak),
    ("The paper's cost tables", "cost_tables", "cost_tables.py", cost_tables),
    ("Kept bytes", "saved_bytes", "saved_bytes.py", kept_bytes),
    ("Accuracy, the paper's Table 5", "paper_table_5", "paper_tables.py 5 --data DATA --hub", paper_table),
    ("Accuracy, the paper's Table 6", "paper_table_6", "paper_tables.py 6 --data DATA --hub", paper_table),
    ("Accuracy, the paper's Table 7", "paper_table_7", "paper_tables.py 7 --data DATA --hub", paper_table),
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


def main() -> None:
    """Writes the page and its plots."""
    PAGE.write_text(render())
    IMAGES.mkdir(parents=True, exist_ok=True)
    if sweep := read("transfer"):
        transfer_report.plot(sweep["runs"], IMAGES / "transfer.png")
    if compared := read("transfer_gradients"):
        transfer_report.plot_gradients(compared["rows"], IMAGES / "transfer_gradients.png")


if __name__ == "__main__":
    tyro.cli(main)
