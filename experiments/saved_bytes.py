"""Bytes kept for the backward pass and FLOPs of its products, by method and by what a model is told to keep.

    python experiments/saved_bytes.py

writes results/saved_bytes.json and prints it as Markdown. With recomputation, the bytes are those kept between the blocks: each
block's own are made again while that block is backpropagated (``jax.checkpoint``), which costs one more forward pass.
"""

import json
from pathlib import Path

import tyro

from lbpwht_jax.adaptation import adapted_model
from lbpwht_jax.cost import abstract_variables, backward_flops, layer_costs, residual_bytes
from lbpwht_jax.models import model_info
from lbpwht_jax.ops.residuals import RESIDUALS

MODELS = (
    "efficientformer_l1",
    "vit_small_patch16_224",
    "swinv2_tiny_window8_256",
    "efficientformerv2_s0",
    "vit_small_patch14_dinov2",
    "convnext_tiny",
)
RESULTS = Path(__file__).parent / "results" / "saved_bytes.json"


def count(model: str, method: str, classes: int = 100) -> dict:
    """Bytes and FLOPs of a method, per image, in float32."""
    info = model_info(model)
    shape = info.images.shape
    settings = {name: adapted_model(model, method, num_classes=classes, residuals=name) for name in RESIDUALS}
    adapted = settings["plain"]
    recomputed = adapted_model(model, method, num_classes=classes, remat=True)
    variables = abstract_variables(adapted, shape)
    return {
        "model": model,
        "method": method,
        "layers_mb": sum(layer.saved_activation_bytes for layer in layer_costs(adapted, variables, shape)) / 1e6,
        "model_mb": {name: residual_bytes(each, variables, shape) / 1e6 for name, each in settings.items()},
        "backward_mflops": backward_flops(adapted, variables, shape) / 1e6,
        "remat_model_mb": residual_bytes(recomputed, variables, shape) / 1e6,
        "remat_backward_mflops": backward_flops(recomputed, variables, shape) / 1e6,
    }


def main(
    models: tuple[str, ...] = MODELS,
    methods: tuple[str, ...] = ("full", "lp_l1-2", "lp_l1-4", "lp_l1-8", "lora_all-8", "lp_l1-4+lora_all-8"),
    output: Path = RESULTS,
) -> None:
    """Counts every method on every model.

    Args:
      models: names that ``lbpwht models`` lists.
      methods: short names, as for lbpwht cost.
      output: JSON file to write.
    """
    rows = [count(model, method) for model in models for method in methods]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"command": "python experiments/saved_bytes.py", "rows": rows}, indent=2) + "\n")
    print(f"| model | method | MB kept: layers | {' | '.join(RESIDUALS)} | + remat | backward MFLOPs | + remat |")
    print(f"|---|---|{'--:|' * (4 + len(RESIDUALS))}")
    for row in rows:
        print(
            f"| {row['model']} | {row['method']} "
            f"| {row['layers_mb']:.1f} | {' | '.join(f'{kept:.1f}' for kept in row['model_mb'].values())} "
            f"| {row['remat_model_mb']:.1f} "
            f"| {row['backward_mflops']:.1f} | {row['remat_backward_mflops']:.1f} |"
        )


if __name__ == "__main__":
    tyro.cli(main)
