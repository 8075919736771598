"""An exact product whose result goes through an affine map of its channels and an activation, as one with both."""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lbpwht_jax.ops import affine as affines
from lbpwht_jax.ops.affine import Affine
from lbpwht_jax.ops.bilinear import ArrayType
from lbpwht_jax.ops.coders import Rows
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.platforms import apart


class Product(Protocol):
    """A bilinear product with its transposes; hashable. The last axes of kernel and result are the result's channels."""

    def __call__(self, x: jax.Array, kernel: jax.Array, /) -> jax.Array:
        """The product."""
        ...

    def of_x(self, like: Any, kernel: jax.Array, g: jax.Array, /) -> jax.Array:
        """The cotangent of x from the result's, ``g``; ``like`` has the shape and the dtype of x."""
        ...

    def of_kernel(self, x: jax.Array, like: Any, g: jax.Array, /) -> jax.Array:
        """The cotangent of the kernel from the result's, ``g``; ``like`` is any array of the kernel's shape and dtype."""
        ...


def takes_factors(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether ``affine_product`` takes these operands: of one dtype, in which the kernel loses nothing by the factors."""
    return x.dtype == kernel.dtype == accumulation_dtype(x.dtype)


def affine_product(product: Product, x: jax.Array, kernel: jax.Array, affine: Affine, bits: int | None = None) -> jax.Array:
    """``affine`` of ``product(x, kernel)``, and its exact cotangents.

    The factors go into the kernel, so that neither the result nor its cotangent needs a pass for them: their own cotangents
    are sums over the kernel's. Nothing is kept but x, the kernel and the activation's slope. Where the kernel is not
    differentiated, its cotangent would cost a product, and the product's result is kept instead.

    Args:
      product: what is applied first.
      x: such that ``takes_factors``.
      kernel: ``[..., out]``, of x's dtype.
      affine: of ``[..., out]``. Its ``bits`` are those of the activation's slope.
      bits: in how many bits x is kept, 4 or 8; ``None`` for all of it.

    Returns:
      ``[..., out]``.
    """
    (x, kernel), (affine,) = affines.vary_with([affine], x, kernel)
    y: Any = _affine_product(x, kernel, affine, product, bits)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _affine_product(x: jax.Array, kernel: jax.Array, affine: Affine, product: Product, bits: int | None) -> jax.Array:
    return affine.activated(_before_activation(x, kernel, affine, product))


def _before_activation(x: jax.Array, kernel: jax.Array, affine: Affine, product: Product) -> jax.Array:
    y = product(x, affines.along_channels(kernel, affine))
    return y + (affine.bias - affine.mean * affine.factor).reshape((1,) * (y.ndim - 1) + (-1,))


def _forward(x: Any, kernel: Any, affine: Affine, product: Product, bits: int | None) -> tuple[jax.Array, tuple]:
    wants_parameters, affine = affines.split(affine)
    if not kernel.perturbed:
        y, kept = affines.forward(product(x.value, kernel.value), affine, wants_parameters)
        return y, (ArrayType(jax.typeof(x.value)), kernel.value, kept, affine)
    y, slope = affines.activated_and_slope(_before_activation(x.value, kernel.value, affine, product), affine)
    kept_x = x.value
    if bits is not None:
        kept_x, y = apart((Rows.of(x.value, bits), y))
    return y, (kept_x, kernel.value, slope, affine)


def _backward(product: Product, bits: int | None, residuals: tuple, g: Any) -> tuple:
    if isinstance(g, SymbolicZero):
        return None, None, None
    if bits is not None or residuals[3].bits is not None:
        residuals, g = apart((residuals, g))
    x, kernel, kept, affine = residuals
    rows = tuple(range(g.ndim - 1))
    if isinstance(x, ArrayType):
        g = affines.through_activation(g, kept, affine)
        dx = product.of_x(x.type, kernel, affines.along_channels(g, affine))
        return dx, None, affines.parameter_cotangents(g, jnp.sum(g, rows), kept, affine)
    g = affines.through_slope(g, kept, affine)
    x = x.decoded() if isinstance(x, Rows) else x
    dx = product.of_x(jax.typeof(x), affines.along_channels(kernel, affine), g)
    folded = product.of_kernel(x, kernel, g)
    sums = jnp.sum(g, rows)
    of_scale = affine.of_scale(jnp.sum(folded * kernel, tuple(range(kernel.ndim - 1))), sums)
    return dx, affines.along_channels(folded, affine), affine.cotangents(of_scale, sums)


_affine_product.defvjp(_forward, _backward, symbolic_zeros=True)
