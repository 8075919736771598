"""The most memory of the device that a training step really takes: a process for each step, which runs nothing else."""

import functools
from pathlib import Path

import jax
from accelerator_processes import begun, in_a_process
from accelerator_results import Row, fill, missing
from accelerator_settings import DTYPE, Job

from lbpwht_jax.bench import ModelSteps

NOT_TOLD = "the device does not tell"
COMPILING = "compiling the step took more memory than running it"


def peak(model: str, method: str, batch_size: int) -> Row:
    """Runs two steps; to be called in a fresh process.

    ``peak_bytes`` are those in use at most, state and images included, or ``None`` with a ``reason``. ``state_bytes`` are in
    use between steps.
    """
    step = ModelSteps(model, "all", batch_size, DTYPE).prepare(method)
    facts = {"model": model, "method": method, "batch": batch_size, "planned_peak_bytes": step.peak_bytes}
    [device] = jax.local_devices()[:1]
    before = (device.memory_stats() or {}).get("peak_bytes_in_use")
    for _ in range(2):
        jax.block_until_ready(step.run())
    after = device.memory_stats() or {}
    if before is None:
        return {**facts, "peak_bytes": None, "state_bytes": None, "reason": NOT_TOLD}
    if after["peak_bytes_in_use"] <= before:
        return {**facts, "peak_bytes": None, "state_bytes": after["bytes_in_use"], "reason": COMPILING}
    return {**facts, "peak_bytes": after["peak_bytes_in_use"], "state_bytes": after["bytes_in_use"], "reason": None}


def measure(cache: Path, model: str, method: str, batch_size: int) -> Row:
    """One step, once more from the cache of compiled programs if compiling it took the most memory."""
    row = in_a_process(cache, peak, model, method, batch_size)
    return in_a_process(cache, peak, model, method, batch_size) if row["reason"] == COMPILING else row


def run(job: Job) -> None:
    """Measures the part for one model; this process leaves the device alone."""
    settings, cache = job.settings, (job.settings.work / "compiled").resolve()
    wanted = {
        f"{job.model} {method}": functools.partial(measure, cache, job.model, method, settings.batch_size)
        for method in settings.methods
    }
    if settings.side_by_side:
        wanted |= begun({name: wanted[name] for name in missing(job.file, "memory", [*wanted])})
    facts = {"machine": job.machine, "dtype": DTYPE, "batch": settings.batch_size}
    fill(job.file, "memory", facts, wanted, settings.minutes)
