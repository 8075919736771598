"""Reads the tensors of a ``torch.save`` file without torch, and without letting its pickle run anything."""

import collections
import io
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_WRAPPERS = ("state_dict", "model")


class _FileError(ValueError):
    """An error whose message already says what is wrong with the file."""


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The state dict in a ``.pth`` or ``.bin`` file, as ``torch.save`` writes them since torch 1.6 (a zip archive).

    Only tensors, parameters, containers and plain values are unpickled. A state dict wrapped as ``{"model": ...}`` or
    ``{"state_dict": ...}`` is unwrapped; everything else in the file is ignored.

    Args:
      path: the file.

    Returns:
      The tensors by name, read-only and in their own dtypes (bfloat16 as ``jnp.bfloat16``).

    Raises:
      ValueError: if the file is not such an archive, is truncated, would run code to be unpickled, or holds no state dict.
      FileNotFoundError: if there is no such file.
    """
    path = os.fspath(path)
    try:
        with zipfile.ZipFile(path) as archive:
            content = _unpickle(archive, path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: no complete zip archive ({error}). The file is truncated, older than torch 1.6, or no torch file; "
            "download it again, or load it with torch and save it as .safetensors"
        ) from None
    for _ in _WRAPPERS:
        inner = next((content[w] for w in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(w), dict)), None)
        content = content if inner is None else inner
    tensors = {k: v for k, v in content.items() if isinstance(v, np.ndarray)} if isinstance(content, dict) else {}
    if not tensors:
        raise ValueError(f"{path}: holds no state dict; wanted tensors by name, bare or under 'model' or 'state_dict'")
    return tensors


def _unpickle(archive: zipfile.ZipFile, path: str) -> Any:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{path}: a zip archive, but not one torch.save wrote (it holds {len(pickles)} data.pkl, wanted one)")
    root = pickles[0].removesuffix("data.pkl")
    order = archive.read(root + "byteorder").decode() if root + "byteorder" in archive.namelist() else "little"
    if order != sys.byteorder:
        raise ValueError(f"{path}: written on a {order}-endian machine, this one is {sys.byteorder}-endian")
    try:
        return _TensorUnpickler(archive, root, path).load()
    except _FileError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise _FileError(f"{path}: damaged, its pickle does not read ({type(error).__name__}: {error})") from error


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors from a torch archive and refuses every global that this does not need.

    The callables that it gives to the pickle belong to it alone, so a pickle can neither run nor change others.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str, path: str):
        super().__init__(io.BytesIO(archive.read(root + "data.pkl")))
        self._archive = archive
        self._root = root
        self._path = path
        self._storages: dict[str, np.ndarray] = {}
        self._globals: Mapping[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: self._tensor(*arguments[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            **{("torch", name): name for name in _STORAGES},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._globals:
            raise _FileError(
                f"{self._path}: refused, its pickle asks for {module}.{name}, and only tensors are read. If you trust the "
                "file, load it with torch and save its state dict alone as .safetensors"
            )
        return self._globals[module, name]

    def persistent_load(self, pid: Any) -> str:
        _, kind, key, _, count = pid
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._archive.read(f"{self._root}data/{key}"), _STORAGES[kind])
        storage = self._storages[key]
        if storage.size != count or storage.dtype != _STORAGES[kind]:
            raise _FileError(f"{self._path}: storage {key} holds {storage.size} {storage.dtype}, not {count} of {kind}")
        return key

    def _tensor(self, key: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        storage = self._storages[key]
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or (math.prod(shape) and last >= storage.size):
            raise _FileError(f"{self._path}: a tensor of shape {list(shape)} reaches outside its storage of {storage.size}")
        view = storage[offset:] if math.prod(shape) else storage[:0]
        return np.lib.stride_tricks.as_strided(view, shape, [n * storage.itemsize for n in strides], writeable=False)
