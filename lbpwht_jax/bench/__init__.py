"""Benchmarks: the time that low rank saves in a layer and in a training step, and how far that is from the limit."""

from lbpwht_jax.bench.layer import STAGES, TABLE_8, Layer, LayerRow, Limits, measure_layer
from lbpwht_jax.bench.model_steps import CLASSES, ModelSteps, PreparedStep, StepRow
from lbpwht_jax.bench.timing import interleaved, machine

__all__ = [
    "CLASSES",
    "STAGES",
    "TABLE_8",
    "Layer",
    "LayerRow",
    "Limits",
    "ModelSteps",
    "PreparedStep",
    "StepRow",
    "interleaved",
    "machine",
    "measure_layer",
]
