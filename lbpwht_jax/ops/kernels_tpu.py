"""Walsh transforms as kernels for TPUs, in Pallas (Mosaic).

A program of the kernel multiplies all tokens of an image, for up to 1536 channels, by the one matrix of the whole grid.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lbpwht_jax.ops.basis import projection_matrices
from lbpwht_jax.ops.gelu import kernel_gelu, kernel_gelu_slope
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

# Up to this many tokens one matrix takes no more time than reading them does.
_TOKENS = 256
# Channels of a program; those of a layer that is no multiple of any are taken together.
_CHANNELS = (1536, 1024, 896, 768, 512, 384, 256, 128)


def _multiply(matrix: Any, rows: jax.Array) -> jax.Array:
    return jnp.dot(matrix[...], rows, preferred_element_type=jnp.float32)


def _apply(matrix: Any, x: Any, out: Any) -> None:
    out[0] = _multiply(matrix, x[0]).astype(out.dtype)


def _project_gelu(matrix: Any, x: Any, out: Any) -> None:
    out[0] = _multiply(matrix, kernel_gelu(x[0].astype(jnp.float32)).astype(x.dtype)).astype(out.dtype)


def _expand_gelu_slope(matrix: Any, x: Any, before: Any, out: Any) -> None:
    slope = kernel_gelu_slope(before[0].astype(jnp.float32))
    out[0] = (_multiply(matrix, x[0]) * slope).astype(out.dtype)


_BODIES: dict[str, Callable[..., None]] = {
    "project": _apply,
    "expand": _apply,
    "project_gelu": _project_gelu,
    "expand_gelu_slope": _expand_gelu_slope,
}


def takes(dtype: Any, spec: SpecFields, grid: Grid, prefix_tokens: int) -> bool:
    """Whether there are kernels for a token grid in some dtype."""
    return jnp.dtype(dtype) == jnp.bfloat16 and prefix_tokens + math.prod(grid) <= _TOKENS


def tables(kind: str, spec: SpecFields, grid: Grid, prefix_tokens: int, dtype: Any) -> tuple[jax.Array, ...]:
    """What a kernel reads besides its operands: the matrix of the whole grid."""
    analysis, synthesis = projection_matrices(spec, grid, prefix_tokens)
    return (jnp.asarray(synthesis if kind.startswith("expand") else analysis, dtype),)


def run(kind: str, shapes: list[jax.ShapeDtypeStruct], *operands: jax.Array, interpret: bool = False) -> tuple:
    """Runs one kernel.

    Args:
      kind: which one, as in ``lbpwht_jax.ops.kernels``.
      shapes: of the results.
      *operands: the ``tables``, then arrays ``[batch, tokens or coefficients, channels]``.
      interpret: runs it on any platform, slowly, as a test does.

    Returns:
      The results.
    """
    matrix, *arrays = operands
    batch, _, channels = arrays[0].shape
    width = next((width for width in _CHANNELS if channels % width == 0), channels)

    def tile(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, array.shape[1], width), lambda image, part: (image, 0, part))

    def program(*refs):
        _BODIES[kind](*refs)

    call = pl.pallas_call(
        program,
        grid=(batch, channels // width),
        in_specs=[pl.BlockSpec(matrix.shape, lambda image, part: (0, 0)), *map(tile, arrays)],
        out_specs=[tile(shape) for shape in shapes],
        out_shape=shapes,
        cost_estimate=pl.CostEstimate(
            flops=2 * matrix.size * batch * channels,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in (*operands, *shapes)),
            transcendentals=2 * arrays[-1].size if "gelu" in kind else 0,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=f"walsh_{kind}_{arrays[-1].shape[1]}x{channels}",
    )
    return tuple(call(*operands))
