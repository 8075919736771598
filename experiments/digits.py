"""Fine-tunes the bundled model on digits with several methods and seeds, and writes the results as JSON and as a table.

    python experiments/digits.py

writes experiments/results/digits.json, for the results page, and prints the table. Runs of one seed share their
data, their new head and their order of images.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from lbpwht_jax import create_model
from lbpwht_jax.adaptation import adapt, parse_method
from lbpwht_jax.cli import main as lbpwht
from lbpwht_jax.data import Loading, open_dataset, training_batches
from lbpwht_jax.models import model_info
from lbpwht_jax.train import Recipe, initial_state, make_train_step
from lbpwht_jax.weights import BUNDLED, load_bundled

RESULTS = Path(__file__).parent / "results" / "digits.json"


def run(method: str, projection: str, seed: int, folder: Path) -> dict:
    """The result.json of one run of ``lbpwht finetune``."""
    output = folder / f"{method}-{projection}-{seed}"
    arguments = ["--method", method, "--train", "all", "--projection", projection, "--seed", str(seed), "--output", str(output)]
    if lbpwht(["finetune", *arguments]):
        raise SystemExit(f"lbpwht finetune {' '.join(arguments)} failed")
    return json.loads((output / "result.json").read_text())


def interleaved_steps(methods: tuple[str, ...], projection: str, batch_size: int, rounds: int) -> dict[str, float]:
    """Each method's median time of a training step over the first method's. The methods take turns in one process."""
    info, dataset = model_info(BUNDLED), open_dataset("digits")
    shape = info.images.shape
    recipe = Recipe(epochs=1, batch_size=batch_size)
    optimizer = recipe.optimizer(rounds)
    with training_batches(dataset, Loading(batch_size, info.images.size, info.images.channels)) as batches:
        batch = next(batches)
    steps, states, seconds = {}, {}, {method: [] for method in methods}
    base = create_model(BUNDLED, num_classes=len(dataset.classes))
    for method in methods:
        model = adapt(base, parse_method(method, projection=projection).rules(info), jnp.zeros((1, *shape)))
        variables = model.with_branches(jax.random.key(0), load_bundled()[0])
        step = make_train_step(model, info, optimizer, recipe, info.images.size, len(dataset.classes))
        steps[method] = jax.jit(step, donate_argnums=0)
        states[method] = initial_state(variables, optimizer, model.trainable)
    for _ in range(rounds + 1):
        for method, step in steps.items():
            started = time.perf_counter()
            states[method], *_ = jax.block_until_ready(step(states[method], batch))
            seconds[method].append(time.perf_counter() - started)
    medians = {method: statistics.median(values[1:]) for method, values in seconds.items()}
    return {method: median / medians[methods[0]] for method, median in medians.items()}


def table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table: mean and range of accuracy, costs per image, step time over full backpropagation's."""
    rows = [
        "| method | test accuracy, mean (lowest to highest) | backward MFLOPs | MB kept per image | step time over full's |",
        "|---|---|---|---|---|",
    ]
    for method, runs in results["runs"].items():
        accuracy = [100 * run["test_accuracy"] for run in runs]
        rows.append(
            f"| {method} | {statistics.mean(accuracy):.2f} % ({min(accuracy):.2f} to {max(accuracy):.2f}) "
            f"| {runs[0]['backward_flops'] / 1e6:.1f} | {runs[0]['saved_bytes'] / 1e6:.2f} "
            f"| {results['step_ratios'][method]:.2f} |"
        )
    return "\n".join(rows)


def main(
    methods: tuple[str, ...] = ("full", "lp_l1-8", "lp_l1-4", "lp_l1-2"),
    projection: str = "fitted",
    seeds: tuple[int, ...] = (0, 1, 2),
    rounds: int = 40,
    times_only: bool = False,
    output: Path = RESULTS,
) -> None:
    """Runs every method with every seed, the methods in turn, then times their steps.

    Args:
      methods: short names, as for lbpwht finetune; step times are relative to the first one's.
      projection: projection of the low-rank methods.
      seeds: each determines the split, the new head and the shuffling of its runs.
      rounds: number of steps timed per method.
      times_only: keeps the runs in the output file and only times the steps again.
      output: JSON file to write.
    """
    runs: dict[str, list] = {method: [] for method in methods}
    if times_only:
        runs = json.loads(output.read_text())["runs"]
        methods = tuple(runs)
    else:
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
        "step_ratios": interleaved_steps(methods, projection, 64, rounds),
        "runs": runs,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    tyro.cli(main)
