"""Trains for 20,000 steps with a checkpoint every 100, and watches the process's resident memory.

    python experiments/soak.py

The run is ``lbpwht finetune`` on digits with a batch of 2. It writes experiments/results/soak.json: resident memory over
time, its slope over the second half, whether every step is in the metrics exactly once, and whether the last checkpoint equals
the exported weights.
"""

import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from lbpwht_jax.runs.finished import load_run

RESULTS = Path(__file__).parent / "results" / "soak.json"


def resident_mib(process: int) -> float | None:
    """Resident memory of a process in MiB (Linux); ``None`` once it has ended."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) / 1024
    except (FileNotFoundError, KeyError):
        return None


def main(steps: int = 20_000, batch_size: int = 2, checkpoint_every: int = 100, every: float = 2.0) -> None:
    """Runs the experiment.

    Args:
      steps: least number of steps; whole epochs are trained.
      batch_size: images per step.
      checkpoint_every: steps between checkpoints.
      every: seconds between readings of the memory.
    """
    per_epoch = 1437 // batch_size
    epochs = -(-steps // per_epoch)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = ["--epochs", str(epochs), "--batch-size", str(batch_size), "--checkpoint-every", str(checkpoint_every)]
        options += ["--method", "lp_l1-2", "--lr", "1e-4"]
        started, samples = time.time(), []
        arguments = [sys.executable, "-m", "lbpwht_jax.cli", "finetune", *options, "--output", str(run)]
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                memory = resident_mib(process.pid)
                size = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
                if memory is not None:
                    samples.append({"seconds": round(time.time() - started, 1), "mib": round(memory, 1), "metrics_bytes": size})
                time.sleep(every)
        if process.returncode:
            raise SystemExit(f"the run ended with {process.returncode}")
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        numbers = [event["number"] for event in events if event["kind"] == "step"]
        final, last = load_run(run), load_run(run, "last")
        same = all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (final.variables, last.variables)), strict=True))
        kept = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
        tests = [event["test_accuracy"] for event in events if event["kind"] == "epoch"]
    # while it trains: metrics grow
    training = [s for a, s in itertools.pairwise(samples) if s["metrics_bytes"] > a["metrics_bytes"]]
    half = training[len(training) // 2 :]
    done = [s["metrics_bytes"] / training[-1]["metrics_bytes"] * len(numbers) for s in half]
    slope = np.polyfit(done, [s["mib"] for s in half], 1)[0] * 1000
    results = {
        "command": "python experiments/soak.py",
        "options": options,
        "steps": len(numbers),
        "every_step_once": numbers == list(range(1, epochs * per_epoch + 1)),
        "checkpoints_written": len(numbers) // checkpoint_every + epochs,
        "checkpoints_kept": kept,
        "last_checkpoint_is_the_export": same,
        "test_accuracy": tests[-1],
        "resident_mib": {"at_half": half[0]["mib"], "at_end": half[-1]["mib"], "most": max(s["mib"] for s in training)},
        "mib_per_1000_steps_second_half": round(float(slope), 3),
        "seconds": round(samples[-1]["seconds"]),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores",
        "samples": training[:: max(len(training) // 100, 1)],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({name: value for name, value in results.items() if name != "samples"}, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
