"""Times and kept bytes of convolutional networks in plain Flax, and of the same ones under the rule ``Lean``, on a CPU.

    python experiments/lean_convolutions.py

writes experiments/results/lean_convolutions.json. A step here is the forward and the backward pass, all parameters trained.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

from lbpwht_jax import Lean, adapt
from lbpwht_jax.bench.timing import interleaved, machine
from lbpwht_jax.cost import residual_bytes
from lbpwht_jax.runs.folder import write_json

RESULTS = Path(__file__).parent / "results" / "lean_convolutions.json"
SIZE, CLASSES = 224, 10
PATTERN = "conv"


class Separable(nn.Module):
    """Depthwise 3x3 and pointwise convolutions in turn, as in MobileNet (arXiv 1704.04861)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """``[batch, height, width, 3]`` to logits."""
        x = nn.relu(nn.Conv(32, (3, 3), (2, 2), name="conv_stem")(x))
        for i, (channels, stride) in enumerate([(32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)]):
            window: dict[str, Any] = {"strides": (stride, stride), "feature_group_count": x.shape[-1]}
            x = nn.relu(nn.Conv(x.shape[-1], (3, 3), **window, name=f"conv_depthwise_{i}")(x))
            x = nn.relu(nn.Conv(channels, (1, 1), name=f"pointwise_{i}")(x))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Wide(nn.Module):
    """Patches, then blocks of a depthwise 7x7 convolution and an MLP, as in ConvNeXt (arXiv 2201.03545)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """``[batch, height, width, 3]`` to logits."""
        x = nn.Conv(96, (4, 4), (4, 4), name="conv_stem")(x)
        for i in range(3):
            y = nn.LayerNorm(name=f"norm_{i}")(nn.Conv(96, (7, 7), feature_group_count=96, name=f"conv_depthwise_{i}")(x))
            x = x + nn.Dense(96, name=f"fc2_{i}")(nn.gelu(nn.Dense(384, name=f"fc1_{i}")(y)))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


def measure(model: nn.Module, batch: int, rounds: int) -> dict[str, Any]:
    """A network's row."""
    images = jax.random.normal(jax.random.key(0), (batch, SIZE, SIZE, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    models: dict[str, Any] = {"plain Flax": model}
    models |= {f"Lean, {setting}": adapt(model, [Lean(PATTERN, setting)], images) for setting in ("exact", "lean")}

    def step(model: Any) -> Any:
        gradient = jax.jit(jax.value_and_grad(lambda variables, images: jnp.sum(model.apply(variables, images) ** 2)))
        return lambda: gradient(variables, images)

    return {
        "model": type(model).__name__,
        "seconds": interleaved({name: step(each) for name, each in models.items()}, rounds),
        "kept_bytes": {name: residual_bytes(each, variables, (SIZE, SIZE, 3)) for name, each in models.items()},
    }


def main(batch: int = 8, rounds: int = 9, output: Path = RESULTS) -> None:
    """Measures both networks.

    Args:
      batch: images.
      rounds: samples of each time; the medians count.
      output: JSON.
    """
    rows = [measure(model, batch, rounds) for model in (Separable(), Wide())]
    print(*rows, sep="\n")
    write_json(output, {"batch": batch, "rounds": rounds, "dtype": "float32", "machine": machine(), "rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
