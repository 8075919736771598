"""A dense layer's product with its exact backward pass, in the form that is fastest on the platform."""

import dataclasses
import math
from typing import Any

import jax
from jax import lax

from lbpwht_jax.ops.bilinear import bilinear
from lbpwht_jax.ops.dtypes import static_precision
from lbpwht_jax.ops.platforms import by_platform
from lbpwht_jax.ops.sharding import explicit_sharding


def exact_matmul(
    x: jax.Array, kernel: jax.Array, precision: Any = None, preferred_element_type: Any = None, bits: int | None = None
) -> jax.Array:
    """``x @ kernel``, and its exact cotangents.

    XLA's CPU backend contracts one axis up to twice as fast as several: of several it transposes and copies one side. So the
    kernel's cotangent sums over rows in one axis there. Accelerators lay out arrays by their last two axes, and take them as
    they are. Reverse-mode differentiation only. On meshes with explicit axes, for operands of two dtypes and for a result of
    another one the cotangents are those of ``jax.lax.dot_general``.

    Args:
      x: ``[..., in]``, floating point.
      kernel: ``[in, out]``, floating point.
      precision: precision of all products, as for ``jax.lax.dot_general``.
      preferred_element_type: dtype of the result, as for ``jax.lax.dot_general``.
      bits: in how many bits x is kept, 4 or 8; ``None`` for all of it. A single row per image, ``[batch, in]``, is kept whole.

    Returns:
      ``[..., out]``.
    """
    explicit = explicit_sharding(x) is not None or explicit_sharding(kernel) is not None
    plain = x.ndim < 3 or x.dtype != kernel.dtype or explicit or preferred_element_type is not None
    product = ExactProduct(static_precision(precision), preferred_element_type)
    transposes = None if plain else (product.of_x, product.of_kernel)
    return bilinear(product, x, kernel, bits=bits if x.ndim > 2 else None, transposes=transposes)


@dataclasses.dataclass(frozen=True)
class ExactProduct:
    """``exact_matmul`` with its precision and its transposes, as ``affine_product`` takes it.

    Attributes:
      precision, preferred_element_type: as for ``exact_matmul``.
    """

    precision: Any
    preferred_element_type: Any = None

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """``x @ kernel``."""
        how = {"precision": self.precision, "preferred_element_type": self.preferred_element_type}
        return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **how)

    def of_x(self, like: Any, kernel: jax.Array, g: jax.Array) -> jax.Array:
        """The cotangent of x, an array ``like`` which is given, from the result's cotangent g."""
        del like
        return lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())), precision=self.precision)

    def of_kernel(self, x: jax.Array, like: Any, g: jax.Array) -> jax.Array:
        """The cotangent of a kernel ``like`` the one given, from the result's cotangent g."""
        if explicit_sharding(x) is not None:  # JAX's own transpose says how it is sharded
            return jax.linear_transpose(lambda kernel: self(x, kernel), like)(g)[0]

        def contracted(x: jax.Array, g: jax.Array) -> jax.Array:
            rows = tuple(range(x.ndim - 1))
            return lax.dot_general(x, g, ((rows, rows), ((), ())), precision=self.precision)

        def in_one_axis(x: jax.Array, g: jax.Array) -> jax.Array:
            x, g = (a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in (x, g))
            return contracted(x, g)

        return by_platform(in_one_axis, x, g, cuda=contracted, tpu=contracted)
