"""Benchmarks: the time that low rank saves in a layer and in a training step, and how far that is from the limit.

Names are loaded on first use: ``timing`` serves rooms that run without what training needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_NAMES = {
    "layer": ("STAGES", "TABLE_8", "Layer", "LayerRow", "Limits", "measure_layer"),
    "model_steps": ("CLASSES", "ModelSteps", "PreparedStep", "StepRow"),
    "timing": ("interleaved", "machine"),
}
_MODULE = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
