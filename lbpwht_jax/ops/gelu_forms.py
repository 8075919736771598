"""GELU in front of a low-rank product: what is kept of it, and its backward pass on coefficients, by platform."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.coders import KERNEL_BITS, Slopes, mean_slope_bits
from lbpwht_jax.ops.gelu import decoded_slope, gelu, gelu_and_slope, gelu_slope, slope_for_means
from lbpwht_jax.ops.kernels import kernel_forms
from lbpwht_jax.ops.platforms import apart, by_itself, by_platform
from lbpwht_jax.ops.projection import expand, project
from lbpwht_jax.ops.spec_fields import Grid, SpecFields
from lbpwht_jax.ops.subblock_means import (
    Elementwise,
    expand_to_subblocks,
    has_means,
    means_by_block,
    project_means,
    subblock_means,
    sum_means,
)


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Between the tokens of a grid and coefficients.

    Attributes:
      spec: the functions kept, and the kind of projection.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      precision: precision of the transforms' products.
    """

    spec: SpecFields
    grid: Grid
    prefix_tokens: int
    precision: Any

    def project(self, x: jax.Array, stored: bool = False) -> jax.Array:
        return project(x, self.spec, self.grid, self.prefix_tokens, self.precision, stored=stored)

    def expand(self, coefficients: jax.Array) -> jax.Array:
        return expand(coefficients, self.spec, self.grid, self.prefix_tokens, self.precision)

    def takes_means(self, x: jax.Array) -> bool:
        """Whether a slope between two coefficients like x, or tokens, is kept and applied as its means over sub-blocks.

        GPUs' kernels, which there are for narrow dtypes, work token by token.
        """
        return has_means(self.spec, self.grid) and self.kernels("slope_projected", x) == {}

    def means(self, x: jax.Array, function: Elementwise) -> Any:
        return subblock_means(x, function, self.spec, self.grid, self.prefix_tokens)

    def means_by_block(self, means: jax.Array) -> jax.Array:
        return means_by_block(means, self.spec, self.grid, self.prefix_tokens)

    def expand_to_subblocks(self, coefficients: jax.Array) -> jax.Array:
        return expand_to_subblocks(coefficients, self.spec, self.grid, self.prefix_tokens, self.precision)

    def project_means(self, means: jax.Array) -> jax.Array:
        return project_means(means, self.spec, self.grid, self.prefix_tokens, self.precision)

    def sum_means(self, means: jax.Array) -> jax.Array:
        """``[..., channels]``, the sums over all tokens."""
        return sum_means(means, self.spec, self.grid, self.prefix_tokens)

    def kernels(self, kind: str, x: jax.Array) -> dict[str, Callable[..., Any]]:
        return kernel_forms(kind, x, self.spec, self.grid, self.prefix_tokens)


def forward(
    x: jax.Array, transforms: Transforms, bits: int | None, wants_slope: bool, wants_coefficients: bool, projected: bool
) -> tuple[jax.Array, Any, Any]:
    """GELU, and what is kept for its backward pass and for the product's behind it.

    Args:
      x: ``[..., prefix_tokens + tokens, channels]``.
      transforms: of x, both low-rank.
      bits: in how many bits the slope is kept; ``None`` for all of it.
      wants_slope: whether x is differentiated.
      wants_coefficients: whether the product's kernel is.
      projected: as for ``backward``: then the slope's means over sub-blocks may be all that is kept of it.

    Returns:
      ``gelu(x)``; its coefficients, or ``None``; its slope as ``backward`` takes it, or ``None``. Where ``backward`` is a
      kernel that computes these two from x, the slope's place takes x, and the coefficients' zeros.
    """
    if wants_slope and projected and bits is not None and transforms.takes_means(x):
        return _mean_slope(x, transforms, bits, wants_coefficients)
    if wants_slope and wants_coefficients:
        return _whole_slope(x, transforms) if bits is None else _coded_slope(x, transforms, bits)
    activated, slope = gelu_and_slope(x, bits) if wants_slope else (gelu(x), None)
    if not wants_coefficients:
        return activated, None, slope
    coefficients, activated = apart((transforms.project(activated, stored=True), activated))
    return activated, coefficients, slope


def backward(
    coefficients: jax.Array, slope: Any, kept_x: Any, transforms: Transforms, bits: int | None, projected: bool
) -> tuple[jax.Array, Any]:
    """The cotangent of x and the coefficients of ``gelu(x)``, from those of the cotangent of ``gelu(x)``.

    Args:
      coefficients: of the cotangent of ``gelu(x)``.
      slope: what ``forward`` returned of it.
      kept_x: what ``forward`` returned of the coefficients of ``gelu(x)``; ``None`` where they were not wanted.
      transforms: as for ``forward``.
      bits: as for ``forward``.
      projected: returns the coefficients of x's cotangent instead of all of it.
    """

    if projected and bits is not None and transforms.takes_means(coefficients):
        through = transforms.expand_to_subblocks(coefficients) * transforms.means_by_block(slope.decoded())
        return transforms.project_means(through), kept_x

    def plain(coefficients: jax.Array, slope: Any) -> jax.Array:
        dx = transforms.expand(coefficients) * decoded_slope(slope)
        return transforms.project(dx) if projected else dx

    if bits is None and kept_x is not None:

        def with_kept(coefficients: jax.Array, slope: jax.Array, kept_x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return plain(coefficients, slope), kept_x

        kernels = transforms.kernels("gelu_backward_projected" if projected else "gelu_backward", coefficients)
        forms = {platform: functools.partial(_without_last, form) for platform, form in kernels.items()}
        return by_platform(with_kept, coefficients, slope, kept_x, **forms)
    if not projected or bits != KERNEL_BITS:
        return plain(coefficients, slope), kept_x

    def by_codes(coefficients: jax.Array, codes: jax.Array) -> jax.Array:
        return plain(coefficients, dataclasses.replace(slope, codes=codes))

    kernels = transforms.kernels("slope_projected", coefficients)
    return by_platform(by_codes, coefficients, slope.codes, **kernels), kept_x


def _mean_slope(x: jax.Array, transforms: Transforms, bits: int, wants_coefficients: bool) -> tuple[jax.Array, Any, Slopes]:
    def means(x: jax.Array) -> Slopes:
        slopes = transforms.means(x.astype(jnp.float32), slope_for_means)
        return Slopes.of(slopes.astype(x.dtype), mean_slope_bits(bits))

    activated, slope = gelu(x), by_itself(means, x)
    coefficients = transforms.project(activated, stored=True) if wants_coefficients else None
    activated, coefficients, slope = apart((activated, coefficients, slope))
    return activated, coefficients, slope


def _whole_slope(x: jax.Array, transforms: Transforms) -> tuple[jax.Array, jax.Array, jax.Array]:
    def plain(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        activated = gelu(x)
        return activated, transforms.project(activated, stored=True), gelu_slope(x)

    def with_kernel(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = transforms.prefix_tokens + coefficient_count(transforms.spec, transforms.grid)
        return gelu(x), jnp.zeros_like(x, shape=(*x.shape[:-2], rows, x.shape[-1])), x

    return by_platform(plain, x, **dict.fromkeys(transforms.kernels("gelu_backward", x), with_kernel))


def _coded_slope(x: jax.Array, transforms: Transforms, bits: int) -> tuple[jax.Array, jax.Array, Slopes]:
    def plain(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        activated, slope = gelu_and_slope(x, bits)
        coefficients, activated = apart((transforms.project(activated, stored=True), activated))
        return activated, coefficients, slope.codes

    kernels = transforms.kernels("gelu_coded", x) if bits == KERNEL_BITS else {}
    activated, coefficients, codes = by_platform(plain, x, **kernels)
    return activated, coefficients, Slopes(codes, bits, x.shape[-1], x.dtype)


def _without_last(form: Callable[..., Any], *operands: jax.Array) -> Any:
    return form(*operands[:-1])
