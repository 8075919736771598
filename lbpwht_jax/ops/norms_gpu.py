"""Layer normalisation for NVIDIA GPUs as Pallas kernels that keep the normalised rows in 8 bits.

Each kernel reads and writes every row once. XLA goes over the rows four times forward (for the moments, the result, the codes'
steps and the codes) and three times back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lbpwht_jax.ops.coders import coded_rows, has_row_steps
from lbpwht_jax.ops.distributed import distributed
from lbpwht_jax.ops.pallas_gpu import call, like, row_bytes
from lbpwht_jax.ops.platforms import is_narrow

BITS = 8
_ROWS, _WIDE = 4, 1024  # rows at a time, half as many of more channels: what adds up by row must fit the registers
_CHUNK = 32  # rows of a program
_PIECE = 256  # channels
_MOST_CHANNELS = 2048


def takes(channels: int, *dtypes: Any) -> bool:
    """Whether there are kernels for rows of so many channels, whose input and result have these dtypes."""
    return is_narrow(*dtypes) and has_row_steps(channels) and channels <= _MOST_CHANNELS


@functools.cache
def forward_kernel(epsilon: float, interpret: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
    """The forward pass, which can be mapped, and sharded along the batch.

    Args:
      epsilon: added to the variance.
      interpret: runs it on any platform, slowly, as a test does.

    Returns:
      A function of ``[batch, rows, channels]``, scale and bias, ``[channels]``, that returns the result; ``Rows``' codes and
      steps of the normalised rows; and the inverse of the standard deviation, float32 ``[batch, rows, 1]``.
    """

    def run(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
        return _forward(x, scale, bias, epsilon, interpret)

    return distributed(run, ["b n c", "c", "c"], ["b n c", "b n c", "b n o", "b n o"], "b")


@functools.cache
def backward_kernel(interpret: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
    """The backward pass, as ``forward_kernel``.

    Returns:
      A function of the codes, the steps, the inverse, the scale and the result's cotangent that returns x's cotangent, and
      those of scale and bias, float32 ``[batch, parts, 2, channels]``, still to be summed over batch and parts.
    """

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _backward(*operands, interpret=interpret)

    return distributed(run, ["b n c", "b n o", "b n o", "c", "b n c"], ["b n c", "b k t c"], "b")


class _Part:
    """Those rows of an image that a program works on, a few at a time, each as pieces of its channels.

    A piece is as wide as a warp reads at once, so that a warp holds whole rows and sums them up by itself.
    """

    def __init__(self, rows: int, channels: int):
        self.image, self.chunk, self.count, self.channel_count = pl.program_id(0), pl.program_id(1), rows, channels
        self.rows = _ROWS if channels <= _WIDE else _ROWS // 2
        whole, rest = divmod(channels, _PIECE)
        widths = [_PIECE] * whole + [1 << (rest - 1).bit_length()] * bool(rest)
        self.columns = [n * _PIECE + jnp.arange(width) for n, width in enumerate(widths)]

    def _at(self, ref: Any, step: Any, columns: jax.Array, most: int) -> tuple[Any, jax.Array]:
        rows = self.chunk * _CHUNK + step * self.rows + jnp.arange(self.rows)
        return ref.at[self.image, rows[:, None], columns[None, :]], (rows < self.count)[:, None] & (columns < most)[None, :]

    def load(self, ref: Any, step: Any) -> list[jax.Array]:
        places = [self._at(ref, step, columns, self.channel_count) for columns in self.columns]
        return [plgpu.load(where, mask=mask, other=0).astype(jnp.float32) for where, mask in places]

    def store(self, ref: Any, step: Any, values: list[jax.Array]) -> None:
        for columns, value in zip(self.columns, values, strict=True):
            where, mask = self._at(ref, step, columns, self.channel_count)
            plgpu.store(where, value.astype(ref.dtype), mask=mask)

    def load_one(self, ref: Any, step: Any) -> jax.Array:
        where, mask = self._at(ref, step, jnp.arange(1), 1)
        return plgpu.load(where, mask=mask, other=0)

    def store_one(self, ref: Any, step: Any, value: jax.Array) -> None:
        where, mask = self._at(ref, step, jnp.arange(1), 1)
        plgpu.store(where, value, mask=mask)

    def channels(self, ref: Any) -> list[jax.Array]:
        loaded = [plgpu.load(ref.at[columns], mask=columns < self.channel_count, other=0) for columns in self.columns]
        return [values.astype(jnp.float32)[None, :] for values in loaded]

    def inside(self, values: list[jax.Array]) -> list[jax.Array]:
        """The same with zeros beyond the channels."""
        if self.channel_count % _PIECE == 0:
            return values
        last = jnp.where((self.columns[-1] < self.channel_count)[None, :], values[-1], 0.0)
        return [*values[:-1], last]

    def mean(self, *pieces: jax.Array) -> jax.Array:
        """Over a row's channels, of pieces with zeros beyond them: ``[rows, 1]``."""
        sums = [jnp.sum(piece, axis=1, keepdims=True) for piece in pieces]
        return functools.reduce(jnp.add, sums) * (1 / self.channel_count)


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, interpret: bool) -> tuple[jax.Array, ...]:
    batch, count, channels = x.shape

    def program(x_ref, scale_ref, bias_ref, y_ref, codes_ref, steps_ref, inverse_ref):
        part = _Part(count, channels)
        factors, offsets = part.channels(scale_ref), part.channels(bias_ref)

        def few(step, _):
            rows = part.load(x_ref, step)
            mean = part.mean(*rows)
            variance = jnp.maximum(part.mean(*(row * row for row in rows)) - mean * mean, 0.0)
            inverse = lax.rsqrt(variance + epsilon)
            normalised = part.inside([(row - mean) * inverse for row in rows])
            codes, steps = row_bytes(normalised)
            part.store(y_ref, step, [n * a + b for n, a, b in zip(normalised, factors, offsets, strict=True)])
            part.store(codes_ref, step, codes)
            part.store_one(steps_ref, step, steps)
            part.store_one(inverse_ref, step, inverse)

        lax.fori_loop(0, _CHUNK // part.rows, few, None)

    one = like(x, (batch, count, 1), jnp.float32)
    shapes = [like(x, x.shape, x.dtype), like(x, x.shape, jnp.uint8), one, one]
    return _call(program, "layer_norm_forward", x.shape, shapes, (x, scale, bias), interpret)


def _backward(
    codes: jax.Array, steps: jax.Array, inverse: jax.Array, scale: jax.Array, g: jax.Array, interpret: bool
) -> tuple[jax.Array, ...]:
    batch, count, channels = codes.shape

    def program(codes_ref, steps_ref, inverse_ref, scale_ref, g_ref, dx_ref, sums_ref):
        part = _Part(count, channels)
        factors = part.channels(scale_ref)

        def few(step, carry):
            cotangents = part.load(g_ref, step)
            own_steps, own_inverse = (part.load_one(ref, step) for ref in (steps_ref, inverse_ref))
            normalised = part.inside([coded_rows(piece, own_steps, BITS) for piece in part.load(codes_ref, step)])
            dx = [g * a for g, a in zip(cotangents, factors, strict=True)]
            products = [d * n for d, n in zip(dx, normalised, strict=True)]
            mean, product = part.mean(*dx), part.mean(*products)
            part.store(dx_ref, step, [(d - mean - n * product) * own_inverse for d, n in zip(dx, normalised, strict=True)])
            of_scale, of_bias = carry
            of_scale = [total + g * n for total, g, n in zip(of_scale, cotangents, normalised, strict=True)]
            return of_scale, [total + g for total, g in zip(of_bias, cotangents, strict=True)]

        # sums by row of those at a time, added up once at the end
        zeros = [jnp.zeros((part.rows, len(columns))) for columns in part.columns]
        for which, totals in enumerate(lax.fori_loop(0, _CHUNK // part.rows, few, (zeros, zeros))):
            for columns, total in zip(part.columns, totals, strict=True):
                where = sums_ref.at[part.image, part.chunk, which, columns]
                plgpu.store(where, jnp.sum(total, axis=0), mask=columns < channels)

    sums = like(g, (batch, pl.cdiv(count, _CHUNK), 2, channels), jnp.float32)
    operands = (codes, steps, inverse, scale, g)
    return _call(program, "layer_norm_backward", g.shape, [like(g, g.shape, g.dtype), sums], operands, interpret)


def _call(
    program: Callable[..., None],
    name: str,
    rows: tuple[int, ...],
    shapes: list[jax.ShapeDtypeStruct],
    operands: tuple[jax.Array, ...],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    batch, count, channels = rows
    grid = batch, pl.cdiv(count, _CHUNK)
    options = {"flops": 0, "transcendentals": batch * count, "interpret": interpret}
    return call(program, name, f"{count}x{channels}", grid, shapes, operands, **options)
