"""A profile of training steps on the device: the kernels that take the most time."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from accelerator_results import Row, fill
from accelerator_settings import DTYPE, Job
from jax.profiler import ProfileData

from lbpwht_jax.bench import ModelSteps, PreparedStep

METHODS = ("full", "lp_l1-4", "lp_l1-4+lean")
STEPS, DEAREST = 5, 10


def kernel_events(profile: Any) -> Iterator[tuple[str, str, float]]:
    """What ran on the first device: each kernel's name, the operation of the compiled program it is of, and its seconds.

    A TPU's plane has a line of operations beside lines of steps and programs, which contain these; a GPU's has a line for each
    stream. XLA's CPU backend marks its operations among what the host's threads do.
    """
    planes = sorted((plane for plane in profile.planes if plane.name.startswith("/device:")), key=lambda plane: plane.name)
    planes = [plane for plane in planes if any(True for line in plane.lines for _ in line.events)]
    if planes:
        lines = list(planes[0].lines)
        chosen = (
            [line for line in lines if line.name == "XLA Ops"] or [line for line in lines if "Stream" in line.name] or lines
        )
    else:
        chosen = [line for plane in profile.planes if plane.name == "/host:CPU" for line in plane.lines]
    for line in chosen:
        for event in line.events:
            operation = dict(event.stats).get("hlo_op")
            if planes or operation is not None:
                yield event.name, str(operation or ""), event.duration_ns / 1e9


def dearest(profile: Any, steps: int) -> dict[str, Any]:
    """The time of all kernels, and of the dearest ones by name; seconds and runs are those of one step.

    Args:
      profile: a ``jax.profiler.ProfileData`` of some steps.
      steps: how many.
    """
    seconds, runs, operations = defaultdict(float), defaultdict(int), defaultdict(set)
    for name, operation, taken in kernel_events(profile):
        seconds[name] += taken / steps
        runs[name] += 1
        operations[name] |= {operation} - {""}
    total = sum(seconds.values())
    kernels = [
        {
            "name": name,
            "operations": sorted(operations[name])[:3],
            "runs": runs[name] / steps,
            "seconds": seconds[name],
            "share": seconds[name] / total,
        }
        for name in sorted(seconds, key=lambda name: -seconds[name])[:DEAREST]
    ]
    return {"kernel_seconds": total, "different_kernels": len(seconds), "kernels": kernels}


def measure(step: PreparedStep, model: str, method: str, batch_size: int) -> Row:
    """Profiles some runs of one step."""
    jax.block_until_ready(step.run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                jax.block_until_ready(step.run())
        [trace] = Path(folder).rglob("*.xplane.pb")
        profile = ProfileData.from_serialized_xspace(trace.read_bytes())
    return {"model": model, "method": method, "batch": batch_size, "steps": STEPS, **dearest(profile, STEPS)}


def run(job: Job) -> None:
    """Measures the part for one model."""
    fill_model(job, ModelSteps(job.model, "all", job.settings.batch_size, DTYPE).prepare)


def fill_model(job: Job, step: Callable[[str], PreparedStep]) -> None:
    """Measures the part for one model.

    Args:
      job: the model's.
      step: returns the step of a method.
    """
    settings = job.settings

    def measured(method: str) -> Callable[[], Row]:
        return lambda: measure(step(method), job.model, method, settings.batch_size)

    wanted = {f"{job.model} {method}": measured(method) for method in METHODS if method in settings.methods}
    facts = {"machine": job.machine, "dtype": DTYPE, "batch": settings.batch_size}
    fill(job.file, "profile", facts, wanted, settings.minutes)
