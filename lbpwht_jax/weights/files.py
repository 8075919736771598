"""Reads and writes model variables as safetensors files, the weights that come with the package among them."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors

from lbpwht_jax.weights.bounded import open_regular
from lbpwht_jax.weights.write import write_safetensors

_DTYPES = ("F32", "BF16", "F16", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")

BUNDLED = "vit_micro_patch4_28"


def save_weights(path: str | os.PathLike, variables: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes variables as safetensors: one tensor per array, named by its path, such as ``params/blocks_0/mlp/fc1/kernel``.

    Args:
      path: the file; an existing one is replaced.
      variables: nested dictionaries of arrays.
      metadata: what a reader needs to rebuild the model, JSON values by name; written to the file's header.

    Raises:
      ValueError, OSError: as ``write_safetensors``.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    # safetensors writes an array's memory as it lies: transposed views must be copied first
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in flat.items()}
    header = {key: json.dumps(value) for key, value in metadata.items()}
    write_safetensors(path, arrays, header)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file by name, and its header's metadata.

    Raises:
      ValueError: if the file is damaged, is not a safetensors file or holds tensors of a dtype that NumPy and JAX have not in
        common, such as float8 and complex ones.
      FileNotFoundError: if there is no such file.
    """
    with _opened(path) as file:
        names = file.keys()
        for name in names:
            if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                raise ValueError(
                    f"{path}: {name} is of dtype {dtype}, which is not read; convert the file to {', '.join(_DTYPES[:4])}"
                )
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def read_header(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file; raises what ``read_safetensors`` raises for a file that is none."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    try:
        open_regular(path).close()
        with safetensors.safe_open(path, "np") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: no complete safetensors file ({error}); it may be truncated, get it again") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what ``save_weights`` wrote.

    Args:
      path: the file.

    Returns:
      ``(variables, metadata)``; the arrays are NumPy's.

    Raises:
      ValueError: if the file is damaged or is not one that ``save_weights`` wrote.
      FileNotFoundError: if there is no such file.
    """
    arrays, header = read_safetensors(path)
    return nested(arrays, os.fspath(path)), {key: parse_json(value, f"{path}: {key}") for key, value in header.items()}


def nested(arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested dictionaries of arrays from arrays by paths such as ``params/head/kernel``.

    Raises:
      ValueError: if one path goes on where another ends; ``where`` opens the message.
    """
    for name in arrays:
        parts = name.split("/")
        inner = next((above for n in range(1, len(parts)) if (above := "/".join(parts[:n])) in arrays), None)
        if inner is not None:
            raise ValueError(f"{where}: {inner} cannot be an array and hold {name} too; one of the two does not belong there")
    return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")


def parse_json(text: str, where: str, kind: str = "value") -> Any:
    """The value that a JSON text holds.

    Args:
      text: the JSON.
      where: what was read; it opens the message.
      kind: what it should have been, such as "file".

    Raises:
      ValueError: if it is no JSON, is nested too deeply or holds a number of too many digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON {kind}: {error}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: not a JSON {kind} that can be read: {error}") from None


def load_bundled() -> tuple[dict[str, Any], dict[str, Any]]:
    """The small vision transformer that comes with the package, pretrained on Fashion-MNIST.

    Returns:
      ``(variables, metadata)`` as from ``load_weights``; the model is ``create_model(BUNDLED, num_classes=10)``.
    """
    with bundled_file() as path:
        return load_weights(path)


def bundled_file() -> contextlib.AbstractContextManager[Path]:
    """The path of the file that ``load_bundled`` reads; it is there until the context ends."""
    return resources.as_file(resources.files("lbpwht_jax") / "bundled" / f"{BUNDLED}.safetensors")


def replace_head(variables: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the classifier of pretrained variables by that of freshly initialised ones.

    Args:
      variables: pretrained variables, for any number of classes.
      fresh: variables of the same model, for the number of classes wanted.

    Returns:
      ``variables``, with the parameters named ``head`` and ``head_dist`` taken from ``fresh``.

    Raises:
      ValueError: if the two differ elsewhere; the message says where.
    """
    flat: dict[str, Any]
    wanted: dict[str, Any]
    flat, wanted = (flax.traverse_util.flatten_dict(dict(tree), sep="/") for tree in (variables, fresh))
    heads = ("params/head/", "params/head_dist/")
    merged = {name: leaf if name.startswith(heads) else flat.get(name, np.empty(0)) for name, leaf in wanted.items()}
    wrong = [name for name, leaf in wanted.items() if np.shape(merged[name]) != np.shape(leaf)]
    wrong += [name for name in flat if name not in wanted and not name.startswith(heads)]
    if wrong:
        raise ValueError(f"the weights are not those of this model; they differ at {', '.join(sorted(wrong)[:8])}")
    return flax.traverse_util.unflatten_dict(merged, sep="/")


def count_parameters(variables: Mapping[str, Any]) -> int:
    """The number of scalars in the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
