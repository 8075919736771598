"""Times tracing, compilation and a step, forward and backward, of whole models on random images.

    python experiments/compile_times.py

prints a row a model and method, and fails if a second call with the same shapes compiles again.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

from lbpwht_jax import create_model
from lbpwht_jax.adaptation.linen import adapt
from lbpwht_jax.adaptation.presets import parse_method
from lbpwht_jax.models import model_info


def measure(name: str, method: str, batch_size: int, steps: int) -> tuple[float, float, float]:
    """Seconds of tracing and lowering, of compiling, and the median of a step."""
    info = model_info(name)
    base = create_model(name, num_classes=100, frozen_batch_norm=True)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(batch_size, info.images.size, info.images.size, info.images.channels)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 100, batch_size), jnp.int32)
    model = adapt(base, parse_method(method).rules(info), images)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype) ** 2, shapes)
    params, others = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}
    traces = 0

    def loss(params, images, labels):
        nonlocal traces
        traces += 1
        logits = model.apply({"params": params, **others}, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits, jnp.float32), labels).mean()

    step = jax.jit(jax.value_and_grad(loss))
    started = time.perf_counter()
    lowered = step.lower(params, images, labels)
    traced = time.perf_counter() - started
    lowered.compile()
    compiled = time.perf_counter() - started - traced
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        jax.block_until_ready(step(params, images, labels))
        seconds.append(time.perf_counter() - started)
    if traces != 1:
        raise SystemExit(f"{name}, {method}: traced {traces} times for one shape")
    return traced, compiled, statistics.median(seconds[1:])


def main(
    models: tuple[str, ...] = ("efficientformer_l1", "swinv2_tiny_window8_256"),
    methods: tuple[str, ...] = ("full", "lp_l1-4"),
    batch_size: int = 4,
    steps: int = 5,
) -> None:
    """Prints the table.

    Args:
      models: names of lbpwht models.
      methods: short names, as for lbpwht finetune.
      batch_size: images a step.
      steps: counted, after one that is not.
    """
    table = Table(title=f"batch {batch_size}, float32, {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    for column in ("model", "method", "trace (s)", "compile (s)", "median step (s)"):
        table.add_column(column)
    for name in models:
        for method in methods:
            table.add_row(name, method, *(f"{value:.2f}" for value in measure(name, method, batch_size, steps)))
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
