"""What ``lbpwht compile`` predicts for the steps that are timed: the least time that the device's limits allow.

Needs the extra [compile] and no accelerator, so that this part can run on another machine, with ``--output`` naming the file
that it adds to.
"""

import functools
import re

import jax
from accelerator_results import Row, fill, forget, read
from accelerator_settings import DTYPE, Job

from lbpwht_jax.bench import CLASSES
from lbpwht_jax.compile import CompilerError, compile_model

# Names that JAX gives devices, and those of the targets of lbpwht compile; others are found by their own names.
_KINDS = {"tpu v5 lite": "v5e:1x1", "tpu v5e": "v5e:1x1", "tpu v6 lite": "v6e:1x1", "tpu v6e": "v6e:1x1"}
_KINDS |= {"tpu v5p": "v5p:1x1x1", "tpu v5": "v5p:1x1x1", "tpu v4": "v4:1x1x1", "cpu": "cpu:1"}
_PREDICTED = ("roofline_seconds", "compute_seconds", "memory_seconds", "moved_bytes", "flops", "temp_bytes", "attention")


def target_of(device: str) -> str | None:
    """The target of ``lbpwht compile`` that is this device; ``None`` if its name gives none away.

    Args:
      device: as JAX names its kind, such as ``"NVIDIA H100 80GB HBM3"``.
    """
    name = device.lower()
    if name in _KINDS:
        return _KINDS[name]
    model = re.search(r"\b[abh]\d{3}\b", name)
    return model[0] if model and "nvidia" in name else None


def measure(target: str | None, model: str, method: str, batch_size: int) -> Row:
    """One step; what is not predicted is ``None``, with a ``reason``."""
    facts = {"model": model, "method": method, "batch": batch_size, "target": target}
    nothing = dict.fromkeys(_PREDICTED)
    if target is None:
        return {**facts, **nothing, "reason": "no target of lbpwht compile is known for this device; give --target"}
    try:
        [row] = compile_model(model, (method,), target, batch_size, DTYPE, num_classes=CLASSES)
    except (ImportError, ValueError, CompilerError) as error:
        return {**facts, **nothing, "reason": str(error)}
    return {**facts, **{name: getattr(row, name) for name in _PREDICTED}, "reason": None}


def run(job: Job) -> None:
    """Predicts the steps of one model; this process leaves the device alone."""
    settings = job.settings
    forget(job.file, "roofline", lambda row: row.get("reason"))
    target = settings.target or target_of(read(job.file)["device"])
    wanted = {
        f"{job.model} {method}": functools.partial(measure, target, job.model, method, settings.batch_size)
        for method in settings.methods
    }
    facts = {"jax": jax.__version__, "dtype": DTYPE, "batch": settings.batch_size, "target": target}
    fill(job.file, "roofline", facts, wanted, settings.minutes)
