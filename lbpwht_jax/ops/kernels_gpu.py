"""Walsh transforms as kernels for NVIDIA GPUs, in Pallas (Triton).

A program of the kernel reads a cell's tokens for some channels, wherever in memory they are, and multiplies by the cell's small
matrix: tokens are read once, and nothing is padded or copied, which cuBLAS would do with every operand of 197 tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lbpwht_jax.ops.cells import MISSING, grid_cells
from lbpwht_jax.ops.coders import KERNEL_BITS, coded_slopes, companded_steps, expanded_codes, slope_steps
from lbpwht_jax.ops.gelu import kernel_gelu
from lbpwht_jax.ops.pallas_gpu import as_bytes, call
from lbpwht_jax.ops.platforms import is_narrow
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

# Channels of a program: of one that computes more between its products, few enough that a cell of 64 tokens fits the registers.
_WIDE, _NARROW = 128, 64


class _Rows:
    """Those rows of ``[batch, rows, channels]`` arrays, and those channels, that a program works on."""

    def __init__(self, image: Any, rows: jax.Array, channels: jax.Array, channel_count: int):
        self.index = image, rows[:, None], channels[None, :]
        self.mask = (rows != MISSING)[:, None] & (channels < channel_count)[None, :]

    def load(self, ref: Any, other: int = 0) -> jax.Array:
        return plgpu.load(ref.at[self.index], mask=self.mask, other=other)

    def store(self, ref: Any, value: jax.Array) -> None:
        plgpu.store(ref.at[self.index], value.astype(ref.dtype), mask=self.mask)


class _Channels:
    """What a program needs of its channels by themselves."""

    def __init__(self, image: Any, cell: Any, channels: jax.Array, channel_count: int):
        self.image, self.cell, self.channels = image, cell, channels
        self.mask = channels < channel_count

    def norm(self, ref: Any) -> tuple[jax.Array, ...]:
        """Mean, inverse, scale and bias, the rows of ``[4, channels]``, each as it broadcasts to tokens."""
        return tuple(plgpu.load(ref.at[row, self.channels], mask=self.mask, other=0)[None, :] for row in range(4))

    def store_sums(self, ref: Any, *sums: jax.Array) -> None:
        """Stores this cell's part of ``[batch, cells, sums, channels]``."""
        for which, total in enumerate(sums):
            plgpu.store(ref.at[self.image, self.cell, which, self.channels], total, mask=self.mask)


def _once(function: Callable[[], tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    """``function()``, computed once: Triton would compute it anew for each layout that its results are needed in.

    It does not look through a loop, which this is, of one pass.
    """
    shapes = jax.eval_shape(function)
    start = jnp.int32(0), *(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)
    return lax.while_loop(lambda carry: carry[0] < 1, lambda carry: (carry[0] + 1, *function()), start)[1:]


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
    after, slope = _once(lambda: kernel_gelu(before))
    tokens.store(dx, _multiply(synthesis, coefficients.load(g)) * slope)
    coefficients.store(projected, _multiply(analysis, after.astype(x.dtype)))


def _gelu_backward_projected(
    tokens: _Rows, coefficients: _Rows, analysis: jax.Array, synthesis: jax.Array, g: Any, x: Any, dx: Any, projected: Any
) -> None:
    before = tokens.load(x).astype(jnp.float32)
    after, slope = _once(lambda: kernel_gelu(before))
    through = _multiply(synthesis, coefficients.load(g)) * slope
    coefficients.store(dx, _multiply(analysis, through.astype(x.dtype)))
    coefficients.store(projected, _multiply(analysis, after.astype(x.dtype)))


def _gelu_coded(
    tokens: _Rows, coefficients: _Rows, analysis: jax.Array, _: jax.Array, x: Any, out: Any, projected: Any, codes: Any
) -> None:
    before = tokens.load(x).astype(jnp.float32)
    after, slope = _once(lambda: kernel_gelu(before))
    narrow = after.astype(x.dtype)
    tokens.store(out, narrow)
    tokens.store(codes, as_bytes(slope_steps(slope)))
    coefficients.store(projected, _multiply(analysis, narrow))


def _slope_projected(
    tokens: _Rows, coefficients: _Rows, analysis: jax.Array, synthesis: jax.Array, g: Any, codes: Any, dx: Any
) -> None:
    through = _multiply(synthesis, coefficients.load(g)) * coded_slopes(tokens.load(codes))
    coefficients.store(dx, _multiply(analysis, through.astype(g.dtype)))


def _norm_gelu_coded(
    tokens: _Rows,
    coefficients: _Rows,
    analysis: jax.Array,
    _: jax.Array,
    channels: _Channels,
    norm: Any,
    x: Any,
    out: Any,
    projected: Any,
    codes: Any,
) -> None:
    mean, inverse, scale, bias = channels.norm(norm)
    before = tokens.load(x).astype(jnp.float32)

    def outcomes():
        normalised = (before - mean) * inverse
        return kernel_gelu(normalised * scale + bias)[0], companded_steps(normalised, KERNEL_BITS)

    after, steps = _once(outcomes)
    narrow = after.astype(x.dtype)
    tokens.store(out, narrow)
    tokens.store(codes, as_bytes(steps))
    coefficients.store(projected, _multiply(analysis, narrow))


def _norm_slope_projected(
    tokens: _Rows,
    coefficients: _Rows,
    analysis: jax.Array,
    synthesis: jax.Array,
    channels: _Channels,
    norm: Any,
    g: Any,
    codes: Any,
    dx: Any,
    sums: Any,
) -> None:
    _, inverse, scale, bias = channels.norm(norm)
    kept = tokens.load(codes, other=2 ** (KERNEL_BITS - 1))

    def outcomes():
        normalised = expanded_codes(kept, KERNEL_BITS)
        return normalised, kernel_gelu(normalised * scale + bias)[1]

    normalised, slope = _once(outcomes)
    through = _multiply(synthesis, coefficients.load(g)) * slope
    channels.store_sums(sums, jnp.sum(through, axis=0), jnp.sum(through * normalised, axis=0))
    coefficients.store(dx, _multiply(analysis, (through * (inverse * scale)).astype(g.dtype)))


# What a program does, on how many channels, and how many products of the cells' matrices it makes.
_BODIES: dict[str, tuple[Callable[..., None], int, int]] = {
    "project": (_project, _WIDE, 1),
    "expand": (_expand, _WIDE, 1),
    "gelu_backward": (_gelu_backward, _NARROW, 2),
    "gelu_backward_projected": (_gelu_backward_projected, _NARROW, 3),
    "gelu_coded": (_gelu_coded, _NARROW, 1),
    "slope_projected": (_slope_projected, _NARROW, 2),
}
# The same of those that read a norm by channel.
_NORM_BODIES: dict[str, tuple[Callable[..., None], int, int]] = {
    "norm_gelu_coded": (_norm_gelu_coded, _NARROW, 1),
    "norm_slope_projected": (_norm_slope_projected, _NARROW, 2),
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
      *operands: the ``tables``; the norm, ``[4, channels]``, of the kinds that have one; then arrays ``[batch, tokens or
        coefficients, channels]``.
      interpret: runs it on any platform, slowly, as a test does.

    Returns:
      The results.
    """
    body, most, products = (_BODIES | _NORM_BODIES)[kind]
    batch, _, channels = operands[-1].shape
    count, width = len(operands[0]), min(most, max(16, 1 << (channels - 1).bit_length()))

    def program(tokens_ref, coefficients_ref, analysis_ref, synthesis_ref, *refs):
        image, cell = pl.program_id(0) // count, pl.program_id(0) % count
        columns = pl.program_id(1) * width + jnp.arange(width)
        tokens = _Rows(image, plgpu.load(tokens_ref.at[cell]), columns, channels)
        coefficients = _Rows(image, plgpu.load(coefficients_ref.at[cell]), columns, channels)
        matrices = plgpu.load(analysis_ref.at[cell]), plgpu.load(synthesis_ref.at[cell])
        own = [_Channels(image, cell, columns, channels)] if kind in _NORM_BODIES else []
        body(tokens, coefficients, *matrices, *own, *refs)

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
