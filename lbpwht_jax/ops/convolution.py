"""Convolutions of channels-last maps in the form that suits the machine.

XLA's CPU backend computes some of them slowly: depthwise ones take many times as long as sums of shifted maps do. So CPUs
get forms of their own, chosen from the shape, apart for the result and both gradients. GPUs and TPUs have that of ``lax``.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lbpwht_jax.ops.bilinear import bilinear
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.exact import exact_matmul
from lbpwht_jax.ops.platforms import by_platform, row_major
from lbpwht_jax.ops.sharding import explicit_sharding, vary_alike

Pair = tuple[int, int]

# Up to how many inputs a gradient by parities is faster than XLA's, though it takes 16/9 of the FLOPs (measured in float32).
_PARITY_INPUTS = 48
# Larger windows would make programs of too many instructions.
_LARGEST_WINDOW = 7
# From how many inputs on a kernel's gradient is faster by places at stride 1 too (measured in float32).
_PLACES_INPUTS = 64


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    padding: tuple[Pair, Pair],
    groups: int = 1,
    *,
    precision: Any = None,
    bits: int | None = None,
) -> jax.Array:
    """``lax.conv_general_dilated`` of channels-last maps, without dilation; for the backward pass it keeps x and the kernel.

    Args:
      x: ``[batch, height, width, inputs]``, floating point.
      kernel: ``[rows, columns, inputs / groups, outputs]``, of the dtype of x.
      strides: along height and width.
      padding: zeros before and after, along height and width.
      groups: feature groups.
      precision: as for ``lax.conv_general_dilated``, for accelerators.
      bits: in how many bits x is kept, 4 or 8; ``None`` for all of it.

    Returns:
      ``[batch, height', width', outputs]``, of the dtype of x.
    """
    product = Convolution(strides, padding, groups, precision)
    if product.cuts_patches(x, kernel) and explicit_sharding(x) is None:
        return _of_patches(x, kernel, precision, bits)
    return bilinear(product, x, kernel, bits=bits, transposes=(product.of_x, product.of_kernel))


def _of_patches(x: jax.Array, kernel: jax.Array, precision: Any, bits: int | None) -> jax.Array:
    """A dense layer on patches, which are rows to keep. Left alone, XLA lays all that follows out as images are, batch last."""
    (rows, columns, inputs, outputs), (batch, height, width, _) = kernel.shape, x.shape
    x = x.reshape(batch, height // rows, rows, width // columns, columns, inputs).swapaxes(2, 3)
    grid, pixels = (height // rows, width // columns), rows * columns * inputs
    x = row_major(x.reshape(batch, math.prod(grid), pixels))
    y = exact_matmul(x, kernel.reshape(pixels, outputs), precision, bits=bits)
    return row_major(y.reshape(batch, *grid, outputs))


@dataclasses.dataclass(frozen=True)
class ConvProduct:
    """``convolution`` in the place of ``lax.conv_general_dilated``, which Flax's layers take as an argument.

    Attributes:
      bits: as for ``convolution``.
    """

    bits: int | None = None

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Sequence[int],
        padding: Any,
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        precision: Any = None,
    ) -> jax.Array:
        """The convolution that ``lax.conv_general_dilated`` returns, of ``[batch, height, width, inputs]``.

        Raises:
          TypeError: when tracing, if the operands are not floating point.
          ValueError: when tracing, if there is dilation.
        """
        if not all(jnp.issubdtype(operand.dtype, jnp.floating) for operand in (lhs, rhs)):
            raise TypeError(
                f"ConvProduct: maps and kernel must be floating point, got {lhs.dtype} and {rhs.dtype}; give the layer "
                "lax.conv_general_dilated, and leave it out of Lean's pattern"
            )
        if any(step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ()))):
            raise ValueError("ConvProduct: dilated convolutions have no form here; give the layer lax.conv_general_dilated")
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
        sides: Any = tuple((int(before), int(after)) for before, after in padding)
        strides: Any = tuple(window_strides)
        return convolution(lhs, rhs, strides, sides, feature_group_count, precision=precision, bits=self.bits)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution but for its operands, and its transposes; the fields are arguments of ``convolution``."""

    strides: Pair
    padding: tuple[Pair, Pair]
    groups: int = 1
    precision: Any = None

    def plain(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """``lax``'s convolution. Colour images get a fourth channel of zeros, unless they are cut into patches.

        XLA's CPU backend convolves four channels 4 to 5 times faster than three, and GPUs want a multiple of four too.
        """
        if kernel.shape[2] == 3 and not self.cuts_patches(x, kernel):
            x, kernel = (jnp.pad(a, [(0, 1) if axis == at else (0, 0) for axis in range(4)]) for a, at in ((x, 3), (kernel, 2)))
        return self._as_it_is(x, kernel)

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The result."""
        if explicit_sharding(x) is not None:
            return self.plain(x, kernel)
        if self._is_depthwise(x, kernel):
            return by_platform(self.plain, x, kernel, cpu=self._shifted)
        return self.plain(x, kernel)

    def of_x(self, like: Any, kernel: jax.Array, g: jax.Array) -> jax.Array:
        """The cotangent of x, an array ``like`` which is given, from the result's cotangent g."""

        def transposed(function: Any) -> Any:
            return lambda kernel, g: jax.linear_transpose(lambda x: function(x, kernel), like)(g)[0]

        if explicit_sharding(g) is not None:
            return transposed(self.plain)(kernel, g)
        form = None
        if self._is_depthwise(like, kernel):
            form = self._shifted_back if self.strides == (1, 1) else transposed(self._shifted)
        elif self._has_parities(like, kernel):
            form = transposed(self._by_parity)
        plain, operands = transposed(self.plain), vary_alike(kernel, g)
        return plain(*operands) if form is None else by_platform(plain, *operands, cpu=form)

    def of_kernel(self, x: jax.Array, like: Any, g: jax.Array) -> jax.Array:
        """The cotangent of a kernel ``like`` the one given, from the result's cotangent g."""

        def transposed(function: Any) -> Any:
            return lambda x, like, g: jax.linear_transpose(lambda kernel: function(x, kernel), like)(g)[0]

        if explicit_sharding(x) is not None:
            return transposed(self.plain)(x, like, g)
        form = transposed(self._as_it_is)
        if self._is_depthwise(x, like):
            form = self._by_rows
        elif self._gains_by_places(like):
            form = self._by_places
        return by_platform(transposed(self.plain), *vary_alike(x, like, g), cpu=form)

    def _as_it_is(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
            precision=self.precision,
        )

    def _is_depthwise(self, x: Any, kernel: Any) -> bool:
        return 1 < self.groups == x.shape[3] == kernel.shape[3] and max(kernel.shape[:2]) <= _LARGEST_WINDOW

    def cuts_patches(self, x: Any, kernel: Any) -> bool:
        """Whether windows lie side by side and fill the map, so that the convolution is a dense layer on patches."""
        sizes = zip(x.shape[1:3], kernel.shape[:2], strict=True)
        side_by_side = self.strides == kernel.shape[:2] and self.padding == ((0, 0), (0, 0)) and self.groups == 1
        return side_by_side and all(size % window == 0 for size, window in sizes)

    def _has_parities(self, x: Any, kernel: Any) -> bool:
        even = all(size % 2 == 0 for size in x.shape[1:3])
        window = kernel.shape[:2] == (3, 3) and self.strides == (2, 2) and self.padding == ((1, 1), (1, 1))
        return even and window and self.groups == 1 and x.shape[3] <= _PARITY_INPUTS

    def _by_parity(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """A 3x3 convolution of stride 2 as a 2x2 one of stride 1 on a quarter of the map, with four times the channels."""
        batch, height, width, inputs = x.shape
        rows, columns = height // 2 + 1, width // 2 + 1
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(batch, rows, 2, columns, 2, inputs)
        x = x.swapaxes(2, 3).reshape(batch, rows, columns, 4 * inputs)
        kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0))).reshape(2, 2, 2, 2, inputs, -1)
        kernel = kernel.swapaxes(1, 2).reshape(2, 2, 4 * inputs, -1)
        return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def _shifted(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """A depthwise convolution as a sum over the window's places, in one pass."""
        wide, window = self._padded(x), kernel.shape[:2]
        kernel = kernel.astype(wide.dtype).reshape(-1, 1, 1, 1, kernel.shape[-1])
        views = self._views(wide, window, self._outputs(x.shape, window))
        return functools.reduce(jnp.add, [view * kernel[k] for k, view in enumerate(views)]).astype(x.dtype)

    def _shifted_back(self, kernel: jax.Array, g: jax.Array) -> jax.Array:
        """The transpose of a depthwise convolution of stride 1: one with the kernel turned round."""
        padding = tuple((n - 1 - before, n - 1 - after) for n, (before, after) in zip(kernel.shape, self.padding, strict=False))
        return dataclasses.replace(self, padding=padding)._shifted(g, kernel[::-1, ::-1])

    def _by_rows(self, x: jax.Array, like: jax.Array, g: jax.Array) -> jax.Array:
        """A depthwise kernel's cotangent, summed up row by row, where all the sums stay in the processor's cache."""
        wide, window, (batch, rows, columns, channels) = self._padded(x), like.shape[:2], g.shape
        (down, right), span = self.strides, wide.shape[2]

        def add(sums: tuple[jax.Array, ...], step: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            image, row = step // rows, step % rows
            above = lax.dynamic_slice(wide, (image, row * down, 0, 0), (1, window[0], span, channels))[0]
            own = lax.dynamic_slice(g, (image, row, 0, 0), (1, 1, columns, channels))[0].astype(wide.dtype)
            last = (columns - 1) * right + 1
            return tuple(total + above[:, j : j + last : right] * own for j, total in enumerate(sums)), None

        zeros = jnp.zeros((window[0], columns, channels), wide.dtype)
        start = tuple(vary_alike(zeros, g)[0] for _ in range(window[1]))
        sums, _ = lax.scan(add, start, jnp.arange(batch * rows))
        return jnp.stack([total.sum(1) for total in sums], axis=1)[:, :, None].astype(g.dtype)

    def _gains_by_places(self, kernel: Any) -> bool:
        large = max(self.strides) > 1 or kernel.shape[2] >= _PLACES_INPUTS
        return large and self.groups == 1 and max(kernel.shape[:2]) <= _LARGEST_WINDOW

    def _by_places(self, x: jax.Array, like: jax.Array, g: jax.Array) -> jax.Array:
        """A kernel's cotangent by a product for each of the window's places, two images at a time, which the cache holds."""
        wide, (batch, rows, columns, outputs) = self._padded(x), g.shape
        images = 2 if batch % 2 == 0 else 1

        def add(total: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            own, views = step[1].reshape(-1, outputs), self._views(step[0], like.shape[:2], (rows, columns))
            products = [jnp.matmul(view.reshape(len(own), -1).T, own, precision=self.precision) for view in views]
            return total + jnp.stack(products), None

        steps = [a.reshape(batch // images, images, *a.shape[1:]) for a in (wide, g.astype(wide.dtype))]
        zeros = jnp.zeros((math.prod(like.shape[:2]), *like.shape[2:]), wide.dtype)
        total, _ = lax.scan(add, vary_alike(zeros, g)[0], (steps[0], steps[1]))
        return total.reshape(like.shape).astype(g.dtype)

    def _views(self, wide: jax.Array, window: Sequence[int], outputs: Sequence[int]) -> list[jax.Array]:
        """What each place of the window sees of a padded map, row by row: as many rows and columns as the result has."""
        (down, right), (rows, columns) = self.strides, outputs
        ends = (rows - 1) * down + 1, (columns - 1) * right + 1
        return [
            lax.slice(wide, (0, i, j, 0), (len(wide), i + ends[0], j + ends[1], wide.shape[3]), (1, down, right, 1))
            for i, j in itertools.product(*map(range, window))
        ]

    def _padded(self, x: jax.Array) -> jax.Array:
        """x between its zeros, in at least float32, for sums; padding below zero cuts."""
        wide = x.astype(accumulation_dtype(x.dtype))
        return lax.pad(wide, jnp.zeros((), wide.dtype), [(0, 0, 0), *((*sides, 0) for sides in self.padding), (0, 0, 0)])

    def _outputs(self, x: tuple[int, ...], kernel: tuple[int, ...]) -> list[int]:
        axes = zip(x[1:3], kernel, self.strides, self.padding, strict=False)
        return [(size + sum(sides) - window) // stride + 1 for size, window, stride, sides in axes]
