"""Pretrains the backbone of the transfer sweep, a narrow EfficientFormer, on Tiny-ImageNet.

    python experiments/transfer_backbone.py --data tiny-imagenet.zip

writes experiments/results/transfer_backbone.safetensors, its test accuracy in the header. The images lie as
``.../{train,test}/CLASS/IMAGE`` in zip files or folders; several are read together.

The model uses the registry's EfficientFormer class. At 56 pixels its two stages have the grids of the paper's last two,
14x14 and 7x7; as in the paper, neither is a multiple of the 8x8 block.
"""

import dataclasses
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from transfer_images import read_dataset
from transfer_training import AUGMENTATION, make_trainer, train

from lbpwht_jax.models import ModelInfo, model_info
from lbpwht_jax.models.blocks import Settings
from lbpwht_jax.models.info import Images
from lbpwht_jax.train import Recipe
from lbpwht_jax.weights.files import count_parameters, save_weights

IMAGE_SIZE = 56
DIMS, DEPTHS, ATTENTION = (48, 160), (2, 4), 1
NAME = "efficientformer_narrow_56"
WEIGHTS = Path(__file__).parent / "results" / "transfer_backbone.safetensors"


def backbone_info() -> ModelInfo:
    """What the registry would know of the backbone."""
    like = model_info("efficientformer_l1")
    return dataclasses.replace(
        like,
        arguments={"dims": DIMS, "depths": DEPTHS, "attention": ATTENTION},
        images=Images(IMAGE_SIZE),
        layers=dataclasses.replace(like.layers, last_stage=rf"^(stages_{len(DIMS) - 1}|norm|head(_dist)?)(/|$)"),
    )


def backbone(num_classes: int, settings: Settings | None = None, **arguments) -> nn.Module:
    """The model; ``arguments`` are further fields of its class, such as ``drop_path``."""
    info = backbone_info()
    return info.module(
        num_classes=num_classes,
        image_size=info.images.size,
        settings=settings or Settings(),
        **info.arguments,
        **arguments,
    )


def main(
    data: tuple[Path, ...],
    output: Path = WEIGHTS,
    cache: Path | None = None,
    epochs: int = 4,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    limit: int | None = None,
) -> None:
    """Pretrains, and writes the weights (in float16) after every half epoch.

    Args:
      data: zip files or folders with the images.
      output: safetensors file to write.
      cache: folder to keep decoded images in.
      epochs: passes over the training images.
      batch_size: images per step.
      lr: AdamW's peak learning rate.
      seed: determines initial weights, shuffling and augmentation.
      limit: training and test images of each class; all by default.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    info = backbone_info()
    dataset = read_dataset(data, info.images.size, limit, limit, cache)
    model = backbone(len(dataset.classes))
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *info.images.shape)))
    print(
        f"{NAME}: {count_parameters(variables):,} parameters, {len(dataset.train):,} images of {len(dataset.classes)} classes"
    )
    recipe = Recipe(epochs, batch_size, lr, weight_decay=0.05, clip=1.0, warmup_steps=500, augmentation=AUGMENTATION, seed=seed)
    trainer = make_trainer(model, info, dataset, recipe)
    every = max(trainer.steps_per_epoch // 2, 1)
    losses, started = [], time.perf_counter()
    for number, loss, state in train(trainer, variables):
        losses.append(loss)
        if number % every and number != trainer.steps:
            continue
        accuracy = trainer.evaluator(state.variables, dataset.test).accuracy
        rate = batch_size * number / (time.perf_counter() - started)
        came_to = f"loss {np.mean(losses[-every:]):.3f}, test accuracy {accuracy:.4f}, {rate:.0f} images/s"
        print(f"step {number}/{trainer.steps}: {came_to}", flush=True)
        metadata = {
            "model": NAME,
            "classes": dataset.classes,
            "test_accuracy": round(accuracy, 4),
            "steps": f"{number} of {trainer.steps}",
            "recipe": dataclasses.asdict(recipe),
        }
        save_weights(output, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), state.variables), metadata)


if __name__ == "__main__":
    tyro.cli(main)
