"""Times of training steps on the device, method by method in turn with full backpropagation."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import accelerator_profile
import jax
from accelerator_processes import begun
from accelerator_results import Row, fill, missing
from accelerator_settings import DTYPE, Job

from lbpwht_jax.bench import ModelSteps, PreparedStep
from lbpwht_jax.train import keep_freed_memory

FULL = "full"


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Steps of one model, each timed in turn with full backpropagation.

    Attributes:
      steps: of the model.
      rounds: number of samples of each time.
      compiled: by their methods, what returns steps that have been compiled before.
    """

    steps: ModelSteps
    rounds: int
    compiled: dict[str, Callable[[], PreparedStep]] = dataclasses.field(default_factory=dict)

    def compile(self, methods: tuple[str, ...]) -> None:
        """Compiles the steps of some methods at the same time, and keeps them."""
        self.compiled.update(begun({method: functools.partial(self.steps.prepare, method) for method in methods}))
        for method in methods:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # raised again where the step is timed
                self.compiled[method]()
                print(f"steps: {self.steps.model} {method}: compiled", flush=True)

    def step(self, method: str) -> PreparedStep:
        """The step of a method, compiled if it has not been."""
        return self.compiled[method]() if method in self.compiled else self.steps.prepare(method)

    @functools.cached_property
    def _full(self) -> PreparedStep | RuntimeError:
        """The error, if the device's memory does not suffice."""
        try:
            step = self.step(FULL)
            step.run()
            return step
        except jax.errors.JaxRuntimeError as error:
            return error

    def measure(self, method: str) -> Row:
        """One method. ``speedup`` and ``full_seconds`` are ``None`` where there is no full backpropagation to compare with."""
        full, steps = self._full, {}
        if isinstance(full, PreparedStep):
            steps[FULL] = full
        elif method == FULL:
            raise full
        if method != FULL:
            steps[method] = self.step(method)
        rows = self.steps.rows(steps, self.rounds)
        row = dataclasses.asdict(rows[-1])
        row["planned_peak_bytes"] = row.pop("peak_bytes")
        if FULL in steps:
            return {**row, "full_seconds": rows[0].seconds}
        return {**row, "speedup": None, "full_seconds": None}


def run(job: Job) -> None:
    """Measures the part for one model."""
    _time(job, _comparison(job))


def run_beside_others(job: Job, all_ready: Any, turn: Any) -> None:
    """Measures the part for one model, and profiles it, beside processes that do so for others.

    Args:
      job: the model's.
      all_ready: the barrier that all processes reach when they have compiled.
      turn: the lock that a process holds while it uses the device.
    """
    comparison = _comparison(job)
    names = {f"{job.model} {method}": method for method in job.settings.methods}
    try:
        comparison.compile(tuple(names[name] for name in missing(job.file, "steps", [*names])))
    finally:
        all_ready.wait()
    with turn:
        _time(job, comparison)
        accelerator_profile.fill_model(job, comparison.step)


def _comparison(job: Job) -> Comparison:
    return Comparison(ModelSteps(job.model, "all", job.settings.batch_size, DTYPE), job.settings.rounds)


def _time(job: Job, comparison: Comparison) -> None:
    settings, kept = job.settings, keep_freed_memory()
    wanted = {f"{job.model} {method}": functools.partial(comparison.measure, method) for method in settings.methods}
    facts = {"machine": job.machine, "dtype": DTYPE, "batch": settings.batch_size, "rounds": settings.rounds}
    fill(job.file, "steps", {**facts, "keeps_freed_memory": kept}, wanted, settings.minutes)
