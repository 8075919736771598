"""Model variables as safetensors files, and the weights that come with the package."""

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
import safetensors.numpy

BUNDLED = "vit_micro_patch4_28"


def save_weights(path: str | os.PathLike, variables: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes variables as safetensors, one tensor a leaf, named by its path, such as ``params/blocks_0/mlp/fc1/kernel``.

    Args:
      path: of the file; an existing one is replaced.
      variables: nested dictionaries of arrays.
      metadata: what a reader needs to rebuild the model, JSON values by name; goes into the file's header.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    arrays = {name: np.asarray(leaf) for name, leaf in flat.items()}
    header = {key: json.dumps(value) for key, value in metadata.items()}
    safetensors.numpy.save_file(arrays, path, header)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file by name, and its header's metadata.

    Raises:
      ValueError: if the file is no safetensors file, or a damaged one.
      FileNotFoundError: if there is none.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: no complete safetensors file ({error}); it may be truncated, get it again") from None


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what ``save_weights`` wrote.

    Args:
      path: of the file.

    Returns:
      ``(variables, metadata)``, arrays as numpy's.

    Raises:
      ValueError: if the file is no safetensors file, or a damaged one.
      FileNotFoundError: if there is none.
    """
    arrays, header = read_safetensors(path)
    return flax.traverse_util.unflatten_dict(arrays, sep="/"), {key: json.loads(value) for key, value in header.items()}


def load_bundled() -> tuple[dict[str, Any], dict[str, Any]]:
    """The small vision transformer that comes with the package, pretrained on Fashion-MNIST.

    Returns:
      ``(variables, metadata)``, as ``load_weights`` does; the model is ``create_model(BUNDLED, num_classes=10)``.
    """
    with bundled_file() as path:
        return load_weights(path)


def bundled_file() -> contextlib.AbstractContextManager[Path]:
    """The file ``load_bundled`` reads, for as long as the context lasts."""
    return resources.as_file(resources.files("lbpwht_jax") / "bundled" / f"{BUNDLED}.safetensors")


def replace_head(variables: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Pretrained variables with the classifier of freshly initialised ones.

    Args:
      variables: pretrained, for any number of classes.
      fresh: of the same model, for the number of classes wanted.

    Returns:
      ``variables`` but for the parameters named ``head`` and ``head_dist``, which are ``fresh``'s.

    Raises:
      ValueError: if the two differ elsewhere, naming where.
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
    """Number of trainable scalars."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
