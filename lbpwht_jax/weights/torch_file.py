"""Reads the tensors of a ``torch.save`` file without torch, and without letting its pickle run anything."""

import logging
import os
import sys
import zipfile
from typing import Any

import numpy as np

from lbpwht_jax.weights.bounded import open_archive, read_member
from lbpwht_jax.weights.torch_pickle import TensorUnpickler, TorchFileError

_LOG = logging.getLogger("lbpwht_jax")
_WRAPPERS = ("state_dict", "model")
_MOST_TIMES = 16
_SLACK = 2**20


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The state dict in a ``.pth`` or ``.bin`` file, as ``torch.save`` writes them since torch 1.6 (a zip archive).

    Only tensors, parameters, containers and plain values are unpickled. A state dict wrapped as ``{"model": ...}`` or
    ``{"state_dict": ...}`` is unwrapped; everything else in the file is left out. The log (WARNING, ``"lbpwht_jax"``) names
    the classes of objects that were left out, such as ``argparse.Namespace``, and says how many tensors had no name.

    Args:
      path: the file.

    Returns:
      The tensors by name, read-only and in their own dtypes (bfloat16 as ``jnp.bfloat16``).

    Raises:
      ValueError: if the file is not such an archive, is truncated, would run code to be unpickled, unpacks to more than 16
        times its size, or holds no state dict.
      FileNotFoundError: if there is no such file.
    """
    path = os.fspath(path)
    try:
        with open_archive(path) as archive:
            content, left_out = _unpickle(archive, path)
    except (FileNotFoundError, TorchFileError):
        raise
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: no complete zip archive ({error}). The file is truncated, older than torch 1.6, or no torch file; "
            "download it again, or load it with torch and save it as .safetensors"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path}: damaged, its pickle does not read ({type(error).__name__}: {error})") from error
    beside = ", ".join(sorted(left_out))
    for _ in _WRAPPERS:
        inner = next((content[w] for w in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(w), dict)), None)
        content = content if inner is None else inner
    tensors = {k: v for k, v in content.items() if isinstance(v, np.ndarray)} if isinstance(content, dict) else {}
    named = {name: tensor for name, tensor in tensors.items() if isinstance(name, str)}
    if not named:
        raise ValueError(
            f"{path}: holds no state dict{f' beside what is not read ({beside})' if beside else ''}; wanted tensors by name, "
            "bare or under 'model' or 'state_dict'. If it is elsewhere, load the file with torch and save its state dict alone "
            "as .safetensors"
        )
    if len(named) < len(tensors):
        _LOG.warning("%s: left out %d tensors whose keys are no names", path, len(tensors) - len(named))
    if left_out:
        _LOG.warning("%s: read the tensors and left out the objects beside them: %s", path, beside)
    return named


def _unpickle(archive: zipfile.ZipFile, path: str) -> tuple[Any, set[str]]:
    """What the archive's pickle holds, and the names of the classes that were left out."""
    most_bytes = _MOST_TIMES * os.path.getsize(path) + _SLACK
    declared = sum(member.file_size for member in archive.infolist())
    if declared > most_bytes:
        raise TorchFileError(
            f"{path}: refused, it would unpack to {declared / 2**20:,.0f} MiB, more than {_MOST_TIMES} times its size; "
            "torch does not compress what it saves. If you trust the file, load it with torch and save it again"
        )
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError(
            f"{path}: a zip archive, but not one torch.save wrote (it holds {len(pickles)} data.pkl, wanted one)"
        )
    root = pickles[0].removesuffix("data.pkl")
    order = "little"
    if f"{root}byteorder" in archive.namelist():
        order = read_member(archive, archive.getinfo(f"{root}byteorder")).decode()
    if order != sys.byteorder:
        raise TorchFileError(f"{path}: written on a {order[:9]}-endian machine, this one is {sys.byteorder}-endian")
    unpickler = TensorUnpickler(archive, root, path, most_bytes)
    return unpickler.load(), unpickler.left_out
