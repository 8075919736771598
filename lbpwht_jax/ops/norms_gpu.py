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

from lbpwht_jax.ops.coders import coded_rows, has_row_steps, row_codes
from lbpwht_jax.ops.distributed import distributed
from lbpwht_jax.ops.pallas_gpu import call, like
from lbpwht_jax.ops.platforms import is_narrow

BITS = 8
_ROWS = 4  # at a time
_CHUNK = 64  # rows of a program
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
    """Those rows of an image that a program works on, a few at a time."""

    def __init__(self, rows: int, channels: int):
        self.image, self.chunk, self.count = pl.program_id(0), pl.program_id(1), rows
        self.columns = jnp.arange(1 << (channels - 1).bit_length())
        self.inside = self.columns < channels

    def _at(self, ref: Any, step: Any, columns: jax.Array) -> tuple[Any, jax.Array]:
        rows = self.chunk * _CHUNK + step * _ROWS + jnp.arange(_ROWS)
        return ref.at[self.image, rows[:, None], columns[None, :]], (rows < self.count)[:, None]

    def load(self, ref: Any, step: Any) -> jax.Array:
        where, present = self._at(ref, step, self.columns)
        return plgpu.load(where, mask=present & self.inside[None, :], other=0)

    def store(self, ref: Any, step: Any, value: jax.Array) -> None:
        where, present = self._at(ref, step, self.columns)
        plgpu.store(where, value.astype(ref.dtype), mask=present & self.inside[None, :])

    def load_one(self, ref: Any, step: Any) -> jax.Array:
        where, present = self._at(ref, step, jnp.arange(1))
        return plgpu.load(where, mask=present, other=0)

    def store_one(self, ref: Any, step: Any, value: jax.Array) -> None:
        where, present = self._at(ref, step, jnp.arange(1))
        plgpu.store(where, value, mask=present)

    def channels(self, ref: Any) -> jax.Array:
        return plgpu.load(ref.at[self.columns], mask=self.inside, other=0).astype(jnp.float32)[None, :]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, interpret: bool) -> tuple[jax.Array, ...]:
    batch, count, channels = x.shape

    def program(x_ref, scale_ref, bias_ref, y_ref, codes_ref, steps_ref, inverse_ref):
        part = _Part(count, channels)
        factor, offset = part.channels(scale_ref), part.channels(bias_ref)

        def few(step, _):
            rows = part.load(x_ref, step).astype(jnp.float32)
            mean = jnp.sum(rows, axis=1, keepdims=True) / channels
            variance = jnp.maximum(jnp.sum(rows * rows, axis=1, keepdims=True) / channels - mean * mean, 0.0)
            inverse = lax.rsqrt(variance + epsilon)
            normalised = jnp.where(part.inside[None, :], (rows - mean) * inverse, 0.0)
            codes, steps = row_codes(normalised, BITS, 1)
            part.store(y_ref, step, normalised * factor + offset)
            part.store(codes_ref, step, codes)
            part.store_one(steps_ref, step, steps)
            part.store_one(inverse_ref, step, inverse)

        lax.fori_loop(0, _CHUNK // _ROWS, few, None)

    one = like(x, (batch, count, 1), jnp.float32)
    shapes = [like(x, x.shape, x.dtype), like(x, x.shape, jnp.uint8), one, one]
    return _call(program, "layer_norm_forward", x.shape, shapes, (x, scale, bias), interpret)


def _backward(
    codes: jax.Array, steps: jax.Array, inverse: jax.Array, scale: jax.Array, g: jax.Array, interpret: bool
) -> tuple[jax.Array, ...]:
    batch, count, channels = codes.shape

    def program(codes_ref, steps_ref, inverse_ref, scale_ref, g_ref, dx_ref, sums_ref):
        part = _Part(count, channels)
        factor = part.channels(scale_ref)

        def few(step, carry):
            of_scale, of_bias = carry
            cotangent = part.load(g_ref, step).astype(jnp.float32)
            normalised = coded_rows(part.load(codes_ref, step), part.load_one(steps_ref, step), BITS)
            normalised = jnp.where(part.inside[None, :], normalised, 0.0)
            dx = cotangent * factor
            mean = jnp.sum(dx, axis=1, keepdims=True) / channels
            product = jnp.sum(dx * normalised, axis=1, keepdims=True) / channels
            part.store(dx_ref, step, (dx - mean - normalised * product) * part.load_one(inverse_ref, step))
            return of_scale + jnp.sum(cotangent * normalised, axis=0), of_bias + jnp.sum(cotangent, axis=0)

        zeros = jnp.zeros(len(part.columns))
        for which, total in enumerate(lax.fori_loop(0, _CHUNK // _ROWS, few, (zeros, zeros))):
            plgpu.store(sums_ref.at[part.image, part.chunk, which, part.columns], total, mask=part.inside)

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
