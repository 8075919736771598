"""Calling functions on shapes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def abstract_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Shapes and dtypes of ``function(*args, **kwargs)``; nothing is computed.

    Args:
      function: of arrays and other things, returning arrays.
      args: its arguments; arrays and ``jax.ShapeDtypeStruct`` in them are abstract, all else (flags, strings) stays as it is.
      kwargs: its keyword arguments, likewise.
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
