"""Images per second of the loader alone, beside those of a training step of EfficientFormer-L1 on the same machine.

    python experiments/loader_speed.py

makes JPEGs of 32 and of 500 pixels, loads them with each number of workers, times the step on one fixed batch, and then times
both together. The loader's rate over the step's shows how far the loader is from being the bottleneck. It writes
experiments/results/loader_speed.json.
"""

import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from PIL import Image

from lbpwht_jax import create_model, lp_l1
from lbpwht_jax.data import Augmentation, Batch, Batches, Dataset, Loading, make_augmentation, open_dataset, training_batches

RESULTS = Path(__file__).parent / "results" / "loader_speed.json"
MODEL, CLASSES = "efficientformer_l1", 4


def write_photos(folder: Path, edge: int, count: int) -> Dataset:
    """A data set of JPEGs (quality 90) of noise at several scales, which is as hard to decode as a photograph, or harder."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"c{i % CLASSES}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = [rng.integers(0, 256, (max(edge // k, 1),) * 2 + (3,)).astype(np.uint8) for k in (2, 5, 20, 60)]
        scaled = [np.asarray(Image.fromarray(layer).resize((edge, edge), Image.Resampling.BICUBIC)) for layer in layers]
        Image.fromarray(np.mean(scaled, 0).astype(np.uint8)).save(path, quality=90)
    return open_dataset(f"folder:{folder}")


def make_step(rank: int, image_size: int) -> Callable[[Batch], float]:
    """Trains on a batch, augmented on the device, and waits for the loss; LP_{L1-rank}, or full backpropagation for rank 0."""
    spec = lp_l1(rank) if rank else None
    model = create_model(MODEL, num_classes=CLASSES, image_size=image_size, spec=spec, frozen_batch_norm=True)
    variables = model.init(jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))
    others = {name: tree for name, tree in variables.items() if name != "params"}
    augment = make_augmentation(Augmentation(crop_scale=(0.08, 1.0), flip=True), image_size)
    optimizer = optax.adamw(1e-4)

    @jax.jit
    def step(params, state, key, batch: Batch):
        images, labels, _, aspect = map(jnp.asarray, batch)
        images, targets = augment(key, images, aspect, labels, CLASSES)

        def loss_of(params):
            logits = model.apply({"params": params, **others}, (images - 0.45) / 0.225, train=True, rngs={"dropout": key})
            return optax.softmax_cross_entropy(jnp.asarray(logits), targets).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state = variables["params"], optimizer.init(variables["params"])

    def run(batch: Batch) -> float:
        nonlocal params, state
        params, state, loss = step(params, state, jax.random.key(0), batch)
        return float(loss)

    return run


def rate(call: Callable[[], object], images: int, repeats: int) -> float:
    """Images per second of a call that takes ``images`` of them; the first call is not counted."""
    call()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return images * repeats / (time.perf_counter() - started)


def main(
    batch_size: int = 16,
    workers: tuple[int, ...] = (1, 2, 4),
    image_size: int = 224,
    rank: int = 2,
    photos: int = 512,
    steps: int = 5,
    output: Path = RESULTS,
) -> None:
    """Measures and writes the results.

    Args:
      batch_size: images per batch.
      workers: numbers of the loader's threads to try.
      image_size: height and width of the model's images, in pixels.
      rank: the step's LP_{L1-rank}, or 0 for full backpropagation, whose step takes longer.
      photos: number of JPEGs of each size.
      steps: number of training steps timed; the loader alone is timed for ten times as many batches.
      output: JSON file to write.
    """

    def loader(edge: int, count: int) -> Batches:
        return training_batches(datasets[edge], Loading(batch_size, image_size, 3, workers=count))

    loads: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        datasets = {edge: write_photos(Path(folder) / str(edge), edge, photos) for edge in (32, 500)}
        for edge in datasets:
            loads[f"{edge} px"] = {}
            for count in workers:
                with loader(edge, count) as batches:
                    loads[f"{edge} px"][count] = rate(lambda batches=batches: next(batches), batch_size, 10 * steps)
        step = make_step(rank, image_size)
        with loader(500, workers[0]) as batches:
            batch = next(batches)
        alone, together = rate(lambda: step(batch), batch_size, steps), {}
        for edge in datasets:
            with loader(edge, workers[0]) as batches:
                together[f"{edge} px"] = rate(lambda batches=batches: step(next(batches)), batch_size, steps)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "model": f"{MODEL}, {f'lp_l1-{rank}' if rank else 'full'}, {image_size} px, batch {batch_size}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores",
        "loader_images_per_second_by_workers": loads,
        "step_images_per_second": alone,
        f"step_fed_by_the_loader_images_per_second_{workers[0]}_worker": together,
        "loader_over_step": {size: max(rates.values()) / alone for size, rates in loads.items()},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
