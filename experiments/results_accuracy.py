"""The results page's sections on accuracy and gradients."""

from collections.abc import Mapping
from typing import Any

import digits as digits_experiment
import transfer_report
from transfer_report import markdown, prose


def digits(results: Mapping[str, Any]) -> str:
    """Fine-tuning on digits."""
    text = f"""
        The bundled vision transformer, pretrained on Fashion-MNIST, was fine-tuned on scikit-learn's digits with seeds 0 to 2.
        There are 360 test images.
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
        A narrow EfficientFormer (`experiments/transfer_backbone.py`: 56 pixels, grids of 14x14 and 7x7) was pretrained on
        Tiny-ImageNet (200 classes, test accuracy {100 * results["pretrained_test_accuracy"]:.1f} %) and adapted to CIFAR-10,
        which it had not seen. All runs use the same {10 * setting["train_per_class"]:,} training and
        {10 * setting["test_per_class"]:,} test images, {setting["epochs"]} epochs, batch {setting["batch_size"]}, AdamW with a
        learning rate of {setting["lr"]:g}, flips and shifts. LoRA's runs on the whole model train the layers without branches
        too, as the paper's do (`--train all`); beside them is what its branches and the head come to alone (`--train head`, as
        in PEFT). The {len(runs)} runs took {hours:.1f} hours in total, up to two at a time (`--processes 2`), each on
        {"; ".join(devices)}. For all {len(seeds)} seeds, add `--seeds {" ".join(map(str, seeds))}`.
    """
    claims = """
        Differences are paired over seeds and given in points of accuracy, with 95 % intervals by Student's t. A claim holds, or
        does not hold, if the whole interval says so; otherwise it is open. Seeds were added in three rounds, for all methods
        alike but after looking at the claims, and the intervals are not corrected for this. A verdict near its bound is
        therefore weak.
    """
    parts = [
        prose(text),
        "![full, low rank and LoRA: accuracy against backward FLOPs, saved bytes and step time](images/transfer_summary.png)",
        "The same for all methods, and for both kinds of training:",
        "![all methods: accuracy against backward FLOPs, saved bytes and step time](images/transfer.png)",
        "### Claims",
        prose(claims),
        transfer_report.claims_table(runs),
    ]
    for train, words in transfer_report.TRAINS.items():
        if any(run["train"] == train for run in runs):
            parts += [f"### Training the {words}", transfer_report.table(runs, train)]
    return "\n\n".join(parts)


def transfer_steps(results: Mapping[str, Any]) -> str:
    """Times of the transfer sweep's training steps."""
    machine = results["machine"]
    text = f"""
        Whole training steps of the sweep's methods, in turn in one process, batch {results["batch_size"]}: medians of
        {results["rounds"]}, and in brackets the speed-up over full backpropagation. Low rank is used everywhere, even where it
        is slower (`when="always"`). {machine["processor"]}, {machine["cores"]} cores, JAX {machine["jax"]}, Python
        {machine["python"]}.
    """
    return f"{prose(text)}\n\n{transfer_report.steps_table(results['seconds'])}"


def gradients(results: Mapping[str, Any]) -> str:
    """Gradients by layer and rank."""
    text = f"""
        Cosine similarity of the kernels' gradients with those of full backpropagation, on one batch of {results["batch_size"]}
        images, for the pretrained backbone with a head trained on CIFAR-10. The table gives the mean over the layers, and the
        worst layer in brackets. With low rank on dx too, the errors of later layers reach the earlier ones.
    """
    table = transfer_report.gradients_table(results["rows"])
    return f"{prose(text)}\n\n{table}\n\n![cosine similarity by layer](images/transfer_gradients.png)"


def paper_table(results: Mapping[str, Any]) -> str:
    """Accuracy of the runs of one of the paper's tables."""
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
    header = [
        "data set",
        "model",
        "method",
        "trained",
        "epochs",
        "test accuracy",
        "MFLOPs/image",
        "MB kept per image",
        "step, ms",
    ]
    devices = sorted({f"{row['device']}, {row['dtype']}, JAX {row['versions']['jax']}" for row in results["rows"]})
    return f"{'; '.join(devices)}.\n\n{markdown(header, rows)}"


def plans(results: Mapping[str, Any]) -> str:
    """Gradients by a plan beside those by one selection for all layers."""
    rows = [
        [
            row["name"],
            f"{row['flops']:.3f}",
            f"{row['whole']:.4f}",
            f"{row['mean']:.4f}",
            " ".join("all" if kept is None else str(kept) for kept in row.get("functions", [])),
        ]
        for row in results["rows"]
    ]
    text = f"""
        {results["model"]}, pretrained, its head trained for an epoch on {results["images"]}. Plans ([page](plan.md)) were made
        from batches of {results["batch_size"]} training images. Cosines with the exact gradient are on {results["held_out"]}
        test images: of all parameters together, and the mean over the planned layers' kernels. FLOPs are shares of full
        backpropagation's.
    """
    header = ["method", "backward FLOPs", "cosine, whole", "cosine, mean", "functions kept, in order"]
    return f"{prose(text)}\n\n{markdown(header, rows)}"
