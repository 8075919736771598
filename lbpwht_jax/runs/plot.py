"""The picture of a run."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lbpwht_jax.train import Epoch, Step


def plot_curves(file: Path, steps: Sequence[Step], epochs: Sequence[Epoch], title: str, training: str = "training") -> None:
    """Draws training loss by step and the accuracies by epoch, on training images and on those that epochs measure.

    Args:
      file: the PNG to write.
      steps: in order.
      epochs: in order.
      title: above the curves.
      training: what the curve of training losses is called, such as with what they contain.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    loss.plot([step.number for step in steps], [step.loss for step in steps], linewidth=0.8, label=training)
    ends = [epoch.step for epoch in epochs]
    on = "validation" if any(epoch.validation_accuracy is not None for epoch in epochs) else "test"
    loss.plot(ends, [getattr(epoch, f"{on}_loss") for epoch in epochs], marker="o", markersize=3, label=on)
    loss.set(xlabel="step", ylabel="cross-entropy (nats)", ylim=(0, None))
    starts = [0, *ends[:-1]]
    within = [[step.accuracy for step in steps if a < step.number <= b] for a, b in zip(starts, ends, strict=False)]
    means = [100 * sum(values) / max(len(values), 1) for values in within]
    accuracy.plot(ends, means, marker="o", markersize=3, label="training")
    accuracy.plot(ends, [100 * epoch.accuracy for epoch in epochs], marker="o", markersize=3, label=on)
    accuracy.set(xlabel="step", ylabel="accuracy (%)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)
