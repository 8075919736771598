"""Times of training steps on the device, method by method in turn with full backpropagation."""

import dataclasses
import functools

import jax
from accelerator_results import Row, fill
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
    """

    steps: ModelSteps
    rounds: int

    @functools.cached_property
    def _full(self) -> PreparedStep | RuntimeError:
        """The error, if the device's memory does not suffice."""
        try:
            step = self.steps.prepare(FULL)
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
            steps[method] = self.steps.prepare(method)
        rows = self.steps.rows(steps, self.rounds)
        row = dataclasses.asdict(rows[-1])
        row["planned_peak_bytes"] = row.pop("peak_bytes")
        if FULL in steps:
            return {**row, "full_seconds": rows[0].seconds}
        return {**row, "speedup": None, "full_seconds": None}


def run(job: Job) -> None:
    """Measures the part for one model."""
    settings, kept = job.settings, keep_freed_memory()
    comparison = Comparison(ModelSteps(job.model, "all", settings.batch_size, DTYPE), settings.rounds)
    wanted = {f"{job.model} {method}": functools.partial(comparison.measure, method) for method in settings.methods}
    facts = {"machine": job.machine, "dtype": DTYPE, "batch": settings.batch_size, "rounds": settings.rounds}
    fill(job.file, "steps", {**facts, "keeps_freed_memory": kept}, wanted, settings.minutes)
