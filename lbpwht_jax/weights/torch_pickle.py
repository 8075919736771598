"""Unpickles tensors from a torch archive; nothing that the pickle names is run or even imported."""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lbpwht_jax.weights.bounded import read_member

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
_PLAIN_VALUES = {
    "copy_reg._reconstructor",
    "copyreg._reconstructor",
    "_codecs.encode",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.Size",
    "torch.device",
}
"""Functions that pickles of plain values call; what they would make is left out."""

_LARGEST_PICKLE = 2**24
_MOST_IN_A_TUPLE = 10_000
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")


class TorchFileError(ValueError):
    """An error whose message already says what is wrong with the file."""


class _StandIn(type):
    """The class of the stand-ins for what is left out. A pickle that calls one, rather than making an object, is refused."""

    where: str
    name: str

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        if cls.name in _PLAIN_VALUES:
            return object.__new__(cls)
        raise TorchFileError(
            f"{cls.where}: refused, its pickle asks for {cls.name}, and only tensors are read. If you trust the file, load it "
            "with torch and save its state dict alone as .safetensors"
        )


class _LeftOut(metaclass=_StandIn):
    """Takes what an object of an unknown class is made of, and keeps nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> "_LeftOut":
        return object.__new__(cls)

    def _ignore(self, *arguments: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors; all objects of classes that these do not need become empty stand-ins.

    The callables that it gives to the pickle belong to it alone, so a pickle can neither run nor change others.

    Attributes:
      left_out: names of the classes and functions that were not read.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str, path: str, most_bytes: int):
        """Checks the pickle; ``load`` reads it.

        Args:
          archive: what torch wrote.
          root: the folder in it that holds everything, with a slash at its end.
          path: of the archive, for messages.
          most_bytes: how large all tensors may be together.

        Raises:
          TorchFileError: if the pickle would take far more memory or time than its size.
          Exception: (of many types) if it is damaged.
        """
        member = archive.getinfo(f"{root}data.pkl")
        if member.file_size > _LARGEST_PICKLE:
            raise TorchFileError(f"{path}: its pickle has {member.file_size / 2**20:,.0f} MiB, more than tensors need")
        data = bytes(read_member(archive, member))
        _check_size(data, path)
        super().__init__(io.BytesIO(data))
        self._archive = archive
        self._root = root
        self._path = path
        self._bytes_left = most_bytes
        self._storages: dict[str, np.ndarray] = {}
        self.left_out: set[str] = set()
        self._globals: Mapping[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: self._tensor(*arguments[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            **{("torch", name): name for name in _STORAGES},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._globals:
            return self._globals[module, name]
        self.left_out.add(f"{module}.{name}")
        return _StandIn("LeftOut", (_LeftOut,), {"where": self._path, "name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> str:
        _, kind, key, _, count = pid
        if kind not in _STORAGES:
            raise TorchFileError(f"{self._path}: storage {key} is of {getattr(kind, 'name', kind)}, which is not read")
        dtype = np.dtype(_STORAGES[kind])
        if key not in self._storages:
            member = self._archive.getinfo(f"{self._root}data/{key}")
            self._check_storage(key, member.file_size // dtype.itemsize, dtype, kind, count)
            self._storages[key] = np.frombuffer(read_member(self._archive, member), dtype)
        self._check_storage(key, self._storages[key].size, self._storages[key].dtype, kind, count)
        return key

    def _check_storage(self, key: str, size: int, dtype: np.dtype, kind: str, count: Any) -> None:
        if size != count or dtype != _STORAGES[kind]:
            raise TorchFileError(f"{self._path}: storage {key} holds {size} {dtype}, not {count} of {kind}")

    def _tensor(self, key: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        storage = self._storages[key]
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or (math.prod(shape) and last >= storage.size):
            raise TorchFileError(f"{self._path}: a tensor of shape {list(shape)} reaches outside its storage of {storage.size}")
        self._bytes_left -= math.prod(shape) * storage.itemsize
        if self._bytes_left < 0:
            raise TorchFileError(
                f"{self._path}: refused, its tensors, the last of shape {list(shape)}, are far larger than the file; if it is "
                "what you want, load it with torch and save their copies as .safetensors"
            )
        view = storage[offset:] if math.prod(shape) else storage[:0]
        return np.lib.stride_tricks.as_strided(view, shape, [n * storage.itemsize for n in strides], writeable=False)


def _check_size(data: bytes, path: str) -> None:
    """Refuses a pickle that makes Python set aside memory for memo entries that are not there, or tuples whose hash recurs
    without end: nested by the million, or holding the same tuples again and again."""
    stack: list[int | None] = []  # the number of things in each tuple, 1 for all else; None for a mark
    memo: dict[int, int | None] = {}
    opcodes: Iterator[Any] = pickletools.genops(data)
    for opcode, argument, position in opcodes:
        if opcode.name in _PUTS or opcode.name == "MEMOIZE":
            index = len(memo) if opcode.name == "MEMOIZE" else argument
            if index > position:
                raise TorchFileError(f"{path}: refused, its pickle has {position} bytes before entry {index} of its memo")
            memo[index] = stack[-1]
            continue
        if opcode.name in _GETS:
            stack.append(memo[argument])
            continue
        taken = _take(stack, opcode)
        is_tuple = opcode.stack_after == [pickletools.pytuple]
        size = 1 + sum(taken) if is_tuple else 1
        if size > _MOST_IN_A_TUPLE:
            raise TorchFileError(f"{path}: refused, its pickle nests a tuple of more than {_MOST_IN_A_TUPLE} things")
        stack += [None if kind is pickletools.markobject else size for kind in opcode.stack_after]


def _take(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Takes off the stack what an opcode uses."""
    before, taken = list(opcode.stack_before), []
    if pickletools.markobject in before:
        while (size := stack.pop()) is not None:
            taken.append(size)
        before = before[: before.index(pickletools.markobject)]
    return taken + [size for _ in before if (size := stack.pop()) is not None]
