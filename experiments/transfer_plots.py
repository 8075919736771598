"""Plots of the transfer sweep, from its JSON, for ``experiments/results_page.py``."""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy import stats
from transfer_report import FAMILIES, L1, TRAINS, accuracies


def base_name(variant: str) -> str:
    """The name of the same variant at the common learning rate."""
    return re.sub(r" \(.* x lr\)$", "", variant)


def plot(
    runs: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, Mapping[str, float]],
    path: Path,
    trains: Sequence[str] = tuple(TRAINS),
    families: Sequence[str] = tuple(FAMILIES),
) -> None:
    """Draws accuracy against backward FLOPs, saved bytes and step time, a row for each kind of training.

    Args:
      runs: the sweep's runs.
      seconds: time of a step, by what is trained and the variant.
      path: the image file to write.
      trains: the kinds of training.
      families: the methods, names of ``FAMILIES``.
    """
    axes_of: list[tuple[str, Callable[[Mapping[str, Any]], float]]] = [
        ("backward MFLOPs per image", lambda run: run["backward_flops"] / 1e6),
        ("MB kept per image", lambda run: run["saved_bytes"] / 1e6),
        ("step (ms)", lambda run: seconds[run["train"]].get(base_name(run["variant"]), math.nan) * 1e3),  # NaN is not drawn
    ]
    figure = Figure(figsize=(12, 3.8 * len(trains)), layout="constrained")
    grid = figure.subplots(len(trains), len(axes_of), sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    for row, train in zip(grid, trains, strict=True):
        found = accuracies(runs, train)
        for axes, (label, cost) in zip(row, axes_of, strict=True):
            for family in families:
                names, color, marker = FAMILIES[family]
                points = []
                for name in (n for n in names if n in found):
                    own = [run for run in runs if run["train"] == train and run["variant"] == name]
                    values = list(found[name].values())
                    points.append((statistics.median(map(cost, own)), statistics.mean(values), min(values), max(values)))
                if points:
                    x, y, low, high = (list(column) for column in zip(*points, strict=True))
                    errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
                    drawn = axes.errorbar(x, y, errors, color=color, marker=marker, linewidth=1, markersize=6, capsize=2)
                    handles.setdefault(family, drawn)
            axes.set(xlabel=label, xlim=(0, None))
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{TRAINS[train]}\ntest accuracy (%)")
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def plot_gradients(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the cosine similarity with the full gradient by layer, a line for each rank."""
    chosen = [row for row in rows if row["method"] in ("lp_l1-1", *L1)]
    kinds = [
        (projection, dx)
        for dx in ("exact", "low_rank")
        for projection in ("fitted", "official")
        if any(row["projection"] == projection and row["dx"] == dx for row in chosen)
    ]
    layers = list(chosen[0]["cosine"])
    short = [re.sub(r"stages_|blocks_|mlp/|token_mixer/", "", layer) for layer in layers]
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    grid = figure.subplots(2, (len(kinds) + 1) // 2, sharex=True, sharey=True, squeeze=False)
    for axes, (projection, dx) in zip(grid.flat, kinds, strict=False):
        own = [row for row in chosen if row["projection"] == projection and row["dx"] == dx]
        for i, row in enumerate(own):
            color = stats.uniform.cdf(i, -1, len(own) + 1)
            values = [row["cosine"][layer] for layer in layers]
            axes.plot(
                short,
                values,
                marker="o",
                markersize=4,
                color=(0.1, 0.75 - 0.7 * color, 0.9 - 0.4 * color),
                label=row["method"],
            )
        axes.set_title(f"{projection}, low rank on {'dW alone' if dx == 'exact' else 'dW and dx'}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", labelrotation=90, labelsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("stage / block / layer")
    for axes in grid[:, 0]:
        axes.set_ylabel("cosine similarity to full")
    grid[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
