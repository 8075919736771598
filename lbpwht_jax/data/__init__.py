"""Data sets by name, batches of their images, and augmentation on the device."""

from lbpwht_jax.data.augmentation import Augmentation, make_augmentation
from lbpwht_jax.data.batches import Batch, Batches, Loading, evaluation_batches, steps_per_epoch, training_batches
from lbpwht_jax.data.decode import UnreadableImage, decode_image, load_image
from lbpwht_jax.data.images import ImageFile, find_images
from lbpwht_jax.data.open import open_dataset
from lbpwht_jax.data.split import ArraySplit, Dataset, Split, Subset

__all__ = [
    "ArraySplit",
    "Augmentation",
    "Batch",
    "Batches",
    "Dataset",
    "ImageFile",
    "Loading",
    "Split",
    "Subset",
    "UnreadableImage",
    "decode_image",
    "evaluation_batches",
    "find_images",
    "load_image",
    "make_augmentation",
    "open_dataset",
    "steps_per_epoch",
    "training_batches",
]
