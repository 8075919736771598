"""How all kernels for GPUs are called: Pallas, lowered through Triton."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lbpwht_jax.ops.coders import middle, row_factor


def like(array: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result beside ``array``: within ``shard_map`` it varies over the same axes of the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def as_bytes(x: jax.Array) -> jax.Array:
    """uint8 of float32 numbers, 0 to 255 once rounded; of NaN, any.

    The last bits of ``2 ** 23 + x`` are x, rounded to even: an addition, where a conversion takes a GPU as long as eight.
    """
    return (lax.bitcast_convert_type(x + 2.0**23, jnp.int32) & 255).astype(jnp.uint8)


def row_bytes(pieces: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """What ``Rows`` keeps of rows in 8 bits.

    Args:
      pieces: of the rows, side by side, each float32 ``[rows, columns]``.

    Returns:
      The uint8 codes of each piece; the steps, ``[rows, 1]``.
    """
    largest = [jnp.max(jnp.abs(piece), axis=1, keepdims=True) for piece in pieces]
    factor, steps = row_factor(functools.reduce(jnp.maximum, largest), 8)
    return [as_bytes(piece * factor + middle(8)) for piece in pieces], steps


def call(
    program: Callable[..., None],
    name: str,
    sizes: str,
    grid: tuple[int, ...],
    shapes: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[jax.Array],
    *,
    flops: int,
    transcendentals: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs a kernel.

    Args:
      program: what one program does, called with references to the operands and the results.
      name: what a profile shows.
      sizes: added to the name, so that counts tell kernels of different shapes apart.
      grid: how many programs there are, along up to three axes.
      shapes: of the results.
      operands: arrays.
      flops: of all programs' products, 2 per multiply-add.
      transcendentals: exponentials and the like, of all programs.
      interpret: runs it on any platform, slowly, as a test does.

    Returns:
      The results.
    """
    program.__name__ = name
    moved = sum(array.size * array.dtype.itemsize for array in (*operands, *shapes))
    run = pl.pallas_call(
        program,
        grid=grid,
        out_shape=list(shapes),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=transcendentals),
        name=f"{name}_{sizes}",
    )
    return tuple(run(*operands))
