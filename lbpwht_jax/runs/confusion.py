"""What an evaluation found class by class: as JSON values, as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from lbpwht_jax.train import Details

SHOWN = 20
_NUMBERED = 20


def as_json(details: Details, classes: Sequence[str]) -> dict[str, Any]:
    """JSON values by name: accuracy, loss, images, skipped, top5_accuracy where it is known, and a list of the classes."""
    top5 = {} if details.top5_accuracy is None else {"top5_accuracy": details.top5_accuracy}
    rows = [
        {"class": name, "images": int(details.confusion[i].sum()), "accuracy": accuracy}
        for i, (name, accuracy) in enumerate(zip(classes, details.class_accuracies, strict=True))
    ]
    return {**details.evaluation._asdict(), **top5, "classes": rows}


def class_table(details: Details, classes: Sequence[str]) -> Table:
    """The classes that are recognised least, each with the class it is taken for most."""
    known = [(accuracy, i) for i, accuracy in enumerate(details.class_accuracies) if accuracy is not None]
    title = f"The {SHOWN} classes recognised least, of {len(classes)}" if len(known) > SHOWN else "By class"
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for heading in ("images", "accuracy"):
        table.add_column(heading, justify="right")
    table.add_column("most often taken for")
    for accuracy, i in sorted(known)[:SHOWN]:
        wrong = details.confusion[i].copy()
        wrong[i] = 0
        other = f"{classes[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""
        table.add_row(classes[i], f"{details.confusion[i].sum():,}", f"{accuracy:.1%}", other)
    return table


def plot_confusion(file: Path, confusion: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Draws the shares of each class's images that were taken for each class.

    Args:
      file: the PNG to write.
      confusion: ``[classes, classes]``: how many images of each class (rows) were taken for each (columns).
      classes: their names, written beside the axes if they are no more than 20.
      title: above the picture.
    """
    size = min(12.0, 3 + 0.35 * len(classes))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(shown, label="share of the class's images")
    axes.set(title=title, xlabel="taken for", ylabel="class")
    if len(classes) <= _NUMBERED:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in np.argwhere(confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=7, color=colour)
    figure.savefig(file, dpi=120)
