"""Class folders of images, in zip files or on disk, as uint8 arrays in memory, decoded and resized once."""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lbpwht_jax.data import ArraySplit, Dataset


def _files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields every file below a folder or in a zip: its name, such as ``train/cat/1.png``, and a function that reads it."""
    if path.is_dir():
        for file in path.rglob("*"):
            if file.is_file():
                yield file.relative_to(path).as_posix(), file.read_bytes
    elif path.is_file():
        archive = zipfile.ZipFile(path)
        for name in archive.namelist():
            if not name.endswith("/"):
                yield name, lambda name=name: archive.read(name)
    else:
        raise FileNotFoundError(f"{path} is neither a folder nor a zip file")


def _decode(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
        return np.asarray(rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BICUBIC))


def read_split(
    paths: Sequence[Path], split: str, size: int, per_class: int | None = None, cache: Path | None = None
) -> tuple[ArraySplit, tuple[str, ...]]:
    """Reads the images ``.../SPLIT/CLASS/IMAGE`` of folders or zips, squashed to a square (bicubic), and the classes' names.

    Args:
      paths: folders or zip files, read together.
      split: ``"train"`` or ``"test"``.
      size: height and width of the result, in pixels.
      per_class: number of images per class, the same ones at every call; all by default.
      cache: folder in which the result is kept for the next call with the same arguments.

    Raises:
      FileNotFoundError: if a path does not exist.
      ValueError: if no image is found.
    """
    asked = "|".join([*(str(path.resolve()) for path in paths), split, str(size), str(per_class)])
    kept = cache and cache / f"images-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.npz"
    if kept and kept.exists():
        with np.load(kept) as arrays:
            return ArraySplit(arrays["images"], arrays["labels"]), tuple(arrays["classes"].tolist())
    by_class: dict[str, list] = {}
    for path in paths:
        for name, read in _files(path):
            parts = name.split("/")
            if len(parts) >= 3 and parts[-3] == split:
                by_class.setdefault(parts[-2], []).append((parts[-1], read))
    if not by_class:
        raise ValueError(f"no {split}/CLASS/IMAGE in {', '.join(map(str, paths))}")
    images, labels, classes = [], [], tuple(sorted(by_class))
    for label, name in enumerate(classes):
        found = sorted(by_class[name], key=lambda file: file[0])
        if per_class is not None:
            found = [found[i] for i in np.sort(np.random.default_rng(label).permutation(len(found))[:per_class])]
        images += [_decode(read(), size) for _, read in found]
        labels += [label] * len(found)
    result = ArraySplit(np.stack(images), np.array(labels, np.int32))
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, images=result.images, labels=result.labels, classes=np.array(classes))
    return result, classes


def read_dataset(
    paths: Sequence[Path], size: int, train_per_class: int | None, test_per_class: int | None, cache: Path | None
) -> Dataset:
    """Reads both splits; for the arguments see ``read_split``.

    Raises:
      ValueError: if the two splits have different classes, or ``read_split`` finds no image.
    """
    train, classes = read_split(paths, "train", size, train_per_class, cache)
    test, others = read_split(paths, "test", size, test_per_class, cache)
    if classes != others:
        raise ValueError(f"the test images' classes are not the training images': {sorted(set(classes) ^ set(others))}")
    return Dataset(paths[0].stem, train, test, classes)
