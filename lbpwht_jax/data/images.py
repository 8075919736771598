"""Image files without labels, wherever they are: files, folders, zip files, patterns."""

import dataclasses
import functools
import glob
from collections.abc import Callable
from pathlib import Path

from lbpwht_jax.data.files import SUFFIXES, list_folder, list_zip, read_file
from lbpwht_jax.data.folder import visible


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image file that has not been read yet.

    Attributes:
      name: its path; for one in a zip file, the zip file's and its own in there.
      read: returns its bytes; raises OSError if it cannot be read.
    """

    name: str
    read: Callable[[], bytes]


def find_images(path: Path) -> list[ImageFile]:
    """The images that a path stands for; none is read.

    Args:
      path: a file; a folder or zip file, for all images in it and below, sorted (files with one of ``SUFFIXES`` that are not
        hidden); or a shell-style pattern of such paths, such as ``photos/*.jpg``, where nothing has that very name.

    Raises:
      ValueError: if there is nothing at the path, no path matches the pattern, or a folder or zip file holds no images.
    """
    if not path.exists():
        if not glob.has_magic(str(path)):
            raise ValueError(f"cannot read the image {path}: there is no such file or folder")
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise ValueError(f"no file matches {path}")
        return [image for match in matches for image in find_images(Path(match))]
    if path.is_dir():
        paths, read = list_folder(path)
    elif path.suffix.lower() == ".zip":
        paths, read = list_zip(path)
    else:
        return [ImageFile(str(path), functools.partial(read_file, path))]
    _, images = visible(paths)
    if not images:
        raise ValueError(f"{path} holds no images ({', '.join(SUFFIXES)})")
    return [ImageFile(str(path / image), functools.partial(read, image)) for image in images]
