"""Finds files of weights, on this machine or on the Hugging Face hub, and reads their tensors."""

import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lbpwht_jax.models import list_models
from lbpwht_jax.weights.files import parse_json, read_header, read_safetensors
from lbpwht_jax.weights.torch_file import read_torch_file

_HUB = re.compile(r"hf-hub:|\w[\w.-]*/\w[\w.-]*$")
_SUFFIXES = (".safetensors", ".pth", ".bin")
_NAMES = ("model.safetensors", "pytorch_model.bin")
_OF_A_RUN = "weights.safetensors"


def read_weights(source: str | os.PathLike, *, offline: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a file, folder or hub id, by the names they have there.

    Args:
      source: a ``.safetensors``, ``.pth`` or ``.bin`` file; a folder with ``model.safetensors`` or ``pytorch_model.bin``; or
        a Hugging Face hub id, or timm's name of weights, ``NAME.TAG``, for ``timm/NAME.TAG``; both need the extra ``[hub]``.
      offline: uses only the hub's local cache, without the network.

    Raises:
      ValueError: if the file is damaged, of an unknown kind, or would run code.
      FileNotFoundError: if the file or folder is missing, or the hub (or its cache, if offline) has no such weights.
      ImportError: if the source is a hub id and huggingface_hub is missing.
    """
    path = local_file(source) or download(hub_id(source), offline)
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if path.suffix in _SUFFIXES:
        return read_torch_file(path)
    raise ValueError(
        f"{path}: weights are read from files ending in {', '.join(_SUFFIXES)}, not in {path.suffix or 'nothing'!r}"
    )


def local_file(source: str | os.PathLike) -> Path | None:
    """The file on this machine that a source names; ``None`` if it is a hub id.

    Raises:
      FileNotFoundError: if it is neither, or a folder without weights.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in (*_NAMES, _OF_A_RUN) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{source}: the folder has neither {' nor '.join(_NAMES)}, nor the {_OF_A_RUN} of a run")
        return found[0]
    if path.is_file():
        return path
    if path.suffix in _SUFFIXES or not _HUB.match(hub_id(source)):
        raise FileNotFoundError(
            f"{source}: no such file or folder, nor a hub id such as timm/efficientformer_l1.snap_dist_in1k"
        )
    return None


def hub_id(source: str | os.PathLike) -> str:
    """The hub's name of a source that is no file: without ``hf-hub:``, with ``timm/`` before a known model's ``NAME.TAG``."""
    name = os.fspath(source).removeprefix("hf-hub:")
    return f"timm/{name}" if re.fullmatch(r"[^./]+\.\w+", name) and name.partition(".")[0] in list_models() else name


def class_names(source: str | os.PathLike, *, offline: bool = False) -> list[str] | None:
    """The names of the classes in the header of a ``.safetensors`` file of this library; ``None`` if it has none.

    Args:
      source: as for ``read_weights``.
      offline: as for ``read_weights``.

    Raises:
      ValueError: if the header's are no list of names; and what ``read_weights`` raises.
    """
    path = local_file(source) or download(hub_id(source), offline)
    text = read_header(path).get("classes") if path.suffix == ".safetensors" else None
    if text is None:
        return None
    names = parse_json(text, f"{path}: classes")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: the header's classes must be a list of names, got {text[:80]}")
    return names


def _unresolved(endpoint: str) -> str:
    """The host of an address if its name cannot be resolved, which tells at once what the hub's client tries for a while."""
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    if urllib.request.getproxies():
        return ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return host
    return ""


def download(repository: str, offline: bool, names: Sequence[str] = _NAMES) -> Path:
    """A file of a repository of the hub, the first of ``names`` that it has; errors are those of ``read_weights``."""
    try:
        from huggingface_hub import constants, errors, hf_hub_download  # noqa: PLC0415 - optional, of the extra hub
    except ImportError:
        raise ImportError(
            f"{repository}: no such file or folder, and reading from the Hugging Face hub needs huggingface_hub; "
            "pip install 'lbpwht_jax[hub]', or pass the path of a file"
        ) from None
    unreachable = "" if offline else _unresolved(constants.ENDPOINT)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=offline or bool(unreachable)))
        except errors.LocalEntryNotFoundError as error:
            if not offline:
                why = f", whose name {unreachable} cannot be resolved: there is no network" if unreachable else ""
                raise FileNotFoundError(
                    f"{repository}: not in the hub's local cache, nor could the hub be reached{why}; download it elsewhere and "
                    "pass the path of the file"
                ) from error
        except errors.EntryNotFoundError:
            continue
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{repository}: no such file or folder, and the hub has no such repository, or it needs a login"
            ) from error
    place = "the hub's local cache" if offline else "the hub"
    raise FileNotFoundError(f"{repository}: {place} has neither {' nor '.join(names)} of it")
