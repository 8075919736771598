"""Data sets by name."""

from pathlib import Path

from lbpwht_jax.data.digits import open_digits
from lbpwht_jax.data.split import Dataset


def open_dataset(name: str, seed: int = 0, data_dir: Path | None = None) -> Dataset:
    """Opens a data set; files are listed, no image is read.

    Args:
      name: "digits".
      seed: of the split into training and test images, where the data set has none of its own.
      data_dir: where TFDS data sets are, by default where TFDS puts them.

    Raises:
      ValueError: if the name is none of these, or what it names is no data set.
    """
    if name == "digits":
        return open_digits(seed)
    raise ValueError(f"unknown data set {name!r}; write digits")
