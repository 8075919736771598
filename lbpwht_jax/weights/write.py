"""Writes safetensors files: whole or not at all, over regular files alone, the same bytes for the same contents."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy


def check_output(path: str | os.PathLike) -> None:
    """Checks that a file can be written to a path, before work is done for it.

    Raises:
      ValueError: if its folder is not there, or the path is there and is no regular file.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: there is no folder {target.parent}; make it first, or name another file")
    if target.exists() and not target.is_file():
        raise ValueError(f"cannot write {target}: it is there and is no regular file; name another")


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata; a file that was there is replaced once the new one is complete.

    Raises:
      ValueError: as ``check_output``.
      OSError: if the file cannot be written, such as on a full disk; a file that was there is as it was.
    """
    check_output(path)
    target = Path(os.path.realpath(path))
    new = target.with_name(f"{target.name}.new")
    data = safetensors.numpy.save(dict(tensors), dict(metadata))
    header, rest = _sorted_header(data)
    try:
        with new.open("wb") as file:
            file.write(header)
            file.write(rest)
        os.replace(new, target)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; what was there before is as it was") from error


def _sorted_header(data: bytes) -> tuple[bytes, memoryview]:
    """The header with its metadata in order, which safetensors leaves to chance, and the rest."""
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + length])
    if "__metadata__" in fields:
        fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, memoryview(data)[8 + length :]
