"""The folder a training run leaves behind: configuration, metrics, weights, plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lbpwht_jax.train import Epoch, Step

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
WEIGHTS, ADAPTER, PLOT = "weights.safetensors", "adapter", "curves.png"


def create(path: Path) -> Path:
    """Makes the folder of a new run.

    Raises:
      ValueError: if it already holds a run, or cannot be made or written.
    """
    if (path / CONFIG).exists() or (path / METRICS).exists():
        raise ValueError(f"{path} already holds a run; name another --output, or delete it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / METRICS).touch()
    except OSError as error:
        raise ValueError(f"cannot write the run folder {path}: {error.strerror}; name another --output") from None
    return path


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON values by name, indented."""
    file.write_text(json.dumps(values, indent=2) + "\n")


class MetricsFile:
    """Appends a JSON line for each step and epoch to the folder's ``metrics.jsonl``; a context manager."""

    def __init__(self, path: Path):
        self._file = (path / METRICS).open("a", buffering=1)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, event: Step | Epoch) -> None:
        """Adds one event: ``{"kind": "step" or "epoch", ...its fields}``; losses are means, times in seconds."""
        kind = type(event).__name__.lower()
        self._file.write(json.dumps({"kind": kind, **event._asdict()}) + "\n")


def plot_curves(path: Path, steps: Sequence[Step], epochs: Sequence[Epoch], title: str) -> None:
    """Draws training loss by step and both accuracies by epoch into the folder's ``curves.png``."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    per_epoch = max(len(steps) // max(len(epochs), 1), 1)
    ends = [epoch.number * per_epoch for epoch in epochs]
    loss, accuracy = figure.subplots(1, 2)
    loss.plot([step.number for step in steps], [step.loss for step in steps], linewidth=0.8, label="training, smoothed labels")
    loss.plot(ends, [epoch.test_loss for epoch in epochs], marker="o", markersize=3, label="test")
    loss.set(xlabel="step", ylabel="cross-entropy (nats)", ylim=(0, None))
    means = [sum(step.accuracy for step in steps[end - per_epoch : end]) / per_epoch * 100 for end in ends]
    accuracy.plot(ends, means, marker="o", markersize=3, label="training")
    accuracy.plot(ends, [100 * epoch.test_accuracy for epoch in epochs], marker="o", markersize=3, label="test")
    accuracy.set(xlabel="step", ylabel="accuracy (%)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path / PLOT, dpi=120)
