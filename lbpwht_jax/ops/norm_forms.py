"""A norm and GELU in front of a low-rank product: what is kept, and the backward pass on coefficients, by platform."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lbpwht_jax.ops.affine import Affine, along_channels
from lbpwht_jax.ops.coders import KERNEL_BITS, Companded, coded_slopes, companded_codes, expanded_codes, slope_codes
from lbpwht_jax.ops.gelu import gelu_slope, slope_for_means
from lbpwht_jax.ops.gelu_forms import Transforms
from lbpwht_jax.ops.platforms import apart, by_itself, by_platform

_Form = Callable[..., tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Means:
    """What is kept of x as means over sub-blocks: of GELU's slope, and of the slope times the normalised x.

    Attributes:
      codes: uint16, the low byte as ``Slopes`` keeps it and the high one as ``Companded``: one array, so that XLA's CPU backend
        makes both in one pass.
    """

    codes: jax.Array

    @classmethod
    def of(cls, x: jax.Array, before: Affine, transforms: Transforms) -> "Means":
        """The means of x, ``[..., channels]``."""

        def slope_and_product(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            slope = slope_for_means(before.before_activation(x).astype(jnp.float32))
            return slope, slope * before.normalised(x).astype(jnp.float32)

        def codes(x: jax.Array) -> jax.Array:
            slope, product = transforms.means(x, slope_and_product)
            return (slope_codes(slope) + 256 * companded_codes(product, KERNEL_BITS)).astype(jnp.uint16)

        return cls(by_itself(codes, x))

    def decoded(self) -> tuple[jax.Array, jax.Array]:
        """Both means, float32."""
        return coded_slopes(self.codes & 255), expanded_codes(self.codes >> 8, KERNEL_BITS)


def takes(x: jax.Array, before: Affine, transforms: Transforms, projected: bool) -> bool:
    """Whether operands like x gain by it; elsewhere the norm is better left to itself.

    Args:
      x: ``[..., channels]``.
      before: the normalisation and its activation.
      transforms: of x.
      projected: as for ``backward``.
    """
    if projected and defers(x, before, transforms):
        return True
    coded = before.activation == "gelu" and before.bits == KERNEL_BITS and before.dtype == x.dtype
    return coded and "cuda" in transforms.kernels("norm_gelu_coded", x)


def defers(x: jax.Array, norm: Affine, transforms: Transforms) -> bool:
    """Whether a norm between two low-rank products, of operands like x, is better left to the second: for its ``Means``."""
    few = norm.activation == "gelu" and norm.bits is not None and norm.dtype == x.dtype
    return few and transforms.takes_means(x)


def forward(
    x: jax.Array, before: Affine, transforms: Transforms, projected: bool
) -> tuple[jax.Array, jax.Array, Companded | Means]:
    """The normalised and activated tokens, their coefficients, and what is kept of x.

    Args:
      x: ``[..., prefix_tokens + tokens, channels]``, such as ``takes`` says.
      before: the normalisation and GELU.
      transforms: of x.
      projected: as for ``backward``.
    """
    if projected and transforms.takes_means(x):
        activated = before.activated(before.before_activation(x))
        return apart((activated, transforms.project(activated, stored=True), Means.of(x, before, transforms)))

    def plain(norm: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        del norm
        activated = before.activated(before.before_activation(x))
        codes = Companded.of(before.normalised(x), KERNEL_BITS).codes
        return apart((activated, transforms.project(activated, stored=True), codes))

    kernels = transforms.kernels("norm_gelu_coded", x)
    activated, coefficients, codes = by_platform(plain, _table(before), x, **kernels)
    return activated, coefficients, Companded(codes, KERNEL_BITS, x.shape[-1], before.mean.dtype)


def backward(
    coefficients: jax.Array, kept: Companded | Means, before: Affine, transforms: Transforms, projected: bool
) -> tuple[jax.Array, Affine]:
    """The cotangents of x and of the norm, from the coefficients of the activated tokens' cotangent.

    Args:
      coefficients: ``[..., prefix_tokens + coefficients, channels]``.
      kept: what ``forward`` kept.
      before: as for ``forward``.
      transforms: as for ``forward``.
      projected: returns the coefficients of x's cotangent instead of all of it.
    """
    if isinstance(kept, Means):
        return _from_means(coefficients, kept, before, transforms)

    def plain(norm: jax.Array, coefficients: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        del norm
        normalised = Companded(codes, kept.bits, kept.channels, kept.dtype).decoded()
        through = transforms.expand(coefficients).astype(normalised.dtype) * gelu_slope(before.of_normalised(normalised))
        sums = jnp.stack([jnp.sum(through, -2), jnp.sum(through * normalised, -2)], axis=-2)
        dx = along_channels(through, before).astype(coefficients.dtype)
        return transforms.project(dx) if projected else dx, sums[..., None, :, :]

    kernels = transforms.kernels("norm_slope_projected", coefficients) if projected else {}
    forms = {platform: _summed(form) for platform, form in kernels.items()}
    dx, sums = by_platform(_summed(plain), _table(before), coefficients, kept.codes, **forms)
    return dx, before.cotangents(sums[1], sums[0])


def _from_means(coefficients: jax.Array, kept: Means, before: Affine, transforms: Transforms) -> tuple[jax.Array, Affine]:
    kept, coefficients = apart((kept, coefficients))
    wide = transforms.expand_to_subblocks(coefficients).astype(before.mean.dtype)
    slope, product = (transforms.means_by_block(mean.astype(wide.dtype)) for mean in kept.decoded())
    through = wide * slope
    sums = [jnp.sum(transforms.sum_means(each), range(wide.ndim - 2)) for each in (wide * product, through)]
    dx = along_channels(transforms.project_means(through), before).astype(coefficients.dtype)
    return dx, before.cotangents(*sums)


def _summed(form: _Form) -> _Form:
    """The form with its sums taken over the batch and the cells: platforms differ in how many cells there are."""

    def summed(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        dx, sums = form(*operands)
        return dx, jnp.sum(sums, tuple(range(sums.ndim - 2)))

    return summed


def _table(before: Affine) -> jax.Array:
    """``[4, channels]``, as kernels take a norm."""
    return jnp.stack([before.mean, before.inverse, before.scale, before.bias]).astype(jnp.float32)
