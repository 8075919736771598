"""Class folders of images, in a zip file or on disk, as uint8 arrays in memory, decoded and resized once."""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Images(NamedTuple):
    """Images ``[count, size, size, 3]`` of uint8, their labels ``[count]`` of int32, and the names of the classes."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "Images":
        """Those of the given indices."""
        return Images(self.images[chosen], self.labels[chosen], self.classes)


def _files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name, such as ``train/cat/1.png``, and reader of every file below a folder or in a zip."""
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


def read_images(
    paths: Sequence[Path], split: str, size: int, per_class: int | None = None, cache: Path | None = None
) -> Images:
    """The images of ``.../SPLIT/CLASS/IMAGE`` in folders or zips, squashed to a square (bicubic), in the order of their names.

    Args:
      paths: folders or zip files, read together.
      split: ``"train"`` or ``"test"``.
      size: height and width of the result, in pixels.
      per_class: takes so many of each class, the same ones whenever it is called; all by default.
      cache: folder where the result is kept for the next time, by what was asked.

    Raises:
      FileNotFoundError: if a path does not exist.
      ValueError: if no image is found.
    """
    asked = "|".join([*(str(path.resolve()) for path in paths), split, str(size), str(per_class)])
    kept = cache and cache / f"images-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.npz"
    if kept and kept.exists():
        with np.load(kept) as arrays:
            return Images(arrays["images"], arrays["labels"], tuple(arrays["classes"].tolist()))
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
    result = Images(np.stack(images), np.array(labels, np.int32), classes)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, images=result.images, labels=result.labels, classes=np.array(classes))
    return result
