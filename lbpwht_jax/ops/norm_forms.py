"""A norm and GELU in front of a low-rank product: what is kept, and the backward pass on coefficients, by platform."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lbpwht_jax.ops.affine import Affine, along_channels
from lbpwht_jax.ops.coders import KERNEL_BITS, Companded
from lbpwht_jax.ops.gelu import gelu_slope
from lbpwht_jax.ops.gelu_forms import Transforms
from lbpwht_jax.ops.platforms import apart, by_platform

_Form = Callable[..., tuple[jax.Array, jax.Array]]


def takes(x: jax.Array, before: Affine, transforms: Transforms) -> bool:
    """Whether some platform has kernels for operands like x; elsewhere the norm is better left to itself."""
    coded = before.activation == "gelu" and before.bits == KERNEL_BITS and before.dtype == x.dtype
    return coded and "cuda" in transforms.kernels("norm_gelu_coded", x)


def forward(x: jax.Array, before: Affine, transforms: Transforms) -> tuple[jax.Array, jax.Array, Companded]:
    """The normalised and activated tokens, their coefficients, and what is kept of x.

    Args:
      x: ``[..., prefix_tokens + tokens, channels]``, such as ``takes`` says.
      before: the normalisation and GELU.
      transforms: of x.
    """

    def plain(norm: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        del norm
        activated = before.activated(before.before_activation(x))
        codes = Companded.of(before.normalised(x), KERNEL_BITS).codes
        return apart((activated, transforms.project(activated, stored=True), codes))

    kernels = transforms.kernels("norm_gelu_coded", x)
    activated, coefficients, codes = by_platform(plain, _table(before), x, **kernels)
    return activated, coefficients, Companded(codes, KERNEL_BITS, x.shape[-1], before.mean.dtype)


def backward(
    coefficients: jax.Array, kept: Companded, before: Affine, transforms: Transforms, projected: bool
) -> tuple[jax.Array, Affine]:
    """The cotangents of x and of the norm, from the coefficients of the activated tokens' cotangent.

    Args:
      coefficients: ``[..., prefix_tokens + coefficients, channels]``.
      kept: what ``forward`` kept.
      before: as for ``forward``.
      transforms: as for ``forward``.
      projected: returns the coefficients of x's cotangent instead of all of it.
    """

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


def _summed(form: _Form) -> _Form:
    """The form with its sums taken over the batch and the cells: platforms differ in how many cells there are."""

    def summed(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        dx, sums = form(*operands)
        return dx, jnp.sum(sums, tuple(range(sums.ndim - 2)))

    return summed


def _table(before: Affine) -> jax.Array:
    """``[4, channels]``, as kernels take a norm."""
    return jnp.stack([before.mean, before.inverse, before.scale, before.bias]).astype(jnp.float32)
