"""Walsh transforms as kernels for NVIDIA GPUs, in Pallas (Triton).

A program of the kernel reads a cell's tokens for up to 128 channels, wherever in memory they are, and multiplies by the cell's
small matrix: tokens are read once, and nothing is padded or copied, which cuBLAS would do with every operand of 197 tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lbpwht_jax.ops.cells import MISSING, grid_cells
from lbpwht_jax.ops.coders import coded_slopes, slope_codes
from lbpwht_jax.ops.gelu import kernel_gelu, kernel_gelu_slope
from lbpwht_jax.ops.pallas_gpu import call
from lbpwht_jax.ops.platforms import is_narrow
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

_CHANNELS = 128


class _Rows:
    """Those rows of ``[batch, rows, channels]`` arrays, and those channels, that a program works on."""

    def __init__(self, image: Any, rows: jax.Array, channels: jax.Array, channel_count: int):
        self.index = image, rows[:, None], channels[None, :]
        self.mask = (rows != MISSING)[:, None] & (channels < channel_count)[None, :]

    def load(self, ref: Any) -> jax.Array:
        return plgpu.load(ref.at[self.index], mask=self.mask, other=0)

    def store(self, ref: Any, value: jax.Array) -> None:
        plgpu.store(ref.at[self.index], value.astype(ref.dtype), mask=self.mask)


def _multiply(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.dot(matrix, rows, preferred_element_type=jnp.float32)


def _project(tokens: _Rows, coefficients: _Rows, analysis: jax.Array, _: jax.Array, x: Any, out: Any) -> None:
    coefficients.store(out, _multiply(analysis, tokens.load(x)))


def _expand(tokens: _Rows, coefficients: _Rows, _: jax.Array, synthesis: jax.Array, x: Any, out: Any) -> None:
    tokens.store(out, _multiply(synthesis, coefficients.load(x)))


def _gelu_backward(
    tokens: _Rows, coefficients: _Rows, analysis: jax.Array, synthesis: jax.Array, g: Any, x: Any, dx: Any, projected: Any
) -> None:
    before = tokens.load(x).astype(jnp.float32)
    tokens.store(dx, _multiply(synthesis, coefficients.load(g)) * kernel_gelu_slope(before))
    coefficients.store(projected, _multiply(analysis, kernel_gelu(before).astype(x.dtype)))


def _gelu_backward_projected(
    tokens: _Rows, coefficients: _Rows, analysis: jax.Array, synthesis: jax.Array, g: Any, x: Any, dx: Any, projected: Any
) -> None:
    before = tokens.load(x).astype(jnp.float32)
    through = _multiply(synthesis, coefficients.load(g)) * kernel_gelu_slope(before)
    coefficients.store(dx, _multiply(analysis, through.astype(x.dtype)))
    coefficients.store(projected, _multiply(analysis, kernel_gelu(before).astype(x.dtype)))


def _gelu_coded(
    tokens: _Rows, coefficients: _Rows, analysis: jax.Array, _: jax.Array, x: Any, out: Any, projected: Any, codes: Any
) -> None:
    before = tokens.load(x).astype(jnp.float32)
    after = kernel_gelu(before).astype(x.dtype)
    tokens.store(out, after)
    tokens.store(codes, slope_codes(kernel_gelu_slope(before)))
    coefficients.store(projected, _multiply(analysis, after))


def _slope_projected(
    tokens: _Rows, coefficients: _Rows, analysis: jax.Array, synthesis: jax.Array, g: Any, codes: Any, dx: Any
) -> None:
    through = _multiply(synthesis, coefficients.load(g)) * coded_slopes(tokens.load(codes))
    coefficients.store(dx, _multiply(analysis, through.astype(g.dtype)))


# What a program does, and how many products of the cells' matrices it makes.
_BODIES: dict[str, tuple[Callable[..., None], int]] = {
    "project": (_project, 1),
    "expand": (_expand, 1),
    "gelu_backward": (_gelu_backward, 2),
    "gelu_backward_projected": (_gelu_backward_projected, 3),
    "gelu_coded": (_gelu_coded, 1),
    "slope_projected": (_slope_projected, 2),
}


def takes(dtype: Any, spec: SpecFields, grid: Grid, prefix_tokens: int) -> bool:
    """Whether there are kernels for a token grid in some dtype."""
    return is_narrow(dtype) and grid_cells(spec, grid, prefix_tokens) is not None


def tables(spec: SpecFields, grid: Grid, prefix_tokens: int, dtype: Any) -> tuple[jax.Array, ...]:
    """What a kernel reads besides its operands: each cell's tokens, its coefficients, its two matrices."""
    cells: Any = grid_cells(spec, grid, prefix_tokens)
    matrices = (jnp.asarray(matrix, dtype) for matrix in (cells.analysis, cells.synthesis))
    return jnp.asarray(cells.tokens), jnp.asarray(cells.coefficients), *matrices


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
    body, products = _BODIES[kind]
    batch, _, channels = operands[-1].shape
    count, width = len(operands[0]), min(_CHANNELS, max(16, 1 << (channels - 1).bit_length()))

    def program(tokens_ref, coefficients_ref, analysis_ref, synthesis_ref, *refs):
        image, cell = pl.program_id(0) // count, pl.program_id(0) % count
        columns = pl.program_id(1) * width + jnp.arange(width)
        tokens = _Rows(image, plgpu.load(tokens_ref.at[cell]), columns, channels)
        coefficients = _Rows(image, plgpu.load(coefficients_ref.at[cell]), columns, channels)
        matrices = plgpu.load(analysis_ref.at[cell]), plgpu.load(synthesis_ref.at[cell])
        body(tokens, coefficients, *matrices, *refs)

    return call(
        program,
        f"walsh_{kind}",
        f"{operands[-1].shape[1]}x{channels}",
        (batch * count, pl.cdiv(channels, width)),
        shapes,
        operands,
        flops=2 * operands[2].size * batch * channels * products,
        transcendentals=2 * operands[-1].size if "gelu" in kind else 0,
        interpret=interpret,
    )
