"""Lists the files of a folder or a zip file, and reads them within bounds."""

import logging
import os
import threading
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from lbpwht_jax.weights.bounded import open_archive, open_regular, read_member

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
"""How the names of image files end."""

LARGEST = 320 * 2**20
"""Most bytes of one image file; 10,000 x 8,000 pixels take nearly as many with four channels and without compression."""

_LOG = logging.getLogger("lbpwht_jax")
_SPLIT_DEPTH = 4  # folders that a class may be in and the class: a folder around all, train or test, and one to spare


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of an image file.

    Raises:
      OSError: if it cannot be read, is no regular file or has more than ``LARGEST`` bytes.
    """
    with open_regular(path) as file:
        _check_size(os.fstat(file.fileno()).st_size)
        return file.read(LARGEST)


def list_folder(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """Lists a folder and all below it, but not hidden folders (whose names start with a dot).

    Each folder and each image is listed once: a link is left out if what it leads to is listed already, or if it leads to a
    folder that it is in itself. A warning on the log says how many were left out.

    Returns:
      The paths of all files and of all folders (these end in a slash), and a function that reads a file.

    Raises:
      ValueError: if a folder cannot be listed.
    """
    listing = _Listing(path)
    links = listing.add("")
    file_links = []
    while links:
        folders = [name for name in links if (path / name).is_dir()]
        file_links += sorted(set(links).difference(folders))
        links = [link for name in sorted(folders) for link in listing.add_linked_folder(name)]
    for name in file_links:
        listing.add_linked_file(name)
    if listing.left_out:
        shown = ", ".join(listing.left_out[:3]) + (", ..." if len(listing.left_out) > 3 else "")
        _LOG.warning(
            "folder:%s: links left out, for what they lead to is listed already or is around them: %d (%s)",
            path,
            len(listing.left_out),
            shown,
        )
    return listing.paths, lambda file: read_file(path / file)


class _Listing:
    """What was found so far in a folder.

    Attributes:
      root: the folder.
      paths: of files and folders in it.
      left_out: paths of the links that were not followed.
    """

    def __init__(self, root: Path):
        self.root = root
        self.paths: list[str] = []
        self.left_out: list[str] = []
        self._known: set[str] = set()

    def add(self, inside: str) -> list[str]:
        """Adds what is in a folder and below, and returns the links found there."""
        links, pending = [], [inside]
        while pending:
            inside = pending.pop()
            self._known.add(os.path.realpath(self.root / inside))
            try:
                entries = list(os.scandir(self.root / inside))
            except OSError as error:
                raise ValueError(f"folder:{self.root}: cannot list {inside or 'it'}: {error.strerror}") from None
            for entry in entries:
                name = inside + entry.name
                if entry.is_symlink():
                    links.append(name)
                elif not entry.is_dir():
                    self.paths.append(name)
                elif os.path.realpath(entry.path) in self._known:
                    self.left_out.append(name)
                elif not entry.name.startswith("."):
                    self.paths.append(f"{name}/")
                    pending.append(f"{name}/")
        return links

    def add_linked_folder(self, name: str) -> list[str]:
        """Adds what is in the folder that a link leads to, unless that is left out; returns the links found there."""
        target, place = (os.path.realpath(path) for path in (self.root / name, (self.root / name).parent))
        around = (os.path.commonpath([target, inner]) == target for inner in (os.path.realpath(self.root), place))
        if name.rpartition("/")[2].startswith("."):
            return []
        if target in self._known or any(around):
            self.left_out.append(name)
            return []
        self.paths.append(f"{name}/")
        return self.add(f"{name}/")

    def add_linked_file(self, name: str) -> None:
        """Adds a link to a file, unless it leads to an image that is listed already."""
        folder, file = os.path.split(target := os.path.realpath(self.root / name))
        listed = target in self._known or (folder in self._known and not file.startswith("."))
        if listed and name.lower().endswith(SUFFIXES) and os.path.exists(target):
            self.left_out.append(name)
            return
        self._known.add(target)
        self.paths.append(name)


def list_zip(path: Path) -> tuple[Iterable[str], Callable[[str], bytes]]:
    """Does the same for a zip file, which need not name the folders that its files are in."""
    try:
        archive = open_archive(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"folder:{path} is neither a folder nor a readable zip file: {error}") from None
    lock = threading.Lock()

    def read_bytes(name: str) -> bytes:
        member = archive.getinfo(name)
        _check_size(member.file_size)
        return bytes(read_member(archive, member, lock))

    names = archive.namelist()
    parents = {PurePosixPath(name).parent.parts[:_SPLIT_DEPTH] for name in names}
    return {*names, *("/".join(parts[: n + 1]) + "/" for parts in parents for n in range(len(parts)))}, read_bytes


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise OSError(f"{size / 2**20:,.0f} MiB, more than the {LARGEST // 2**20} MiB that an image file may have")
