"""Traces functions on shapes, without computing anything."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def abstract_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The shapes and dtypes of ``function(*args, **kwargs)``; nothing is computed.

    Args:
      function: takes arrays and other values, returns arrays.
      args: its arguments; arrays and ``jax.ShapeDtypeStruct`` become abstract, everything else (flags, strings) stays.
      kwargs: its keyword arguments, treated in the same way.
    """
    leaves, structure = jax.tree.flatten((tuple(args), dict(kwargs)))
    abstract = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))]

    def call(arrays):
        filled = list(leaves)
        for i, array in zip(abstract, arrays, strict=True):
            filled[i] = array
        args, kwargs = jax.tree.unflatten(structure, filled)
        return function(*args, **kwargs)

    return jax.eval_shape(call, [leaves[i] for i in abstract])
