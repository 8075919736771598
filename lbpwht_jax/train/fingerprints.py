"""Fingerprints of arrays, which tell whether a checkpoint holds what was saved."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def fingerprints(tree: Any) -> dict[str, int]:
    """A number per array that depends on its bits and their places, but not on the devices it is on.

    Args:
      tree: arrays of 1, 2 or 4 bytes per element.

    Returns:
      Numbers from 0 to 2 ** 32 - 1 by name, such as ``"params.head.kernel"``.
    """
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    return {name: int(value) for name, value in jax.device_get(_sums(named)).items()}


@jax.jit
def _sums(named: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _weighted_sum(leaf) for name, leaf in named.items()}


def _weighted_sum(leaf: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = (leaf if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, unsigned)).astype(jnp.uint32)
    # odd factors that differ from place to place: a changed bit shows, and so do two elements that changed places
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = math.prod(leaf.shape[axis + 1 :])
        place = place + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
