"""Ends a training run at random moments, resumes it, and compares it with one that was left alone, bit for bit.

    python experiments/kill_and_resume.py

Half of the runs get SIGTERM at a random step, the others are killed (SIGKILL) while a checkpoint is being written; each is
then resumed and must give the same losses, accuracies and gradient norms and the same weights. It prints a table and writes
experiments/results/kill_and_resume.json.
"""

import dataclasses
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from lbpwht_jax.weights.files import read_safetensors

RESULTS = Path(__file__).parent / "results" / "kill_and_resume.json"
_STOPPED = 3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one run was ended, the last step it had written, the step it went on after, and whether it equals the other run."""

    signal: str
    exit_code: int
    last_step_written: int
    unfinished_checkpoint: bool
    resumed_after: int
    same_metrics: bool
    same_weights: bool


def command(*arguments: str) -> list[str]:
    """The command ``lbpwht finetune`` with these arguments."""
    return [sys.executable, "-m", "lbpwht_jax.cli", "finetune", *arguments]


def metrics(run: Path) -> list[dict]:
    """The lines of the run's metrics.jsonl, without times."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # cut off by the kill
            break
        event.pop("seconds", None)
        events.append(event)
    return events


def steps(run: Path) -> int:
    """The last step written."""
    return max((event["number"] for event in metrics(run) if event["kind"] == "step"), default=0)


def being_written(run: Path) -> bool:
    """Whether there is an unfinished checkpoint."""
    folder = run / "checkpoints"
    try:
        return folder.exists() and any("tmp" in path.name for path in (*folder.iterdir(), *folder.glob("*/*")))
    except FileNotFoundError:  # renamed meanwhile
        return False


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether two sets of tensors are equal, bit for bit."""
    return first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)


def end(process: subprocess.Popen, run: Path, number: signal.Signals, step: int, delay: float) -> tuple[int, int, bool]:
    """Sends the signal once the step is written and, for SIGKILL, a checkpoint is being written.

    Returns:
      The exit code, the last step written, and whether a checkpoint was left unfinished.
    """
    while process.poll() is None and steps(run) < step:
        time.sleep(0.02)
    while number == signal.SIGKILL and process.poll() is None and not being_written(run):
        pass
    time.sleep(delay)
    process.send_signal(number)
    code = process.wait()
    return code, steps(run), being_written(run)


def main(runs: int = 10, epochs: int = 3, batch_size: int = 32, checkpoint_every: int = 10, seed: int = 0) -> None:
    """Runs the experiment.

    Args:
      runs: number of runs ended and resumed, half by SIGTERM, half by SIGKILL.
      epochs: epochs of each run.
      batch_size: images per step.
      checkpoint_every: steps between checkpoints.
      seed: determines the moments at which runs are ended.
    """
    draw = random.Random(seed)
    options = ["--epochs", str(epochs), "--batch-size", str(batch_size), "--checkpoint-every", str(checkpoint_every)]
    options += ["--method", "lp_l1-2", "--shift", "1", "--ema", "0.9"]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        subprocess.run(command(*options, "--output", str(whole)), check=True, stdout=subprocess.DEVNULL)
        total, wanted = steps(whole), metrics(whole)
        weights, _ = read_safetensors(whole / "weights.safetensors")
        outcomes = []
        for i in range(runs):
            run, number = Path(folder) / f"run{i}", (signal.SIGTERM, signal.SIGKILL)[i % 2]
            step = draw.randrange(1, total - checkpoint_every - 1)
            delay = draw.uniform(0, 0.05 if number == signal.SIGKILL else 0.5)
            with subprocess.Popen(
                command(*options, "--output", str(run)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as process:
                code, last, unfinished = end(process, run, number, step, delay)
            if code not in (_STOPPED, -signal.SIGKILL):
                raise SystemExit(f"run {i} ended with {code}, not by the signal")
            resumed = subprocess.run(
                command("--resume", str(run), "--checkpoint-every", str(checkpoint_every)), capture_output=True, text=True
            )
            if resumed.returncode:
                raise SystemExit(f"run {i} could not be resumed: {resumed.stderr}")
            after = resumed.stdout.partition("going on after step ")[2].split()
            outcomes.append(
                Outcome(
                    number.name,
                    code,
                    last,
                    unfinished,
                    int(after[0]) if after else 0,
                    metrics(run) == wanted,
                    same(read_safetensors(run / "weights.safetensors")[0], weights),
                )
            )
            print(outcomes[-1], flush=True)
    results = {
        "command": "python experiments/kill_and_resume.py",
        "options": options,
        "steps": total,
        "seed": seed,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores",
        "runs": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print("| ended by | last step written | checkpoint unfinished | resumed after step | same metrics | same weights |")
    print("|---|---|---|---|---|---|")
    for each in outcomes:
        print(
            f"| {each.signal} | {each.last_step_written} of {total} | {each.unfinished_checkpoint} | {each.resumed_after} "
            f"| {each.same_metrics} | {each.same_weights} |"
        )
    if not all(each.same_metrics and each.same_weights for each in outcomes):
        raise SystemExit("not every resumed run equals the one left alone")


if __name__ == "__main__":
    tyro.cli(main)
