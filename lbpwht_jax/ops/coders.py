"""Few-bit codes of what the backward pass keeps, packed in bytes: slopes of activations, and rows with a scale each."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lbpwht_jax.ops.platforms import by_itself

# Least and largest slope of the exact GELU, at x = -sqrt(2) and sqrt(2).
_LARGEST_SLOPE = 0.5 * (1 + math.erf(1)) + math.exp(-1) / math.sqrt(math.pi)
_LEAST_SLOPE = 1 - _LARGEST_SLOPE
SLOPE_BITS, ROW_BITS = (2, 3, 4, 8), (4, 8)
KERNEL_BITS = 8  # in which kernels make codes beside the Walsh transforms
_LEAST_CHANNELS = 16  # of a row with a step of its own
_KNEE = 2.0  # where companding has used up half of its codes; near the best for normal numbers, and for heavier tails


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Truth values, eight to a byte.

    Attributes:
      codes: uint8 ``[..., channels / 8]``, rounded up.
      channels: of the mask.
    """

    codes: jax.Array
    channels: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, mask: jax.Array) -> "Mask":
        """The codes of ``mask``, bool ``[..., channels]``."""
        return cls(by_itself(lambda mask: _pack(mask.astype(jnp.uint8), 1), mask), mask.shape[-1])

    def decoded(self) -> jax.Array:
        """bool ``[..., channels]``."""
        return _unpack(self.codes, 1, self.channels) > 0


def exact_slopes(x: np.ndarray) -> np.ndarray:
    """GELU's slope in float64."""
    cdf = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return cdf + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@functools.cache
def slope_levels(bits: int) -> tuple[float, ...]:
    """The ``2 ** bits`` levels nearest to the GELU's slope in the least squares, its input being standard normal.

    Lloyd's iteration: each border lies halfway between two levels, each level is the mean slope between two borders.
    """
    x = np.linspace(-8, 8, 160001)
    density, slopes = np.exp(-x * x / 2), exact_slopes(x)
    order = np.argsort(slopes)
    slopes, weights = slopes[order], density[order]
    sums = [np.concatenate([[0], np.cumsum(values)]) for values in (weights, weights * slopes)]
    levels = np.linspace(slopes[0], slopes[-1], 2 ** (bits + 1) + 1)[1::2]
    for _ in range(2000):
        ends = [0, *np.searchsorted(slopes, (levels[1:] + levels[:-1]) / 2), len(slopes)]
        mass, total = (np.diff(values[ends]) for values in sums)
        levels = np.where(mass > 0, total / np.where(mass > 0, mass, 1), levels)
    return tuple(levels.tolist())


def mean_slope_bits(bits: int) -> int:
    """In how many bits the means of slopes are kept where slopes are in so many.

    Means lie closer together than slopes and need more; they are so few that these take no more than all slopes would.
    """
    return 4 if bits == 2 else 8


def check_row_bits(bits: int | None, name: str) -> None:
    """Raises ``ValueError``, opened by ``name``, unless rows can be kept in so many bits."""
    if bits not in (None, *ROW_BITS):
        raise ValueError(f"{name}: input_bits must be {', '.join(map(str, ROW_BITS))} or None, got {bits!r}")


def has_row_steps(channels: int) -> bool:
    """Whether rows of so many channels have a step each."""
    return channels >= _LEAST_CHANNELS


def row_codes(rows: jax.Array, bits: int, axes: Any) -> tuple[jax.Array, jax.Array]:
    """What ``Rows`` keeps of float32 rows: whole numbers from 0, float32 and unpacked; and steps, 1 along ``axes``."""
    factor, steps = row_factor(jnp.max(jnp.abs(rows), axis=axes, keepdims=True), bits)
    most = middle(bits)
    return jnp.clip(_rounded(rows * factor), -most, most) + most, steps


def row_factor(largest: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of the step of rows with these largest magnitudes, zero for rows of zeros, and the step."""
    return jnp.where(largest > 0, middle(bits) / largest, 0.0), largest / middle(bits)


def middle(bits: int) -> int:
    """The code of zero in a row."""
    return 2 ** (bits - 1) - 1


def coded_rows(codes: jax.Array, steps: jax.Array, bits: int) -> jax.Array:
    """The float32 rows that codes stand for."""
    return (codes.astype(jnp.float32) - middle(bits)) * steps


def slope_codes(slopes: jax.Array) -> jax.Array:
    """What ``Slopes`` keeps of float32 slopes in 8 bits: whole numbers in float32."""
    return jnp.clip(_rounded(slope_steps(slopes)), 0.0, 255.0)


def slope_steps(slopes: jax.Array) -> jax.Array:
    """How many steps of the codes in 8 bits float32 slopes lie above the least one, not yet rounded."""
    return (slopes - _LEAST_SLOPE) * (255 / (_LARGEST_SLOPE - _LEAST_SLOPE))


def coded_slopes(codes: jax.Array) -> jax.Array:
    """The float32 slopes that codes of 8 bits stand for."""
    return codes.astype(jnp.float32) * ((_LARGEST_SLOPE - _LEAST_SLOPE) / 255) + _LEAST_SLOPE


def _rounded(x: jax.Array) -> jax.Array:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows in few bits: equal steps from minus a row's largest magnitude to the same above zero.

    A row that holds NaN or an infinity decodes to no finite number. Where there are fewer than 16 channels, all rows of an
    image count as one, for which 8 bits are as many as a picture's file has.

    Attributes:
      codes: uint8 ``[batch, ..., channels * bits / 8]``, rounded up.
      steps: float32 ``[batch, ..., 1]``, a step for each row.
      bits: 4 or 8.
      channels: of the rows.
      dtype: theirs.
    """

    codes: jax.Array
    steps: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})
    channels: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: jax.Array, bits: int) -> "Rows":
        """The codes of ``x``, ``[batch, ..., channels]``, floating point."""
        axes = -1 if has_row_steps(x.shape[-1]) else tuple(range(1, x.ndim))

        def coded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            codes, steps = row_codes(x.astype(jnp.float32), bits, axes)
            return _pack(codes.astype(jnp.uint8), bits), steps

        codes, steps = by_itself(coded, x)
        return cls(codes, steps, bits, x.shape[-1], x.dtype)

    def decoded(self) -> jax.Array:
        """``[..., channels]``."""
        return coded_rows(_unpack(self.codes, self.bits, self.channels), self.steps, self.bits).astype(self.dtype)


def companded_codes(normalised: jax.Array, bits: int) -> jax.Array:
    """What ``Companded`` keeps of float32 numbers: whole numbers from 0, float32 and unpacked."""
    return _rounded(companded_steps(normalised, bits))


def companded_steps(normalised: jax.Array, bits: int) -> jax.Array:
    """The same, not yet rounded."""
    half = 2 ** (bits - 1)
    code = jnp.clip(normalised / (_KNEE + jnp.abs(normalised)) * half, 1 - half, half - 1) + half
    return jnp.where(jnp.abs(normalised) < jnp.inf, code, 0.0)


def expanded_codes(codes: jax.Array, bits: int) -> jax.Array:
    """The float32 numbers that companded codes stand for."""
    half = 2 ** (bits - 1)
    share = (codes.astype(jnp.float32) - half) / half
    return jnp.where(codes == 0, jnp.nan, _KNEE * share / (1 - jnp.abs(share)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Companded:
    """Numbers of mean 0 and variance 1, each in few bits by itself: equal steps of ``x / (2 + |x|)``.

    Steps are fine at zero and grow with the square of the magnitude, up to 254 in 8 bits and 14 in 4, for which all beyond is
    taken. As no largest magnitude is to be found first, the codes cost no pass of their own. NaN and infinities become NaN.

    Attributes:
      codes: uint8 ``[..., channels * bits / 8]``, rounded up.
      bits: 4 or 8.
      channels: of the numbers.
      dtype: theirs.
    """

    codes: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})
    channels: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: jax.Array, bits: int) -> "Companded":
        """The codes of ``x``, ``[..., channels]``, floating point."""

        def coded(x: jax.Array) -> jax.Array:
            return _pack(companded_codes(x.astype(jnp.float32), bits).astype(jnp.uint8), bits)

        return cls(by_itself(coded, x), bits, x.shape[-1], x.dtype)

    def decoded(self) -> jax.Array:
        """``[..., channels]``."""
        return expanded_codes(_unpack(self.codes, self.bits, self.channels), self.bits).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slopes:
    """Slopes of the GELU in few bits. What lies outside them is taken for the nearest one, NaN for any level.

    Attributes:
      codes: uint8 ``[..., channels * bits / 8]``, rounded up.
      bits: 2, 3, 4 or 8.
      channels: of the slopes.
      dtype: theirs.
    """

    codes: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})
    channels: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, slopes: jax.Array, bits: int) -> "Slopes":
        """The codes of ``slopes``, ``[..., channels]``, floating point."""
        wide = slopes.astype(jnp.float32)
        if bits == 8:
            codes = slope_codes(wide)
        else:
            levels = slope_levels(bits)
            borders = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
            codes = functools.reduce(jnp.add, [(wide > border).astype(jnp.uint8) for border in borders])
        return cls(_pack(codes.astype(jnp.uint8), bits), bits, slopes.shape[-1], slopes.dtype)

    def decoded(self) -> jax.Array:
        """``[..., channels]``."""
        codes = _unpack(self.codes, self.bits, self.channels)
        if self.bits == 8:
            return coded_slopes(codes).astype(self.dtype)
        levels = slope_levels(self.bits)
        steps = [jnp.where(codes > k, high - low, 0.0) for k, (low, high) in enumerate(itertools.pairwise(levels))]
        return functools.reduce(jnp.add, steps, jnp.float32(levels[0])).astype(self.dtype)


def _widths(bits: int) -> list[int]:
    """The widths of the parts in which codes are packed, each of which divides a byte: 3 bits are 2 and 1."""
    return [2, 1] if bits == 3 else [bits]


def _pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 codes ``[..., channels]`` to bytes; a byte holds channels that lie ``channels / (8 / width)`` apart."""
    if bits == 8:
        return codes
    parts, shift = [], 0
    for width in _widths(bits):
        count = 8 // width
        part = lax.shift_right_logical(codes, jnp.uint8(shift)) & jnp.uint8(2**width - 1)
        part = jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, -part.shape[-1] % count)])
        pieces = jnp.split(part, count, axis=-1)
        shifted = [lax.shift_left(piece, jnp.uint8(k * width)) for k, piece in enumerate(pieces)]
        parts.append(functools.reduce(jnp.bitwise_or, shifted))
        shift += width
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _unpack(packed: jax.Array, bits: int, channels: int) -> jax.Array:
    if bits == 8:
        return packed
    parts, start, shift = [], 0, 0
    for width in _widths(bits):
        count = 8 // width
        length = -(-channels // count)
        part = packed[..., start : start + length]
        pieces = [lax.shift_right_logical(part, jnp.uint8(k * width)) & jnp.uint8(2**width - 1) for k in range(count)]
        parts.append(lax.shift_left(jnp.concatenate(pieces, axis=-1)[..., :channels], jnp.uint8(shift)))
        start, shift = start + length, shift + width
    return functools.reduce(jnp.bitwise_or, parts)
