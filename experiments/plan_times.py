"""How long planning takes, beside training steps of full backpropagation.

    python experiments/plan_times.py

times plans from random images, for the model that comes with the package and for a ViT-S, and writes
experiments/results/plan_times.json.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lbpwht_jax.adaptation import AdaptedModule, adapted_model
from lbpwht_jax.bench import CLASSES, ModelSteps, interleaved, machine
from lbpwht_jax.models import model_info
from lbpwht_jax.plan import plan
from lbpwht_jax.runs.folder import write_json

RESULTS = Path(__file__).parent / "results" / "plan_times.json"
MODELS = {"vit_micro_patch4_28": 32, "vit_small_patch16_224": 8}
STEPS = 20


def timed(model: AdaptedModule, variables: Any, batches: list, budget: str) -> tuple[float, float]:
    """Seconds of the backward passes that measure, compiled first, and of what follows."""
    moments = []
    plan(model, variables, batches, budget, progress=lambda _: moments.append(time.perf_counter()))
    first, second = moments
    return second - first, time.perf_counter() - second


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """The times of one model."""
    step = ModelSteps(name, "all", batch).prepare("full")
    seconds = interleaved({"": step.run}, rounds)[""]
    model = adapted_model(name, "lp_l1-4", num_classes=CLASSES)
    edge, channels = model.module.image_size, model_info(name).images.channels
    rng = np.random.default_rng(0)
    batches = [
        (jnp.asarray(rng.normal(size=(batch, edge, edge, channels)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, batch)))
        for _ in range(4)
    ]
    variables = jax.jit(model.init)(jax.random.key(0), batches[0][0][:1])
    one, _ = timed(model, variables, batches[:1], "flops=0.3")
    four, choosing = timed(model, variables, batches, "flops=0.3")
    _, layers = timed(model, variables, batches[:2], "seconds=0.6")
    row = {
        "model": name,
        "batch": batch,
        "twenty_steps": STEPS * seconds,
        "batch_measured": (four - one) / 3,
        "two_batches": one + (four - one) / 3,
        "choosing": choosing,
        "timing_layers_and_choosing": layers,
    }
    print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    return row


def main(rounds: int = 5) -> None:
    """Measures each model.

    Args:
      rounds: samples of a step's time; the median counts.
    """
    rows = [measure(name, batch, rounds) for name, batch in MODELS.items()]
    write_json(RESULTS, {"machine": machine(), "dtype": "float32", "rounds": rounds, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
