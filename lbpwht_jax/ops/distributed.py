"""Kernels that ``vmap`` maps and that XLA splits over devices along some of their axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

Run = Callable[..., tuple[jax.Array, ...]]


def distributed(
    run: Run,
    inputs: Sequence[str],
    outputs: Sequence[str],
    split: str,
    tables: Callable[..., tuple[jax.Array, ...]] = lambda *arrays: (),
    table_axes: Sequence[str] = (),
) -> Run:
    """``run`` as a function that can be mapped and sharded.

    Args:
      run: takes tables and arrays and returns a tuple of arrays, of any batch.
      inputs: a letter for each axis of each array, separated by spaces, such as ``"b n c"``. The first one is the batch, ``b``,
        in all results and all arrays but those that a batch shares.
      outputs: the same of the results.
      split: the letters of axes along which devices can have a share each; along all others each device needs everything.
      tables: makes the tables from the arrays; each device has all of them.
      table_axes: as ``inputs``, of the tables, in letters of their own.

    Returns:
      A function of the arrays that returns a tuple of arrays.
    """

    def partition(mesh: Any, operands: Any, results: Any) -> tuple:
        axes: dict[str, Any] = {}
        for operand, letters in zip(operands, (*table_axes, *inputs), strict=True):
            for letter, axis in zip(letters.split(), operand.sharding.spec, strict=False):
                if letter in split and axes.get(letter) is None:
                    axes[letter] = axis
        shardings = (
            tuple(NamedSharding(mesh, PartitionSpec(*map(axes.get, letters.split()))) for letters in side)
            for side in (outputs, (*table_axes, *inputs))
        )
        return mesh, run, *shardings

    partitioned = custom_partitioning(run)
    rule = f"{', '.join((*table_axes, *inputs))} -> {', '.join(outputs)}"
    letters = dict.fromkeys(" ".join((*table_axes, *inputs, *outputs)).split())
    whole = tuple(letter for letter in letters if letter not in split)
    partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)

    @custom_vmap
    def mapped(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        operands = (*tables(*arrays), *arrays)
        # inside shard_map each device has its own part already
        return run(*operands) if jax.typeof(arrays[0]).manual_axis_type.varying else partitioned(*operands)

    @mapped.def_vmap
    def _(size: int, batched: list[bool], *arrays: jax.Array) -> tuple:
        shared = [not letters.startswith("b") for letters in inputs]
        if any(own and for_all for own, for_all in zip(batched, shared, strict=True)):
            whole = tuple(_repeated(a, size, own) for a, own in zip(arrays, batched, strict=True))
            results = jax.lax.map(lambda operands: mapped(*operands), whole)
            return results, (True,) * len(results)
        flat = [
            a if for_all else _repeated(a, size, own).reshape(size * a.shape[own], *a.shape[own + 1 :])
            for a, own, for_all in zip(arrays, batched, shared, strict=True)
        ]
        results = mapped(*flat)
        return tuple(r.reshape(size, -1, *r.shape[1:]) for r in results), (True,) * len(results)

    return mapped


def _repeated(array: jax.Array, size: int, mapped: bool) -> jax.Array:
    return array if mapped else jnp.broadcast_to(array, (size, *array.shape))
