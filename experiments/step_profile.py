"""Training steps on a CPU beside PyTorch's: whole ones in turn, and where each spends its time.

    python experiments/step_profile.py        needs the extra [parity]

writes experiments/results/step_profile.json after each model. A run that was cut off goes on where it was. PyTorch's steps are
timm's models with AdamW in float32, in both memory layouts; all steps see the same shapes and clip gradients alike.
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import torch  # pyright: ignore[reportMissingImports]
import tyro
from step_profile_jax import operations
from step_profile_torch import TIMM, TorchStep, torch_operations

from lbpwht_jax.bench import ModelSteps
from lbpwht_jax.bench.model_steps import CLASSES, PreparedStep
from lbpwht_jax.bench.timing import interleaved, machine
from lbpwht_jax.models import model_info
from lbpwht_jax.runs.folder import write_json
from lbpwht_jax.train.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "step_profile.json"
BATCHES = {
    "efficientformer_l1": 16,
    "efficientformerv2_s0": 16,
    "vit_small_patch16_224": 8,
    "swinv2_tiny_window8_256": 8,
}
METHODS = ("full", "lp_l1-4", "lp_l1-4+lean")
LAYOUTS = {"PyTorch": False, "PyTorch, channels last": True}
DEAREST = 8


def finished(step: PreparedStep) -> None:
    """One step, waited for."""
    jax.block_until_ready(step.run())


def by_kind(times: dict[tuple[str, str], float]) -> dict[str, float]:
    """Seconds of each kind of operation, the most first, from those of each operation and shape."""
    sums: dict[str, float] = defaultdict(float)
    for (kind, _), seconds in times.items():
        sums[kind] += seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def dearest(times: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """The operations and shapes that take the most time."""
    chosen = sorted(times, key=lambda key: -times[key])[:DEAREST]
    return [{"kind": kind, "operation": operation, "seconds": times[kind, operation]} for kind, operation in chosen]


def measure(name: str, methods: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """A model's row: seconds of each step, and of the operations of PyTorch's faster layout and of two of our methods."""
    batch, size = BATCHES[name], model_info(name).images.size
    steps = ModelSteps(name, batch_size=batch)
    theirs = {layout: TorchStep(name, batch, size, CLASSES, last) for layout, last in LAYOUTS.items()}
    ours = {method: steps.prepare(method) for method in methods}
    functions = {**theirs, **{method: lambda step=step: finished(step) for method, step in ours.items()}}
    seconds = interleaved(functions, rounds)
    best = min(LAYOUTS, key=lambda layout: seconds[layout])
    profiles = {best: torch_operations(theirs[best], rounds)}
    profiles |= {method: operations(ours[method], rounds) for method in methods[:2]}
    return {
        "model": name,
        "batch": batch,
        "seconds": seconds,
        "best": best,
        "kinds": {step: by_kind(times) for step, times in profiles.items()},
        "dearest": {step: dearest(times) for step, times in profiles.items()},
    }


def main(
    models: tuple[str, ...] = tuple(BATCHES),
    methods: tuple[str, ...] = METHODS,
    rounds: int = 5,
    output: Path = RESULTS,
) -> None:
    """Times and profiles steps.

    Args:
      models: names, of those with a batch size here.
      methods: short names, as for lbpwht bench step; the first two are profiled.
      rounds: samples of each time; the medians count.
      output: JSON.
    """
    keep_freed_memory()
    torch.set_num_threads(os.cpu_count() or 1)
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    known = {row["model"] for row in rows}
    facts = {"command": "python experiments/step_profile.py", "rounds": rounds, "dtype": "float32"}
    versions = {"torch": torch.__version__, "timm": TIMM}
    for name in models:
        if name not in known:
            rows.append(measure(name, methods, rounds))
            write_json(output, {**facts, "machine": {**machine(), **versions}, "rows": rows})
            jax.clear_caches()
            print(json.dumps(rows[-1], indent=1), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
