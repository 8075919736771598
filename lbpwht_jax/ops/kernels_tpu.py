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


def _project(analysis: Any, _: Any, x: Any, out: Any) -> None:
    out[0] = _multiply(analysis, x[0]).astype(out.dtype)


def _expand(_: Any, synthesis: Any, x: Any, out: Any) -> None:
    out[0] = _multiply(synthesis, x[0]).astype(out.dtype)


def _gelu_backward(analysis: Any, synthesis: Any, g: Any, x: Any, dx: Any, projected: Any) -> None:
    before = x[0].astype(jnp.float32)
    dx[0] = (_multiply(synthesis, g[0]) * kernel_gelu_slope(before)).astype(dx.dtype)
    projected[0] = _multiply(analysis, kernel_gelu(before).astype(x.dtype)).astype(projected.dtype)


_BODIES: dict[str, Callable[..., None]] = {"project": _project, "expand": _expand, "gelu_backward": _gelu_backward}


def takes(dtype: Any, spec: SpecFields, grid: Grid, prefix_tokens: int) -> bool:
    """Whether there are kernels for a token grid in some dtype."""
    return jnp.dtype(dtype) == jnp.bfloat16 and prefix_tokens + math.prod(grid) <= _TOKENS


def tables(spec: SpecFields, grid: Grid, prefix_tokens: int, dtype: Any) -> tuple[jax.Array, ...]:
    """What a kernel reads besides its operands: the two matrices of the whole grid."""
    return tuple(jnp.asarray(matrix, dtype) for matrix in projection_matrices(spec, grid, prefix_tokens))


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
    matrices, arrays = operands[:2], operands[2:]
    batch, _, channels = arrays[0].shape
    width = next((width for width in _CHANNELS if channels % width == 0), channels)

    def tile(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, array.shape[1], width), lambda image, part: (image, 0, part))

    def program(*refs):
        _BODIES[kind](*refs)

    call = pl.pallas_call(
        program,
        grid=(batch, channels // width),
        in_specs=[*(pl.BlockSpec(m.shape, lambda image, part: (0, 0)) for m in matrices), *map(tile, arrays)],
        out_specs=[tile(shape) for shape in shapes],
        out_shape=shapes,
        cost_estimate=pl.CostEstimate(
            flops=2 * matrices[0].size * batch * channels * len(shapes),
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in (*operands, *shapes)),
            transcendentals=2 * arrays[-1].size if "gelu" in kind else 0,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=f"walsh_{kind}_{arrays[-1].shape[1]}x{channels}",
    )
    return tuple(call(*operands))
