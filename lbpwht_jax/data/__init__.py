"""Data sets by name, batches of their images, and augmentation on the device."""

from lbpwht_jax.data.augmentation import Augmentation, make_augmentation
from lbpwht_jax.data.batches import Batch, Batches, Loading, evaluation_batches, steps_per_epoch, training_batches
from lbpwht_jax.data.decode import load_image
from lbpwht_jax.data.folder import image_files
from lbpwht_jax.data.open import open_dataset
from lbpwht_jax.data.split import ArraySplit, Dataset, Split

__all__ = [
    "ArraySplit",
    "Augmentation",
    "Batch",
    "Batches",
    "Dataset",
    "Loading",
    "Split",
    "evaluation_batches",
    "image_files",
    "load_image",
    "make_augmentation",
    "open_dataset",
    "steps_per_epoch",
    "training_batches",
]
