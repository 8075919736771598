"""Bytes kept for the backward pass and FLOPs of its products, by method, with and without ``jax.checkpoint`` on the blocks.

    python experiments/saved_bytes.py

reproduces results/saved_bytes.json and prints it as Markdown. With recomputation the bytes are those kept between the blocks;
what a block keeps comes back while that block is backpropagated, and the forward pass is charged once more.
"""

import dataclasses
import json
from pathlib import Path

import tyro

from lbpwht_jax.adaptation.presets import adapted_model
from lbpwht_jax.cost.backward import abstract_variables, backward_flops, residual_bytes
from lbpwht_jax.cost.report import layer_costs
from lbpwht_jax.models import model_info

RESULTS = Path(__file__).parent / "results" / "saved_bytes.json"


def count(model: str, method: str, classes: int = 100) -> dict:
    """Both counts of a method, an image, in float32."""
    info = model_info(model)
    shape = info.images.shape
    adapted = adapted_model(model, method, num_classes=classes)
    recomputed = dataclasses.replace(adapted, module=adapted.module.clone(remat=True))
    variables = abstract_variables(adapted, shape)
    return {
        "model": model,
        "method": method,
        "layers_mb": sum(layer.saved_activation_bytes for layer in layer_costs(adapted, variables, shape)) / 1e6,
        "model_mb": residual_bytes(adapted, variables, shape) / 1e6,
        "backward_mflops": backward_flops(adapted, variables, shape) / 1e6,
        "remat_model_mb": residual_bytes(recomputed, variables, shape) / 1e6,
        "remat_backward_mflops": backward_flops(recomputed, variables, shape) / 1e6,
    }


def main(
    models: tuple[str, ...] = ("efficientformer_l1", "vit_tiny_patch16_224"),
    methods: tuple[str, ...] = ("full", "lp_l1-2", "lp_l1-4", "lp_l1-8", "lora_all-8", "lp_l1-4+lora_all-8"),
    output: Path = RESULTS,
) -> None:
    """Counts every method on every model.

    Args:
      models: their names.
      methods: short names, as for lbpwht cost.
      output: JSON file to write.
    """
    rows = [count(model, method) for model in models for method in methods]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"command": "python experiments/saved_bytes.py", "rows": rows}, indent=2) + "\n")
    print("| model | method | MB kept: layers | whole model | + remat | backward MFLOPs | + remat |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['model']} | {row['method']} "
            f"| {row['layers_mb']:.2f} | {row['model_mb']:.2f} | {row['remat_model_mb']:.2f} "
            f"| {row['backward_mflops']:.1f} | {row['remat_backward_mflops']:.1f} |"
        )


if __name__ == "__main__":
    tyro.cli(main)
