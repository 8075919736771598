"""Fine-tunes the bundled model on digits with several methods and seeds, and writes the results as JSON and as a table.

    python experiments/digits.py

reproduces the README's table: it writes experiments/results/digits.json and prints the table. Runs of one seed share their
data, their new head and their order of images.
"""

import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import jax
import tyro

from lbpwht_jax.cli import main as lbpwht

RESULTS = Path(__file__).parent / "results" / "digits.json"


def run(method: str, projection: str, seed: int, folder: Path) -> dict:
    """The result.json of one run of ``lbpwht finetune``."""
    output = folder / f"{method}-{projection}-{seed}"
    arguments = ["--method", method, "--projection", projection, "--seed", str(seed), "--output", str(output)]
    if lbpwht(["finetune", *arguments]):
        raise SystemExit(f"lbpwht finetune {' '.join(arguments)} failed")
    return json.loads((output / "result.json").read_text())


def table(results: dict) -> str:
    """The results as a Markdown table: mean and range of accuracy, costs an image, step time over full backprop's."""
    rows = [
        "| method | test accuracy, mean (lowest to highest) | backward MFLOPs/image | saved KB/image | median step / full's |",
        "|---|---|---|---|---|",
    ]
    full = statistics.median(run["step_seconds"] for run in results["runs"]["full"])
    for method, runs in results["runs"].items():
        accuracy = [100 * run["test_accuracy"] for run in runs]
        rows.append(
            f"| {method} | {statistics.mean(accuracy):.2f} % ({min(accuracy):.2f} to {max(accuracy):.2f}) "
            f"| {runs[0]['backward_flops'] / 1e6:.1f} | {runs[0]['saved_bytes'] / 1e3:,.0f} "
            f"| {statistics.median(run['step_seconds'] for run in runs) / full:.2f} |"
        )
    return "\n".join(rows)


def main(
    methods: tuple[str, ...] = ("full", "lp_l1-8", "lp_l1-4", "lp_l1-2"),
    projection: str = "fitted",
    seeds: tuple[int, ...] = (0, 1, 2),
    output: Path = RESULTS,
) -> None:
    """Runs every method with every seed, the methods in turn.

    Args:
      methods: short names, as for lbpwht finetune.
      projection: of the low-rank methods.
      seeds: of split, head and shuffling.
      output: JSON file to write.
    """
    runs: dict[str, list] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for method in methods:
                runs[method].append({"seed": seed, **run(method, projection, seed, Path(folder))})
    results = {
        "command": "python experiments/digits.py",
        "projection": projection,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores",
        "runs": runs,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    tyro.cli(main)
