"""The results page's sections on accuracy and gradients."""

from collections.abc import Mapping
from typing import Any

import digits as digits_experiment
import transfer_report
from transfer_report import markdown, prose


def digits(results: Mapping[str, Any]) -> str:
    """The embedded default: digits."""
    text = f"""
        The bundled vision transformer, pretrained on Fashion-MNIST, fine-tuned on scikit-learn's digits with seeds 0 to
        2; 360 test images.
        {results["device"]}, JAX {results["jax"]}, Python {results["python"]}.
    """
    return f"{prose(text)}\n\n{digits_experiment.table(results)}"


def transfer(results: Mapping[str, Any]) -> str:
    """The transfer sweep."""
    setting, runs = results["setting"], results["runs"]
    devices = sorted({f"{run['device']}, JAX {run['versions']['jax']}, Python {run['versions']['python']}" for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    hours = sum(run["run_seconds"] for run in runs) / 3600
    text = f"""
        A narrow EfficientFormer (`experiments/transfer_backbone.py`: 56 pixels, grids of 14x14 and 7x7), pretrained on
        Tiny-ImageNet to {100 * results["pretrained_test_accuracy"]:.1f} % of its 200 classes, adapted to CIFAR-10, which it has
        not seen: {10 * setting["train_per_class"]:,} training and {10 * setting["test_per_class"]:,} test images, the same ones
        always; {setting["epochs"]} epochs, batch {setting["batch_size"]}, AdamW at {setting["lr"]:g}, flips and shifts.
        {len(runs)} runs, {hours:.1f} hours together, two at a time (`--processes 2`), each on {"; ".join(devices)}.
        All {len(seeds)} seeds: `--seeds {" ".join(map(str, seeds))}`.
    """
    claims = """
        Differences are paired over seeds, in points of accuracy, with 95 % intervals by Student's t. A claim holds or does not
        hold if the whole interval says so, and is open otherwise. Seeds were added in three goes, for all methods alike but
        after looking at the claims, and the intervals are not widened for their number: a verdict near its bound is weak.
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


def transfer_steps(results: Mapping[str, Any]) -> str:
    """The steps of the transfer sweep."""
    machine = results["machine"]
    text = f"""
        Whole training steps of the sweep's methods in turn in one process, medians of {results["rounds"]}, batch
        {results["batch_size"]}, in brackets the speed-up over full backpropagation. Low rank is taken everywhere, also where it
        is slower (`when="always"`). {machine["processor"]}, {machine["cores"]} cores, JAX {machine["jax"]}, Python
        {machine["python"]}.
    """
    return f"{prose(text)}\n\n{transfer_report.steps_table(results['seconds'])}"


def gradients(results: Mapping[str, Any]) -> str:
    """Gradients by layer and rank."""
    text = f"""
        Cosine similarity of the kernels' gradients with those of full backpropagation, on one batch of {results["batch_size"]}
        images, of the pretrained backbone with a head trained on CIFAR-10: the mean over the layers, and the worst layer in
        brackets. With low rank on dx too, the errors of later layers reach the earlier ones.
    """
    table = transfer_report.gradients_table(results["rows"])
    return f"{prose(text)}\n\n{table}\n\n![cosine similarity by layer](images/transfer_gradients.png)"


def paper_table(results: Mapping[str, Any]) -> str:
    """The runs of one of the paper's tables."""
    rows = [
        [
            row["dataset"],
            row["model"],
            row["method"],
            row["train"],
            str(row["recipe"]["epochs"]),
            f"{100 * row['test_accuracy']:.2f} %",
            f"{row['backward_flops'] / 1e6:,.1f}",
            f"{row['saved_bytes'] / 1e6:,.1f}",
            f"{row['step_seconds'] * 1e3:.0f}",
        ]
        for row in results["rows"]
    ]
    header = ["data set", "model", "method", "trained", "epochs", "test accuracy", "MFLOPs/image", "saved MB/image", "step, ms"]
    devices = sorted({f"{row['device']}, {row['dtype']}, JAX {row['versions']['jax']}" for row in results["rows"]})
    return f"{'; '.join(devices)}.\n\n{markdown(header, rows)}"
