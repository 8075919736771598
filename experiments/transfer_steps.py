"""Times a training step of every method of the transfer sweep, in turn in one process.

    python experiments/transfer_steps.py

writes experiments/results/transfer_steps.json. Images are random; the time of a step does not depend on them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from transfer import write_results
from transfer_backbone import WEIGHTS, backbone_info
from transfer_training import make_trainer
from transfer_variants import VARIANTS, Setting, Train, Variant, adapted_backbone, pretrained

from lbpwht_jax.bench.timing import interleaved, machine
from lbpwht_jax.data import ArraySplit, Dataset, training_batches

RESULTS = Path(__file__).parent / "results" / "transfer_steps.json"
CLASSES = 10


def step_function(variant: Variant, trained: Train, variables: Any, dataset: Dataset, setting: Setting) -> Callable[[], Any]:
    """Returns a function that makes one training step, always on the same batch."""
    model = adapted_backbone(variant, trained, CLASSES)
    trainer = make_trainer(model, backbone_info(), dataset, setting.recipe(seed=0), model.trainable)
    with training_batches(dataset, trainer.loading) as batches:
        batch = trainer.placement.put_batch(next(batches))
    held = [trainer.initial_state(model.with_branches(jax.random.key(1), variables))]

    def step() -> Any:
        held[0], metrics = trainer.train_step(held[0], batch)
        return metrics

    return step


def main(
    weights: Path = WEIGHTS,
    output: Path = RESULTS,
    rounds: int = 9,
    trains: tuple[Literal["last_stage", "all"], ...] = ("last_stage", "all"),
) -> None:
    """Times steps.

    Args:
      weights: the pretrained backbone.
      output: JSON file to write.
      rounds: number of samples of each time; the median counts.
      trains: what is trained, with the head.
    """
    setting = Setting()
    size, rng = backbone_info().images.size, np.random.default_rng(0)
    images = rng.integers(0, 256, (setting.batch_size, size, size, 3), dtype=np.uint8)
    split = ArraySplit(images, rng.integers(0, CLASSES, setting.batch_size).astype(np.int32))
    dataset = Dataset("random", split, split, tuple(map(str, range(CLASSES))))
    variables = pretrained(weights, CLASSES, seed=0)
    seconds: dict[Train, dict[str, float]] = {}
    for trained in trains:
        functions = {
            variant.name: step_function(variant, trained, variables, dataset, setting)
            for variant in VARIANTS
            if variant.lr_scale == 1 and not variant.flops_of
        }
        seconds[trained] = interleaved(functions, rounds)
        jax.clear_caches()
        for name, value in seconds[trained].items():
            print(f"{trained} {name}: {1e3 * value:.1f} ms, {seconds[trained]['full'] / value:.2f}x", flush=True)
    facts = {"command": "python experiments/transfer_steps.py", "machine": machine(), "batch_size": setting.batch_size}
    write_results(output, {**facts, "rounds": rounds, "seconds": seconds})


if __name__ == "__main__":
    tyro.cli(main)
