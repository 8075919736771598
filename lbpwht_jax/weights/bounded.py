"""Reads files within bounds: regular files only, and of zip files no more than their directory declares."""

import contextlib
import os
import stat
import zipfile
from typing import Any, BinaryIO

_IN_PARTS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading.

    Raises:
      FileNotFoundError: if there is no such file.
      OSError: if it is no regular file (a named pipe would be waited for without end), or cannot be opened.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file, but a pipe or a device")
    return file


def open_archive(path: str | os.PathLike) -> zipfile.ZipFile:
    """Opens a zip file.

    Raises:
      zipfile.BadZipFile: if its directory is damaged.
      OSError: as ``open_regular`` does.
    """
    open_regular(path).close()
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # a damaged directory may raise anything
        raise zipfile.BadZipFile(str(error)) from error


def read_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, lock: contextlib.AbstractContextManager[Any] | None = None
) -> bytearray:
    """Unpacks one file of a zip file; takes no more memory than the size that its directory declares.

    Args:
      archive: the zip file.
      member: the file in it.
      lock: held while the file is opened and closed, if several threads read the archive: a ZipFile counts its open files
        without one. The reading itself may overlap.

    Raises:
      OSError: if it is damaged, has another size than declared, or is packed in a way that cannot be unpacked.
    """
    lock = contextlib.nullcontext() if lock is None else lock
    # of what bzip2 and LZMA packed, zipfile unpacks all that is in a piece
    piece = 2**16 if member.compress_type in _IN_PARTS else 2**12
    unpacked = bytearray()
    try:
        with lock:
            file = archive.open(member)
        try:
            while part := file.read(piece):
                unpacked += part
        finally:
            with lock:
                file.close()
    except Exception as error:  # damage may raise anything
        raise OSError(str(error)) from error
    if len(unpacked) != member.file_size:
        raise OSError(f"{member.filename} holds {len(unpacked)} bytes, not the {member.file_size} declared")
    return unpacked
