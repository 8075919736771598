"""How near a plan's gradients are to exact ones, beside one selection for all layers at the same backward FLOPs.

    python experiments/plan_gradients.py --data cifar10.zip

measures on the transfer sweep's backbone, whose head alone was trained first, and writes results/plan_gradients.json.
Plans are made on training images; gradients are compared on test images.
"""

import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from transfer import sweep_images
from transfer_backbone import NAME, WEIGHTS, backbone_info
from transfer_gradients import cosine, with_trained_head
from transfer_plans import batch_of
from transfer_variants import Setting, Variant, adapted_backbone

from lbpwht_jax.adaptation import AdaptedModule, adapt
from lbpwht_jax.cost import backward_flops
from lbpwht_jax.plan import cross_entropy, plan

RESULTS = Path(__file__).parent / "results" / "plan_gradients.json"
RANKS = (2, 4, 6)


def gradients(model: AdaptedModule, variables: Any, batch: tuple[jax.Array, jax.Array]) -> Any:
    """Gradients with respect to all parameters."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    step = jax.jit(jax.grad(lambda params, batch: cross_entropy(model, {**others, "params": params}, batch)))
    found = jax.device_get(step(variables["params"], batch))
    jax.clear_caches()
    return found


def compared(found: Any, exact: Any, layers: list[str]) -> dict[str, float]:
    """The cosine of the whole gradient, and the mean over the layers' kernels."""

    def kernel(tree: Any, path: str) -> np.ndarray:
        return np.asarray(functools.reduce(lambda tree, name: tree[name], path.split("/"), tree)["kernel"], np.float64)

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])

    means = [cosine(kernel(found, path), kernel(exact, path)) for path in layers]
    return {"whole": cosine(flat(found), flat(exact)), "mean": float(np.mean(means))}


def main(
    data: Path,
    weights: Path = WEIGHTS,
    output: Path = RESULTS,
    cache: Path | None = None,
    batches: tuple[int, ...] = (2, 16),
    batch_size: int = 32,
    held_out: int = 128,
) -> None:
    """Compares gradients.

    Args:
      data: zip file or folder with the images.
      weights: the pretrained backbone.
      output: JSON file to write.
      cache: folder to keep decoded images in.
      batches: numbers of batches that plans are made from.
      batch_size: images of each.
      held_out: test images of the batch that gradients are compared on.
    """
    dataset = sweep_images(data, Setting(), cache)
    classes, shape = len(dataset.classes), backbone_info().images.shape
    variables = with_trained_head(dataset, weights, seed=0)
    exact_model = adapted_backbone(Variant("full"), "all", classes)
    low = adapted_backbone(Variant("lp_l1-4"), "all", classes)
    layers = [adaptation.layer.path for adaptation in low.resolution.adaptations]
    batch = batch_of(dataset.test, 0, held_out)
    exact, full = gradients(exact_model, variables, batch), backward_flops(exact_model, variables, shape)
    rows = []

    def add(name: str, model: AdaptedModule, **facts: Any) -> None:
        share = backward_flops(model, variables, shape) / full
        rows.append({"name": name, "flops": share, **compared(gradients(model, variables, batch), exact, layers), **facts})
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)

    for method in ("lp_linf-2", "lp_linf-3", "lp_linf-4"):
        add(method, adapted_backbone(Variant(method), "all", classes))
    for r in RANKS:
        uniform = adapted_backbone(Variant(f"lp_l1-{r}"), "all", classes)
        add(f"lp_l1-{r}", uniform)
        budget = f"flops={backward_flops(uniform, variables, shape) / full}"
        for count in batches:
            started = time.perf_counter()
            made = plan(low, variables, [batch_of(dataset.train, 1 + k, batch_size) for k in range(count)], budget)
            seconds = time.perf_counter() - started
            example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
            planned = adapt(exact_model.module, made.rules(), example)
            kept = [None if layer.functions is None else len(layer.functions) for layer in made.layers]
            add(f"plan at lp_l1-{r}'s FLOPs, {count} batches", planned, functions=kept, plan_seconds=seconds)
    results = {
        "command": "python experiments/plan_gradients.py --data cifar10.zip",
        "model": NAME,
        "images": data.stem,
        "batch_size": batch_size,
        "held_out": held_out,
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, 2 cores",
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
