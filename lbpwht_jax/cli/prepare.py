"""``lbpwht prepare``: downloads a TFDS data set and writes it as the files that training reads."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Annotated

import tensorflow_datasets as tfds
import tyro

from lbpwht_jax.cli.help import flag
from lbpwht_jax.data.prepared import default_folder, parse_name, unknown_name
from lbpwht_jax.screen import console, say


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Downloads a TFDS data set and writes it as ArrayRecord files, which training reads without TensorFlow.

    Preparing TFDS's own data sets needs TensorFlow: pip install 'lbpwht_jax[prepare]'. Once prepared, the folder can be
    copied to a machine without it.
    """

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """tfds:NAME, or tfds:NAME:VERSION, such as tfds:oxford_flowers102."""
    data_dir: Annotated[Path | None, flag("FOLDER", "$TFDS_DATA_DIR, or ~/tensorflow_datasets")] = None
    """Folder for TFDS data sets."""

    def prepare(self) -> None:
        """Downloads and writes the data set.

        Raises:
          ValueError: if the name or version is unknown, or can no longer be prepared.
          ImportError: if TensorFlow is needed and missing.
        """
        if not self.dataset.startswith("tfds:"):
            raise ValueError(f"only TFDS data sets are prepared; write tfds:NAME, not {self.dataset!r}")
        wanted = parse_name(self.dataset.removeprefix("tfds:"))
        unknown = unknown_name(wanted.name)
        if unknown:
            raise ValueError(unknown)
        name = wanted.name + (f":{wanted.version}" if wanted.version else "")
        try:
            builder = tfds.builder(name, data_dir=self.data_dir or default_folder(), file_format="array_record")
        except AssertionError as error:  # how TFDS reports a version it does not have
            raise ValueError(f"{wanted}: {error}") from None
        if type(builder).__module__.startswith("tensorflow_datasets.") and importlib.util.find_spec("tensorflow") is None:
            raise ImportError(
                f"preparing {wanted} needs TensorFlow (reading it later does not): pip install 'lbpwht_jax[prepare]'"
            )
        builder.download_and_prepare()
        counts = ", ".join(f"{split.num_examples:,} {part}" for part, split in builder.info.splits.items())
        say(console(), f"{builder.data_path}: {counts}; train on it with --dataset {wanted}")
