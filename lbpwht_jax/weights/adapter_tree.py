"""The variables of adapted models, Linen's and NNX's, as one flat dictionary, and back."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx, traverse_util

from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.lora import A, B
from lbpwht_jax.adaptation.marker import with_marker
from lbpwht_jax.adaptation.nnx import resolution_of
from lbpwht_jax.adaptation.nnx_layers import FrozenParam
from lbpwht_jax.adaptation.resolution import Resolution

Path = tuple[str, ...]


def resolution(adapted: AdaptedModule | nnx.Module) -> Resolution:
    """How rules apply to an adapted model."""
    return adapted.resolution if isinstance(adapted, AdaptedModule) else resolution_of(adapted)


def flat_variables(adapted: Any, variables: Mapping[str, Any] | None, name: str) -> dict[Path, Any]:
    """The variables by path, which starts with the collection; those of partitioned parameters still boxed.

    Args:
      adapted: the adapted model.
      variables: variables of a Linen model; ``None`` for an NNX model, which holds its own.
      name: the function that was called; it opens the messages.

    Raises:
      TypeError: if variables are missing, or given with an NNX model.
    """
    if isinstance(adapted, AdaptedModule):
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise TypeError(
                f'{name}: a Linen model needs its variables, a dictionary with "params", got {type(variables).__name__}'
            )
        return traverse_util.flatten_dict(dict(variables))
    if variables is not None:
        raise TypeError(f"{name}: an NNX model holds its variables; leave them out")
    return {path: np.asarray(variable[...]) for path, variable in _variables(adapted).items()}


def filled(adapted: Any, flat: Mapping[Path, Any]) -> Any:
    """The nested variables of a Linen model; for an NNX model a copy of it with these."""
    if isinstance(adapted, AdaptedModule):
        return with_marker(traverse_util.unflatten_dict(dict(flat)), adapted.resolution.branches)
    copy = nnx.clone(adapted)
    for path, variable in _variables(copy).items():
        variable[...] = flat[path]
    return copy


def value(leaf: Any) -> Any:
    """An array without the box that says how it is partitioned."""
    return nn.meta.unbox(leaf)


def replaced(leaf: Any, array: Any) -> Any:
    """``array``, in the box of ``leaf`` if it has one."""
    return nn.meta.replace_boxed(leaf, array)


def _variables(model: nnx.Module) -> dict[Path, nnx.Variable]:
    """An NNX model's variables as a Linen model would name them; keys and counters of random numbers are left out."""
    found = {}
    for path, node in nnx.iter_graph(model, graph=True):
        if not isinstance(node, nnx.Variable) or isinstance(node, nnx.RngState):
            continue
        parts = [str(part) for part in path]
        if parts[-1] in (A, B):  # inside the layer's product
            del parts[-2]
        found[(_collection(node), *parts)] = node
    return found


def _collection(variable: nnx.Variable) -> str:
    if isinstance(variable, nnx.Param | FrozenParam):
        return "params"
    return "batch_stats" if isinstance(variable, nnx.BatchStat) else type(variable).__name__
