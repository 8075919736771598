"""Times of the backward pass of single layers on the device: those of ``lbpwht bench layers --authors``."""

import dataclasses
import functools
from typing import Any

import jax
from accelerator_results import Row, fill, read
from accelerator_settings import DTYPE, Job, Settings

from lbpwht_jax import lp_l1
from lbpwht_jax.bench import STAGES, TABLE_8, Layer, Limits, measure_layer
from lbpwht_jax.train import keep_freed_memory

LAYERS = TABLE_8 + STAGES


def measure(layer: Layer, r: int, settings: Settings, limits: Limits) -> Row:
    """One layer at one rank; the authors' form is left out where it does not fit the device's memory."""
    specs = {r: lp_l1(r)}
    try:
        [row] = measure_layer(layer, settings.layer_batch, specs, DTYPE, settings.rounds, limits, authors=True)
        return {**dataclasses.asdict(row), "authors_error": None}
    except jax.errors.JaxRuntimeError as error:
        [row] = measure_layer(layer, settings.layer_batch, specs, DTYPE, settings.rounds, limits)
        return {**dataclasses.asdict(row), "authors_error": str(error).strip().splitlines()[0][:300]}


def run(job: Job) -> None:
    """Measures the part."""
    settings, kept = job.settings, keep_freed_memory()
    known = read(job.file)["parts"].get("layers", {}).get("facts", {})
    limits = Limits(**known["limits"]) if known else Limits.measured(DTYPE)
    facts: dict[str, Any] = {"machine": job.machine, "dtype": DTYPE, "batch": settings.layer_batch, "rounds": settings.rounds}
    wanted = {
        f"{layer.inputs}->{layer.outputs} {'x'.join(map(str, layer.grid))} r={r}": functools.partial(
            measure, layer, r, settings, limits
        )
        for layer in LAYERS
        for r in settings.ranks
    }
    fill(job.file, "layers", {**facts, "keeps_freed_memory": kept, "limits": limits._asdict()}, wanted, settings.minutes)
