"""What ``lbpwht finetune --compare`` adds to its runs: steps timed in turn, and one picture."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from lbpwht_jax.bench import interleaved
from lbpwht_jax.runs.folder import write_json
from lbpwht_jax.runs.results import Result
from lbpwht_jax.runs.training import TrainingRun
from lbpwht_jax.screen import say
from lbpwht_jax.train.processes import is_first

_ROUNDS = 5
JSON, PLOT = "compare.json", "compare.png"


def compare(runs: Sequence[TrainingRun], results: Sequence[Result], shown: Console) -> list[Result]:
    """Times a few more steps of finished runs in turn, so that a slow spell of the machine affects all of them.

    Writes compare.json and compare.png to the folder of the first run.

    Args:
      runs: what was trained.
      results: what each came to.
      shown: where to say what is done.

    Returns:
      The results with these times of a step.
    """
    say(shown, f"Timing {_ROUNDS} steps of each method in turn.")
    seconds = interleaved({run.config.method: run.stepping() for run in runs}, _ROUNDS)
    timed = [dataclasses.replace(result, step_seconds=seconds[result.method]) for result in results]
    if is_first():
        write_json(runs[0].folder / JSON, {"rounds": _ROUNDS, "results": [dataclasses.asdict(result) for result in timed]})
        plot(timed, runs[0].folder / PLOT, f"{runs[0].config.model} on {runs[0].config.dataset}")
    return timed


def plot(results: Sequence[Result], file: Path, title: str) -> None:
    """Draws accuracy, bytes kept per image and time of a step, methods side by side.

    Args:
      results: with times.
      file: the PNG to write.
      title: above the bars.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    figure.suptitle(title)
    panels = (
        ("test accuracy (%)", "%.1f", [100 * result.test_accuracy for result in results]),
        ("MB kept per image", "%.2f", [result.saved_bytes / 1e6 for result in results]),
        ("median time of a step (ms)", "%.0f", [1e3 * (result.step_seconds or 0) for result in results]),
    )
    methods = [result.method for result in results]
    for axes, (label, form, values) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.bar_label(axes.bar(methods, values, color=[f"C{n}" for n in range(len(methods))]), fmt=form, fontsize=8)
        axes.set(title=label)
        axes.margins(y=0.15)
        axes.tick_params(axis="x", rotation=20, labelsize=8)
    figure.savefig(file, dpi=120)
