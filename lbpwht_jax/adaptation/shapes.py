"""Traces functions on shapes, without computing anything."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

_VALUE_NEEDED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def abstract_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The shapes and dtypes of ``function(*args, **kwargs)``; nothing is computed.

    Args:
      function: takes arrays and other values, returns arrays.
      args: its arguments; arrays and ``jax.ShapeDtypeStruct`` become abstract, everything else (flags, strings) stays.
      kwargs: its keyword arguments, treated in the same way.

    Raises:
      ValueError: if the function asks for the values of arrays.
    """
    call, arrays = _of_arrays(function, args, kwargs)
    with _values_needed():
        return jax.eval_shape(call, arrays)


def abstract_program(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The jaxpr of ``function(*args, **kwargs)``, whose inputs are the arrays among the arguments, in JAX's order.

    Args:
      function: see ``abstract_call``.
      args: see ``abstract_call``.
      kwargs: see ``abstract_call``.

    Raises:
      ValueError: if the function asks for the values of arrays.
    """
    call, arrays = _of_arrays(function, args, kwargs)
    with _values_needed():
        return jax.make_jaxpr(call)(arrays).jaxpr


def _of_arrays(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Callable, list[Any]]:
    """The call as a function of its arrays alone, and these."""
    leaves, structure = jax.tree.flatten((tuple(args), dict(kwargs)))
    abstract = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))]

    def call(arrays):
        filled = list(leaves)
        for i, array in zip(abstract, arrays, strict=True):
            filled[i] = array
        args, kwargs = jax.tree.unflatten(structure, filled)
        return function(*args, **kwargs)

    return call, [leaves[i] for i in abstract]


@contextmanager
def _values_needed() -> Iterator[None]:
    try:
        yield
    except _VALUE_NEEDED as error:
        raise ValueError(
            "adapt: the model cannot be traced on shapes, as jax.jit would, for its code asks for an array's value. Give flags "
            f"as Python values (train=False), not as arrays. JAX says: {str(error).splitlines()[0]}"
        ) from error
