"""An exact product of what goes through a norm and GELU first, which keeps one array for all three."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lbpwht_jax.ops import affine as affines
from lbpwht_jax.ops.affine import Affine
from lbpwht_jax.ops.bilinear import ArrayType
from lbpwht_jax.ops.exact import ExactProduct
from lbpwht_jax.ops.platforms import apart, is_narrow
from lbpwht_jax.ops.sharding import is_explicit


def takes(x: jax.Array, kernel: jax.Array, before: Affine, bits: int | None) -> bool:
    """Whether ``normed_product`` takes these operands, where the product's own input would be kept in so many bits.

    In narrow dtypes alone: in wide ones a norm is one with the product in front of it, whose kernel takes the factors. A single
    row per image, ``[batch, in]``, is kept whole.
    """
    coded = bits is not None and before.bits is not None and before.bits >= bits
    own = before.activation == "gelu" and before.dtype == x.dtype == kernel.dtype and is_narrow(x.dtype)
    return coded and own and x.ndim > 2 and not is_explicit(x)


def normed_product(product: ExactProduct, x: jax.Array, kernel: jax.Array, before: Affine) -> jax.Array:
    """``product(before(x), kernel)``, and its exact cotangents from the normalised x in few bits.

    The backward pass activates what it decodes once more, for the kernel's cotangent: what is activated is not kept.

    Args:
      product: of ``[..., in]`` and the kernel.
      x: ``[..., in]``, such as ``takes`` says.
      kernel: ``[in, out]``.
      before: a normalisation and GELU.

    Returns:
      ``[..., out]``.
    """
    (x, kernel), (before,) = affines.vary_with([before], x, kernel)
    return _normed_product(x, kernel, before, product)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normed_product(x: jax.Array, kernel: jax.Array, before: Any, product: ExactProduct) -> jax.Array:
    return product(before.activated(before.before_activation(x)), kernel)


def _forward(x: Any, kernel: Any, before: Affine, product: ExactProduct) -> tuple[jax.Array, tuple]:
    wants_norm, before = affines.split(before)
    wants_x = x.perturbed or wants_norm
    activated, kept = affines.forward(x.value, before, wants_norm)
    like = ArrayType(jax.typeof(kernel.value)) if kernel.perturbed else ArrayType(None)
    residuals = kept if wants_x or kernel.perturbed else None, kernel.value if wants_x else None, like, before
    return product(activated, kernel.value), residuals


def _backward(product: ExactProduct, residuals: tuple, g: Any) -> tuple:
    if isinstance(g, SymbolicZero):
        return None, None, None
    kept, kernel, like, before = residuals
    kept, _ = apart((kept, _first_rows(g)))  # all of g would be stored, where the products can make it as they read
    dx = dkernel = of_before = None
    if like.type is not None:
        activated = before.activated(before.of_normalised(kept.x.decoded()))
        dkernel = product.of_kernel(activated, like.type, g)
    if kernel is not None:
        through = affines.through_activation(product.of_x(None, kernel, g), kept, before)
        of_before = affines.parameter_cotangents(through, jnp.sum(through, tuple(range(g.ndim - 1))), kept, before)
        dx = affines.along_channels(through, before).astype(g.dtype)
    return dx, dkernel, of_before


def _first_rows(x: jax.Array) -> jax.Array:
    """``[batch, 1, ..., 1, channels]`` of ``[batch, ..., channels]``."""
    return x[(slice(None), *(slice(1) for _ in range(x.ndim - 2)))]


_normed_product.defvjp(_forward, _backward, symbolic_zeros=True)
