"""The folder of a training run: configuration, metrics, checkpoints, weights, plot."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from matplotlib.figure import Figure

from lbpwht_jax.runs.metrics import METRICS
from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.train import Epoch, Step

CONFIG, RESULT, SKIPPED, LOCK = "config.json", "result.json", "skipped.json", ".lock"
WEIGHTS, ADAPTER, PLOT = "weights.safetensors", "adapter", "curves.png"


def lock(path: Path, create: bool) -> filelock.BaseFileLock:
    """Takes a run folder for this process, until the lock is released or the process ends.

    Args:
      path: of the folder.
      create: whether it is that of a new run, to be made if there is none.

    Raises:
      ValueError: if another process has it; if it is to be new and holds a run, or is not and holds none; if it cannot be made
        or written.
    """
    if create and ((path / CONFIG).exists() or (path / METRICS).exists()):
        raise ValueError(f"{path} already holds a run; name another --output, continue it with --resume {path}, or delete it")
    if not create:
        read_config(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(path / LOCK, timeout=0)
        held.acquire()
    except filelock.Timeout:
        raise ValueError(f"{path} is in use by another process; wait for it to end, or stop it") from None
    except OSError as error:
        raise ValueError(f"cannot write the run folder {path}: {error.strerror}; name another --output") from None
    return held


def read_config(path: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
      ValueError: if the folder holds no run, or its ``config.json`` is damaged.
    """
    try:
        return RunConfig.from_json(json.loads((path / CONFIG).read_text()))
    except OSError as error:
        raise ValueError(f"{path} is no run folder: cannot read {path / CONFIG} ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON values by name, indented, replacing the file at once."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(new, file)


def add_skipped(path: Path, skipped: Mapping[str, str]) -> dict[str, str]:
    """Adds images that could not be read, and why, by name, to the folder's ``skipped.json``; returns all of them."""
    file = path / SKIPPED
    before = json.loads(file.read_text()) if file.exists() else {}
    if skipped.keys() - before.keys():
        write_json(file, before | dict(skipped))
    return before | dict(skipped)


def plot_curves(path: Path, steps: Sequence[Step], epochs: Sequence[Epoch], title: str) -> None:
    """Draws training loss by step and both accuracies by epoch into the folder's ``curves.png``."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    loss.plot([step.number for step in steps], [step.loss for step in steps], linewidth=0.8, label="training, smoothed labels")
    ends = [epoch.step for epoch in epochs]
    loss.plot(ends, [epoch.test_loss for epoch in epochs], marker="o", markersize=3, label="test")
    loss.set(xlabel="step", ylabel="cross-entropy (nats)", ylim=(0, None))
    starts = [0, *ends[:-1]]
    within = [[step.accuracy for step in steps if a < step.number <= b] for a, b in zip(starts, ends, strict=False)]
    means = [100 * sum(values) / max(len(values), 1) for values in within]
    accuracy.plot(ends, means, marker="o", markersize=3, label="training")
    accuracy.plot(ends, [100 * epoch.test_accuracy for epoch in epochs], marker="o", markersize=3, label="test")
    accuracy.set(xlabel="step", ylabel="accuracy (%)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path / PLOT, dpi=120)
