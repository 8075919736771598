"""Reads and writes model variables as safetensors files, the weights that come with the package among them."""

import contextlib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors

from lbpwht_jax.weights.write import write_safetensors

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
    arrays = {name: np.asarray(leaf) for name, leaf in flat.items()}
    header = {key: json.dumps(value) for key, value in metadata.items()}
    write_safetensors(path, arrays, header)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file by name, and its header's metadata.

    Raises:
      ValueError: if the file is damaged or is not a safetensors file.
      FileNotFoundError: if there is no such file.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: no complete safetensors file ({error}); it may be truncated, get it again") from None


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what ``save_weights`` wrote.

    Args:
      path: the file.

    Returns:
      ``(variables, metadata)``; the arrays are NumPy's.

    Raises:
      ValueError: if the file is damaged or is not a safetensors file.
      FileNotFoundError: if there is no such file.
    """
    arrays, header = read_safetensors(path)
    return flax.traverse_util.unflatten_dict(arrays, sep="/"), {key: json.loads(value) for key, value in header.items()}


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
