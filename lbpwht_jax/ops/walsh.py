"""Walsh-Hadamard matrices in sequency order and the fast transform that agrees with them.

Both follow from one recursion (the construction of LBP-WHT, section 3, with its rows in sequency order). If row k of
``W_n`` is ``w_k``, which has k sign changes and so ends in the sign ``s_k = (-1)**k``, then

    W_2n[2k]     = [1,  s_k] (x) w_k        (2k sign changes)
    W_2n[2k + 1] = [1, -s_k] (x) w_k        (2k + 1 sign changes)

where ``(x)`` is the Kronecker product.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _check_order(n: int) -> int:
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"the order of a Walsh transform must be an integer, got {n!r}") from None
    if n < 1 or n & (n - 1):
        raise ValueError(f"the order of a Walsh transform must be a power of two (1, 2, 4, 8, ...), got {n}")
    return n


def walsh_matrix(n: int, dtype: Any = np.float32) -> np.ndarray:
    """The Walsh-Hadamard matrix of order ``n``, rows in sequency order.

    Args:
      n: order of the matrix, a power of two.
      dtype: dtype of the result.

    Returns:
      ``[n, n]`` array of +1 and -1. Row k changes sign k times; the matrix is symmetric and its square is ``n * I``.

    Raises:
      ValueError: if ``n`` is not a power of two.
      TypeError: if ``n`` is not an integer.
    """
    n = _check_order(n)
    rows = np.ones((1, 1))
    while len(rows) < n:
        sign = (-1.0) ** np.arange(len(rows))[:, None]
        rows = np.stack(
            [np.concatenate([rows, sign * rows], axis=1), np.concatenate([rows, -sign * rows], axis=1)], axis=1
        ).reshape(2 * len(rows), -1)
    return rows.astype(dtype)


def fast_walsh_hadamard(x: jax.Array, axis: int = -1) -> jax.Array:
    """Applies ``walsh_matrix(n)`` along one axis of length ``n`` with ``n log2(n)`` additions.

    The transform is not normalised: applied twice it multiplies by ``n``.

    Args:
      x: array of any shape whose size along ``axis`` is a power of two; floating point, complex, int32 or int64.
      axis: the axis to transform.

    Returns:
      Array of the shape and dtype of ``x``; index k along ``axis`` holds the coefficient of sequency k.

    Raises:
      ValueError: if the size along ``axis`` is not a power of two, or ``x`` has no such axis.
      TypeError: if sums of ``n`` elements do not fit the dtype of ``x``: narrow integers, unsigned ones and booleans.
    """
    x = jnp.asarray(x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is out of range for an array of shape {x.shape}")
    if not (jnp.issubdtype(x.dtype, jnp.inexact) or x.dtype in (jnp.int32, jnp.int64)):
        raise TypeError(
            f"fast_walsh_hadamard: sums of {x.dtype} overflow, and the result has the dtype of x; cast it to int32 or to a "
            "floating-point dtype first"
        )
    x = jnp.moveaxis(x, axis, -1)
    n = _check_order(x.shape[-1])
    shape = x.shape
    x = x[..., None]
    width = 1
    while width < n:
        sign = jnp.asarray((-1.0) ** np.arange(width), x.dtype).reshape((1,) * len(shape) + (width,))
        pairs = x.reshape(*shape[:-1], n // (2 * width), 2, width)
        first, second = pairs[..., 0, :], pairs[..., 1, :] * sign
        width *= 2
        x = jnp.stack([first + second, first - second], axis=-1).reshape(*shape[:-1], n // width, width)
    return jnp.moveaxis(x.reshape(shape), -1, axis)
