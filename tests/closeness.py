"""Trees compared tensor by tensor, each in units of its largest expected value or of its length."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def in_units_of(expected: Any, tree: Any) -> Any:
    """Every tensor of ``tree`` over the largest absolute value of the same tensor of ``expected``."""
    return jax.tree.map(lambda x, y: x / jnp.max(jnp.abs(y)), tree, expected)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """No entry differs by more than ``tolerance`` times the largest value of its tensor."""
    chex.assert_trees_all_close(in_units_of(expected, actual), in_units_of(expected, expected), rtol=0, atol=tolerance)


def difference(actual: jax.Array, expected: jax.Array) -> float:
    """The largest difference between two tensors, in units of the largest expected value."""
    chex.assert_equal_shape([actual, expected])
    return float(jnp.max(jnp.abs(in_units_of(expected, actual - expected))))


def assert_near(own: Sequence[jax.Array], other: Sequence[jax.Array], share: float) -> None:
    """Each tensor's difference is less than a share of its length, which is not zero."""
    for a, b in zip(own, other, strict=True):
        chex.assert_equal_shape((a, b))
        a, b = (np.asarray(tensor, np.float32) for tensor in (a, b))
        assert np.linalg.norm(a - b) < share * np.linalg.norm(b), (a.shape, share)
