"""Splits parameters into those that are trained and those that stay as they are."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util


def split_params(params: Mapping[str, Any], trainable: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits nested parameters into trained and frozen ones.

    Args:
      params: nested dictionaries of arrays.
      trainable: whether the parameter at a path, such as ``"blocks_0/mlp/fc1/kernel"``, is trained.

    Returns:
      ``(trained, frozen)``, each nested as ``params`` and holding only its own leaves.

    Raises:
      ValueError: if nothing is trained.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(params))
    trained = {path: leaf for path, leaf in flat.items() if trainable("/".join(path))}
    if not trained:
        raise ValueError("every parameter is frozen, so there is nothing to train; let a rule leave some out")
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join_params(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes ``split_params``."""
    leaves = traverse_util.flatten_dict(dict(trained)) | traverse_util.flatten_dict(dict(frozen))
    return traverse_util.unflatten_dict(leaves)
