"""How long planning takes beside training, and what blocks cost that keep the same functions as their neighbours.

    python experiments/plan_times.py

makes plans from random images, for the model that comes with the package and for a ViT-S, beside steps of full
backpropagation, and writes experiments/results/plan_times.json.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lbpwht_jax.adaptation import AdaptedModule, Plan, adapted_model
from lbpwht_jax.bench import CLASSES, ModelSteps, machine
from lbpwht_jax.models import model_info
from lbpwht_jax.plan import plan
from lbpwht_jax.runs.folder import write_json

RESULTS = Path(__file__).parent / "results" / "plan_times.json"
MODELS = {"vit_micro_patch4_28": 32, "vit_small_patch16_224": 8}
BUDGET, SECONDS = "flops=0.3", "seconds=0.6"
BATCHES = 2


def timed(model: AdaptedModule, variables: Any, batches: list, budget: str, **fields: Any) -> tuple[Plan, dict[str, float]]:
    """A plan; seconds until gradients were measured, and of what follows."""
    moments = [time.perf_counter()]
    made = plan(model, variables, batches, budget, progress=lambda _: moments.append(time.perf_counter()), **fields)
    return made, {"measuring": moments[2] - moments[0], "rest": time.perf_counter() - moments[2]}


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """The times of one model."""
    steps = ModelSteps(name, "all", batch)
    begun = time.perf_counter()
    prepared = {"full": steps.prepare("full")}
    compiling = time.perf_counter() - begun
    model = adapted_model(name, "lp_l1-4", num_classes=CLASSES)
    edge, channels = model.module.image_size, model_info(name).images.channels
    rng = np.random.default_rng(0)
    batches = [
        (jnp.asarray(rng.normal(size=(batch, edge, edge, channels)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, batch)))
        for _ in range(BATCHES)
    ]
    variables = jax.jit(model.init)(jax.random.key(0), batches[0][0][:1])
    free, times = timed(model, variables, batches, BUDGET)
    _, clocked = timed(model, variables, batches, SECONDS)
    alike, _ = timed(model, variables, batches, BUDGET, same_within_stage=True)
    with tempfile.TemporaryDirectory() as folder:
        for label, made in (("free", free), ("alike", alike)):
            file = Path(folder) / f"{label}.json"
            dataclasses.replace(made, model=name, image_size=edge, train="all").save(file)
            for end in ("", "+scan"):
                prepared[label + end] = steps.prepare(f"plan:{file}{end}")
    rows = steps.rows(prepared, rounds)
    losses = {"free": free.loss, "alike": alike.loss}
    row = {
        "model": name,
        "batch": batch,
        "compiling_a_step": compiling,
        "step": rows[0].seconds,
        "measuring": times["measuring"],
        "choosing": times["rest"],
        "timing_layers_and_choosing": clocked["rest"],
        "plans": [
            {
                "plan": row.method,
                "loss": losses[row.method.removesuffix("+scan")],
                "backward_flops": row.backward_flops,
                "saved_bytes": row.saved_bytes,
                "seconds": row.seconds,
            }
            for row in rows[1:]
        ],
    }
    print(row, flush=True)
    return row


def main(rounds: int = 7) -> None:
    """Measures each model.

    Args:
      rounds: samples of a step's time; the median counts.
    """
    rows = [measure(name, batch, rounds) for name, batch in MODELS.items()]
    facts = {"machine": machine(), "dtype": "float32", "rounds": rounds, "batches": BATCHES, "budget": BUDGET}
    write_json(RESULTS, {**facts, "seconds_budget": SECONDS, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
