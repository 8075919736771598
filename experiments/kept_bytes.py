"""Bytes kept for the backward pass, by what a model is told to keep, from JAX's residuals.

    python experiments/kept_bytes.py

writes results/kept_bytes.json and prints it as Markdown. Nothing is computed: shapes alone are traced.
"""

import json
from pathlib import Path

import tyro

from lbpwht_jax.adaptation import adapted_model
from lbpwht_jax.cost import abstract_variables, residual_bytes
from lbpwht_jax.models import model_info
from lbpwht_jax.ops.residuals import RESIDUALS

RESULTS = Path(__file__).parent / "results" / "kept_bytes.json"
MODELS = ("vit_small_patch16_224", "efficientformer_l1", "swinv2_tiny_window8_256", "efficientformerv2_s0")


def count(name: str, method: str, classes: int = 100) -> dict:
    """MB kept per image in float32, by setting."""
    shape, kept = model_info(name).images.shape, {}
    for residuals in RESIDUALS:
        model = adapted_model(name, method, num_classes=classes, residuals=residuals)
        kept[residuals] = residual_bytes(model, abstract_variables(model, shape), shape) / 1e6
    return {"model": name, "method": method, **kept}


def main(
    models: tuple[str, ...] = MODELS,
    methods: tuple[str, ...] = ("full", "lora_all-8", "lp_l1-2", "lp_l1-4", "lp_l1-4+lora_all-8"),
    output: Path = RESULTS,
) -> None:
    """Counts every method under every setting.

    Args:
      models: names that ``lbpwht models`` lists.
      methods: short names, as for lbpwht cost.
      output: JSON file to write.
    """
    rows = [count(model, method) for model in models for method in methods]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"command": "python experiments/kept_bytes.py", "rows": rows}, indent=2) + "\n")
    print(f"| model | method | {' | '.join(RESIDUALS)} |")
    print(f"|---|---|{'--:|' * len(RESIDUALS)}")
    for row in rows:
        print(f"| {row['model']} | {row['method']} | {' | '.join(f'{row[name]:.1f}' for name in RESIDUALS)} |")


if __name__ == "__main__":
    tyro.cli(main)
