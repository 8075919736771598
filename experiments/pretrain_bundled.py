"""Pretrains the small vision transformer that comes with the package, on Fashion-MNIST.

The images are Debian's: ``apt-get install dataset-fashion-mnist``. Run from the repository's root:

    python experiments/pretrain_bundled.py

It writes the weights to lbpwht_jax/bundled/ and the test accuracy into their header.
"""

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lbpwht_jax import create_model
from lbpwht_jax.data import ArraySplit, Augmentation, Dataset
from lbpwht_jax.models import model_info
from lbpwht_jax.train import Epoch, Recipe, Snapshot, Step, Trainer
from lbpwht_jax.weights.files import BUNDLED, count_parameters, save_weights

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def read_idx(path: Path) -> np.ndarray:
    """The array of uint8 in a gzipped IDX file."""
    data = gzip.decompress(path.read_bytes())
    ndim = data[3]
    shape = np.frombuffer(data, ">i4", ndim, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_split(folder: Path, prefix: str) -> ArraySplit:
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")[..., None]
    return ArraySplit(images, read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int32))


def main(
    data: Path = Path("/usr/share/datasets/fashion-mnist"),
    output: Path = Path(__file__).parents[1] / "lbpwht_jax" / "bundled" / f"{BUNDLED}.safetensors",
    epochs: int = 4,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Pretrains and writes the weights.

    Args:
      data: folder of the four gzipped IDX files.
      output: file to write.
      epochs: passes over the 60,000 training images.
      batch_size: images per step.
      lr: AdamW's peak learning rate.
      seed: determines initial weights, shuffling and augmentation.
    """
    dataset = Dataset("fashion-mnist", read_split(data, "train"), read_split(data, "t10k"), CLASSES)
    info = model_info(BUNDLED)
    changes = Augmentation(flip=True, shift=2)
    recipe = Recipe(
        epochs, batch_size, lr, weight_decay=0.05, clip=1.0, warmup_steps=300, drop_path=0.05, augmentation=changes, seed=seed
    )
    model = create_model(BUNDLED, num_classes=len(CLASSES), drop_path=recipe.drop_path)
    size = info.images.size
    variables = model.init(jax.random.key(seed), jnp.zeros((1, size, size, info.images.channels)))
    print(f"{BUNDLED}: {count_parameters(variables):,} parameters")
    trainer = Trainer(model, info, dataset, recipe, size)
    for event in trainer.fit(trainer.initial_state(variables)):
        match event:
            case Step() if event.number % 50 == 0:
                print(f"step {event.number}: loss {event.loss:.3f}, {batch_size / event.seconds:.0f} images/s", flush=True)
            case Epoch():
                print(f"epoch {event.number}: test accuracy {event.accuracy:.4f}", flush=True)
                accuracy = event.accuracy
            case Snapshot() if event.state.step == trainer.steps:
                metadata = {"model": BUNDLED, "classes": CLASSES, "test_accuracy": round(accuracy, 4)}
                save_weights(output, {"params": event.state.params}, metadata)


if __name__ == "__main__":
    tyro.cli(main)
