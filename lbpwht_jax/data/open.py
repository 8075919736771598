"""Data sets by name."""

import difflib
from pathlib import Path

from lbpwht_jax.data.digits import open_digits
from lbpwht_jax.data.folder import open_folder
from lbpwht_jax.data.prepared import default_folder, open_prepared, parse_name
from lbpwht_jax.data.recipes import RECIPES
from lbpwht_jax.data.split import Dataset, hold_out


def open_dataset(name: str, seed: int = 0, data_dir: Path | None = None, validation: float = 0.0) -> Dataset:
    """Opens a data set. Its files are listed, but no image is read.

    Args:
      name: "digits" for scikit-learn's; "folder:PATH" for a folder or zip file of ``train/CLASS/IMAGE`` and
        ``test/CLASS/IMAGE`` (and ``val/CLASS/IMAGE``), or of ``CLASS/IMAGE``; or "tfds:NAME" or "tfds:NAME:VERSION" for one
        that ``lbpwht prepare`` has prepared.
      seed: determines the split into training and test images, if the data set has none of its own.
      data_dir: folder of the TFDS data sets; TFDS's own by default.
      validation: the share of the training images to hold out for validation, in [0, 1), drawn by the seed; 0 for none.

    Raises:
      FileNotFoundError: if there is nothing at the path.
      ValueError: if the name is none of these, or the data set cannot be used; the text says why and what to do.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"--validation must be a share of the training images, from 0 to less than 1, got {validation}")
    dataset = _open(name, seed, data_dir)
    return hold_out(dataset, validation, seed) if validation else dataset


def _open(name: str, seed: int, data_dir: Path | None) -> Dataset:
    kind, _, rest = name.partition(":")
    if name == "digits":
        return open_digits(seed)
    if kind == "folder" and rest:
        try:
            path = Path(rest).expanduser()
        except RuntimeError:
            raise ValueError(f"{name}: there is no user {rest.split('/')[0][1:]!r}; write the path without ~") from None
        return open_folder(name, path, seed)
    if kind == "tfds" and rest:
        return open_prepared(parse_name(rest), data_dir or default_folder())
    raise ValueError(f"unknown data set {name!r}; {_meant(name)}")


def _meant(name: str) -> str:
    if name and Path(name).exists():
        return f"for the images in this folder or zip file write folder:{name}"
    near = difflib.get_close_matches(name.lower(), ("digits", *(f"tfds:{known}" for known in RECIPES)), 1)
    others = "digits, folder:PATH, tfds:NAME or tfds:NAME:VERSION"
    return f"did you mean {near[0]}? Or write {others}" if near else f"write {others}"
