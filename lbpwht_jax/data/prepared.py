"""TFDS data sets, read from prepared ArrayRecord files without TensorFlow."""

import dataclasses
import difflib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from lbpwht_jax.data.split import Dataset

_NAME = re.compile(r"(?P<name>\w+(/[\w.-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")


class PreparedName(NamedTuple):
    """The parts of ``NAME[/CONFIG][:VERSION]``: the name with its configuration, and the version (None for the latest)."""

    name: str
    version: str | None

    def __str__(self) -> str:
        return f"tfds:{self.name}" + (f":{self.version}" if self.version else "")


def parse_name(text: str) -> PreparedName:
    """Parses what follows ``tfds:``.

    Raises:
      ValueError: if it does not name a data set.
    """
    match = _NAME.fullmatch(text)
    if not match:
        raise ValueError(f"tfds:{text} is no name of a TFDS data set; write tfds:NAME, or tfds:NAME:1.2.3 for one version")
    return PreparedName(match["name"], match["version"])


def unknown_name(name: str) -> str | None:
    """The message for a name that TFDS does not know; None if it knows it."""
    bare = name.split("/")[0]
    try:
        tfds.builder_cls(bare)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(bare, tfds.list_builders(with_community_datasets=False), 3)
        return f"TFDS has no data set {bare!r}" + (f"; is it {' or '.join(near)}?" if near else "")
    return None


def default_folder() -> Path:
    """Where TFDS keeps its data sets: ``$TFDS_DATA_DIR``, or ``tensorflow_datasets`` in the home folder."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedSplit:
    """One split of a prepared data set.

    Attributes:
      name: its name in messages.
      records: TFDS's data source; each record is a dictionary of undecoded features.
      image: name of the feature that is an encoded image.
      label: name of the feature that is the label.
    """

    name: str
    records: Any
    image: str
    label: str

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> tuple[bytes, int]:
        """One encoded image and its label."""
        record = self.records[index]
        return record[self.image], int(record[self.label])

    def where(self, index: int) -> str:
        """The record's name in messages."""
        return f"{self.name}[{index}]"


def open_prepared(wanted: PreparedName, folder: Path) -> Dataset:
    """Opens a data set that ``lbpwht prepare`` has prepared.

    The split ``train`` is for training. The split ``test`` is for testing, or ``validation`` if there is no ``test`` or it has
    no labels; where both are there and labelled, ``validation`` is for validation.

    Args:
      wanted: the data set; without a version, the latest that is prepared.
      folder: the folder that holds the data sets.

    Returns:
      The data set, named with its version.

    Raises:
      ValueError: if TFDS does not know the data set, it (or this version) is not prepared in the folder, its files are not
        ArrayRecord files, or it does not consist of images with class labels.
    """
    version = _version(wanted, folder)
    builder: Any = tfds.builder_from_directory(folder / wanted.name / version)
    name, info = f"tfds:{wanted.name}:{version}", builder.info
    features = dict(info.features.items())
    if info.file_format is None or info.file_format.value != "array_record":
        raise ValueError(
            f"{name} in {folder} is not prepared as ArrayRecord files, which alone can be read without TensorFlow; "
            f"run: lbpwht prepare {wanted} --data-dir ANOTHER_FOLDER"
        )
    image, label = (info.supervised_keys or ("image", "label"))[:2]
    kinds = type(features.get(image)), type(features.get(label))
    if kinds != (tfds.features.Image, tfds.features.ClassLabel):
        raise ValueError(f"{name} does not consist of images with class labels, but of {', '.join(features)}")
    undecoded = {key: tfds.decode.SkipDecoding() for key in features}

    def split(part: str) -> PreparedSplit:
        return PreparedSplit(f"{name} {part}", builder.as_data_source(part, decoders=undecoded), image, label)

    tests = [split(part) for part in ("test", "validation") if part in info.splits]
    test = next((part for part in tests if len(part) and part.read(0)[1] >= 0), None)
    if "train" not in info.splits or test is None:
        raise ValueError(f"{name} has no labelled splits train and test (or validation), but {', '.join(info.splits)}")
    validation = tests[-1] if tests[-1] is not test and len(tests[-1]) and tests[-1].read(0)[1] >= 0 else None
    return Dataset(name, split("train"), test, tuple(features[label].names), validation)


def _version(wanted: PreparedName, folder: Path) -> str:
    found = [path.parent.name for path in (folder / wanted.name).glob("*/dataset_info.json")]
    versions = sorted((v for v in found if re.fullmatch(r"\d+\.\d+\.\d+", v)), key=lambda v: [int(n) for n in v.split(".")])
    if wanted.version in versions or (versions and wanted.version is None):
        return wanted.version or versions[-1]
    unknown = None if versions else unknown_name(wanted.name)
    if unknown:
        raise ValueError(unknown)
    there = f" (but {', '.join(versions)})" if versions else ""
    raise ValueError(f"{wanted} is not prepared in {folder}{there}; run: lbpwht prepare {wanted}")
