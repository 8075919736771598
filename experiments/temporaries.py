"""What compiled steps hold besides what is kept for the backward pass, with blocks one by one and in loops.

    python experiments/temporaries.py

compiles training steps of 16 images in float32 for this machine's CPU, and writes experiments/results/temporaries.json after
each model. A run that was cut off goes on where it was.
"""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from results_costs import held_cells
from rich.console import Console
from rich.table import Table

from lbpwht_jax.adaptation import AdaptedModule
from lbpwht_jax.bench.program import measured_model
from lbpwht_jax.compile import compile_model
from lbpwht_jax.cost import abstract_variables, residual_bytes
from lbpwht_jax.models import model_info
from lbpwht_jax.models.blocks import ResidualBlock
from lbpwht_jax.runs.folder import write_json

RESULTS = Path(__file__).parent / "results" / "temporaries.json"
MODELS = ("efficientformer_l1", "vit_small_patch16_224", "swinv2_tiny_window8_256", "efficientformerv2_s0")
METHODS = (
    "full",
    "full+remat",
    "full+remat+scan",
    "lp_l1-4",
    "lp_l1-4+scan",
    "lp_l1-4+lean",
    "lp_l1-4+lean+scan",
    "lp_l1-4+tiny+scan",
)
CLASSES = 100
HEADINGS = ("model", "method", "kept MiB", "gradients", "a block", "held MiB", "of the sum", "of full")


class Within(nn.Module):
    """A block at its path in a model, without the rest of the model."""

    names: tuple[str, ...]
    block: ResidualBlock

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The block's output."""
        name, *rest = self.names
        if rest:
            return Within(tuple(rest), self.block, name=name)(x)
        return self.block.clone(name=name, parent=self)(x, False)


def block_bytes(model: AdaptedModule, batch: int) -> int:
    """The most bytes that the compiled forward and backward pass of one block alone holds."""
    module = model.module
    images = jax.ShapeDtypeStruct((batch, module.image_size, module.image_size, 3), jnp.float32)
    inputs: dict[tuple[str, ...], tuple[ResidualBlock, jax.ShapeDtypeStruct]] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        block = context.module
        if isinstance(block, ResidualBlock) and context.method_name == "__call__":
            inputs[block.path] = block.clone(parent=None, name=None), jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(module.init, jax.random.key(0), images)
    most = 0
    for path, (block, x) in inputs.items():
        alone = Within(path, block)

        def loss(params: Any, others: Any, x: jax.Array, alone: nn.Module = alone) -> jax.Array:
            with nn.intercept_methods(model.intercept):
                y: Any = alone.apply({"params": params, **others}, x)
            return jnp.sum(y)

        variables = dict(jax.eval_shape(alone.init, jax.random.key(0), x))
        step: Any = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(variables.pop("params"), variables, x).compile()
        most = max(most, step.memory_analysis().temp_size_in_bytes)
    return most


def measure(name: str, method: str, batch: int) -> dict[str, Any]:
    """A method's row: all in bytes, of the whole batch."""
    model, shape = measured_model(name, method, num_classes=CLASSES), model_info(name).images.shape
    variables = abstract_variables(model, shape)
    return {
        "model": name,
        "method": method,
        "batch_size": batch,
        "kept": batch * residual_bytes(model, variables, shape),
        "gradients": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables["params"])),
        "block": block_bytes(model, batch),
        "held": compile_model(name, (method,), "cpu:1", batch, num_classes=CLASSES)[0].temp_bytes,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Each method beside full backpropagation."""
    made = Table()
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for row in rows:
        made.add_row(*held_cells(row, rows))
    return made


def main(
    models: tuple[str, ...] = MODELS, methods: tuple[str, ...] = METHODS, batch_size: int = 16, output: Path = RESULTS
) -> None:
    """Compiles and writes the table.

    Args:
      models: names.
      methods: short names, as for lbpwht bench step; the first is full.
      batch_size: images.
      output: JSON.
    """
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    known = {(row["model"], row["method"]) for row in rows}
    console = Console(width=140)
    for name in models:
        for method in methods:
            if (name, method) not in known:
                rows.append(measure(name, method, batch_size))
                facts = {"command": "python experiments/temporaries.py", "jax": jax.__version__}
                write_json(output, {**facts, "rows": rows})
    console.print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
