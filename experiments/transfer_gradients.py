"""Measures how much of each layer's gradient survives at each rank, with the pretrained backbone and real images.

    python experiments/transfer_gradients.py --data cifar10.zip

trains a new head on the frozen backbone, then compares the kernel gradients of every adapted layer with those of full
backpropagation on one batch, by cosine similarity: with both products at low rank throughout the model (errors of later layers
reach the earlier ones), and with low rank on dW alone. Writes experiments/results/transfer_gradients.json.
"""

import os
import platform
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import traverse_util
from transfer import write_results
from transfer_backbone import NAME, WEIGHTS, backbone_info
from transfer_images import read_split
from transfer_training import make_trainer, train
from transfer_variants import Setting, Variant, adapted_backbone, pretrained

from lbpwht_jax.adaptation import AdaptedModule
from lbpwht_jax.data import ArraySplit, Dataset
from lbpwht_jax.ops import LowRankSpec
from lbpwht_jax.train import normalise

RESULTS = Path(__file__).parent / "results" / "transfer_gradients.json"
METHODS = (*(f"lp_l1-{r}" for r in range(1, 9)), "lp_linf-2", "lp_linf-4")


def kernel_gradients(model: AdaptedModule, variables: Any, batch: ArraySplit) -> dict[str, np.ndarray]:
    """Gradients of the mean cross-entropy with respect to the kernels of the paper's layers, as float64, by layer."""
    info = backbone_info()

    @jax.jit
    def gradients(variables, images, labels):
        def loss_of(params):
            logits = model.apply({**variables, "params": params}, normalise(images.astype(jnp.float32) / 255, info), train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss_of)(variables["params"])

    flat: dict[str, Any] = traverse_util.flatten_dict(gradients(variables, batch.images, batch.labels), sep="/")
    layers = [adaptation.layer.path for adaptation in adapted_backbone(Variant("lp_l1-1"), "all", 2).resolution.adaptations]
    order = ("qkv", "proj", "fc1", "fc2")  # of the forward pass, within a block
    layers.sort(key=lambda path: (path.split("/")[:2], order.index(path.rpartition("/")[2])))
    return {layer: np.asarray(flat[f"{layer}/kernel"], np.float64) for layer in layers}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine similarity of two arrays, read as vectors."""
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def spec_of(variant: Variant) -> LowRankSpec:
    """The spec of a low-rank variant."""
    spec = variant.parse().spec
    if spec is None:
        raise ValueError(f"{variant.name} has no low-rank backward pass")
    return spec


def with_trained_head(dataset: Dataset, weights: Path, seed: int) -> dict[str, Any]:
    """The backbone's variables after an epoch in which its new head alone was trained."""
    classes = len(dataset.classes)
    head = adapted_backbone(Variant("full"), "head", classes)
    trainer = make_trainer(head, backbone_info(), dataset, Setting(epochs=1).recipe(seed), head.trainable)
    for _, loss, state in train(trainer, pretrained(weights, classes, seed)):  # noqa: B007, used below
        pass
    print(f"the head's loss: {loss:.3f}", flush=True)
    return jax.device_get(state.variables)


def main(
    data: Path,
    weights: Path = WEIGHTS,
    output: Path = RESULTS,
    cache: Path | None = None,
    methods: tuple[str, ...] = METHODS,
    projections: tuple[Literal["fitted", "official"], ...] = ("fitted", "official"),
    batch_size: int = 128,
    seed: int = 0,
    train_per_class: int = 500,
) -> None:
    """Compares gradients.

    Args:
      data: zip file or folder with the images.
      weights: the pretrained backbone.
      output: JSON file to write.
      cache: folder to keep decoded images in.
      methods: short names of low-rank methods.
      projections: projections of these methods.
      batch_size: images in the batch.
      seed: determines the new head and the choice of images.
      train_per_class: training images of each class.
    """
    images, names = read_split([data], "train", backbone_info().images.size, train_per_class, cache)
    classes, dataset = len(names), Dataset(data.stem, images, images, names)
    variables = with_trained_head(dataset, weights, seed)
    chosen = np.random.default_rng(seed).permutation(len(images))[:batch_size]
    batch = ArraySplit(images.images[chosen], images.labels[chosen])
    exact = kernel_gradients(adapted_backbone(Variant("full"), "all", classes), variables, batch)
    rows = []
    for method in methods:
        for projection in projections:
            for dx in ("low_rank", "exact"):
                variant = Variant(method, projection, dx)
                found = kernel_gradients(adapted_backbone(variant, "all", classes), variables, batch)
                cosines = {layer: cosine(found[layer], exact[layer]) for layer in exact}
                row = {"method": method, "projection": projection, "dx": dx, "functions": spec_of(variant).rank}
                rows.append({**row, "cosine": cosines})
                print(f"{variant.name}: mean {np.mean(list(cosines.values())):.3f}", flush=True)
                jax.clear_caches()
    results = {
        "command": "python experiments/transfer_gradients.py --data cifar10.zip",
        "model": NAME,
        "images": data.stem,
        "batch_size": batch_size,
        "seed": seed,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores",
        "rows": rows,
    }
    write_results(output, results)


if __name__ == "__main__":
    tyro.cli(main)
