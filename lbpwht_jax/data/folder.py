"""Data sets that are folders, or zip files, of image files sorted by class."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from lbpwht_jax.data.files import SUFFIXES, list_folder, list_zip
from lbpwht_jax.data.split import Dataset

TESTS = ("test", "val", "validation")
_LAYOUT = "wanted are CLASS/IMAGE files, or train/CLASS/IMAGE and test/CLASS/IMAGE (or val)"


@dataclasses.dataclass(frozen=True, eq=False)
class FileSplit:
    """Labelled image files.

    Attributes:
      root: the folder or zip file that holds them.
      files: their paths in it, with slashes.
      labels: int32, ``[count]``.
      read_bytes: reads the file at such a path; raises OSError if it cannot be read.
    """

    root: Path
    files: Sequence[str]
    labels: np.ndarray
    read_bytes: Callable[[str], bytes]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of one file, and its label."""
        return self.read_bytes(self.files[index]), int(self.labels[index])

    def where(self, index: int) -> str:
        """The file's path."""
        return f"{self.root}/{self.files[index]}"


def open_folder(name: str, path: Path, seed: int) -> Dataset:
    """Lists a folder or a zip file of images.

    The files are ``train/CLASS/...`` and ``test/CLASS/...`` (or ``val`` or ``validation``, if there is no ``test``; beside
    ``test`` these are for validation), or just ``CLASS/...``; then a fifth of each class, drawn by the seed, is for testing.
    One more folder may surround them. Images are recognised by their suffixes (``SUFFIXES``), in upper or lower case; other
    files and hidden ones are ignored. Links are followed, but each image is listed once (``list_folder``).

    Args:
      name: the data set's name.
      path: the folder or zip file.
      seed: determines the split.

    Raises:
      FileNotFoundError: if there is nothing at the path.
      ValueError: if it is neither a folder nor a zip file, cannot be listed, holds no images, has a class without images (or
        with only one, where classes are split), a class that is in the test images only, or an image that is in no class.
    """
    if not path.exists():
        raise FileNotFoundError(f"folder:{path}: there is no such folder or zip file")
    paths, read_bytes = list_folder(path) if path.is_dir() else list_zip(path)
    paths, images = visible(paths)
    if not images:
        raise ValueError(f"folder:{path} holds no images ({', '.join(SUFFIXES)}); {_LAYOUT}")
    top = _common_top(images)
    tops = {p.removeprefix(top).split("/", 1)[0] for p in paths if p.startswith(top)}
    test = next((split for split in TESTS if split in tops), None)
    if (test is None) != ("train" not in tops):
        there, lacking = ("train", "test or val") if test is None else (test, "train")
        raise ValueError(f"folder:{path} has a folder {there} but no {lacking}; {_LAYOUT}")
    if test is None:
        classes, files, labels = _classify(path, top, paths, images)
        held = _held_out(path, classes, labels, seed)
        train = FileSplit(path, [files[i] for i in np.flatnonzero(~held)], labels[~held], read_bytes)
        tested = FileSplit(path, [files[i] for i in np.flatnonzero(held)], labels[held], read_bytes)
        return Dataset(name, train, tested, tuple(classes))
    classes, files, labels = _classify(path, f"{top}train/", paths, images)
    train = FileSplit(path, files, labels, read_bytes)

    def measured_on(part: str) -> FileSplit:
        names, files, labels = _classify(path, f"{top}{part}/", paths, images)
        unknown = [c for c in names if c not in classes]
        if unknown:
            shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            raise ValueError(f"folder:{path}: of the classes in {part}, train lacks {len(unknown)}: {shown}")
        return FileSplit(path, files, np.asarray([classes.index(c) for c in names], np.int32)[labels], read_bytes)

    others = [part for part in TESTS if part in tops and part != test]
    if len(others) > 1 or (test == "val" and others):
        raise ValueError(f"folder:{path} has the folders val and validation; keep one of them, or name it test")
    return Dataset(name, train, measured_on(test), tuple(classes), measured_on(others[0]) if others else None)


def visible(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """The paths that are not hidden, sorted, and the images among them."""
    paths = sorted(p for p in paths if "/." not in f"/{p}" and not p.startswith("__MACOSX/"))
    return paths, [p for p in paths if p.lower().endswith(SUFFIXES)]


def _common_top(images: Sequence[str]) -> str:
    """The one folder that surrounds everything else, with a slash at its end; empty if there is none."""
    top = images[0].split("/", 1)[0] + "/"
    wrapped = all(p.startswith(top) and p.count("/") > 1 for p in images)
    return top if wrapped and top not in {f"{split}/" for split in ("train", *TESTS)} else ""


def _classify(path: Path, prefix: str, paths: Sequence[str], images: Sequence[str]) -> tuple[list[str], list[str], np.ndarray]:
    """The sorted classes that are folders under a prefix, their images, and the images' labels."""
    files = [p for p in images if p.startswith(prefix)]
    inside = [p[len(prefix) :].split("/", 1) for p in files]
    loose = next((file for file, parts in zip(files, inside, strict=True) if len(parts) == 1), None)
    if loose is not None:
        raise ValueError(f"folder:{path}: {loose} is in no class folder; {_LAYOUT}")
    folders = {p[len(prefix) :].split("/", 1)[0] for p in paths if p.startswith(prefix) and "/" in p[len(prefix) :]}
    empty = sorted(folders.difference(parts[0] for parts in inside))
    if empty:
        raise ValueError(f"folder:{path}: the folder {prefix}{empty[0]} holds no image; add some or delete it")
    numbers = {name: label for label, name in enumerate(sorted(folders))}
    return list(numbers), files, np.asarray([numbers[parts[0]] for parts in inside], np.int32)


def _held_out(path: Path, classes: Sequence[str], labels: np.ndarray, seed: int) -> np.ndarray:
    """Which images are for testing: a fifth of each class, but at least one."""
    held = np.zeros(len(labels), bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise ValueError(f"folder:{path}: class {name} has one image; two are needed, one to train on and one to test")
        chosen = np.random.default_rng((seed, label)).permutation(members)
        held[chosen[: max(1, round(len(members) / 5))]] = True
    return held
