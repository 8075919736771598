"""LoRA's branch beside a dense layer (Hu et al., 2021): its arithmetic, its initial values, its merging into the kernel."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lbpwht_jax.adaptation.layer import Adaptation
from lbpwht_jax.adaptation.resolution import BRANCH
from lbpwht_jax.ops.sharding import explicit_sharding, is_explicit

A, B = BRANCH


def init_a(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws ``A``, ``[..., inputs, rank]``, uniformly between ``-inputs ** -0.5`` and ``inputs ** -0.5``, as PEFT does."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def init_b(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Returns ``B``, ``[..., rank, outputs]``: zeros. ``key`` is not used."""
    return jnp.zeros(shape, dtype)


def shapes(adaptation: Adaptation) -> dict[str, tuple[int, int]]:
    """The shapes of one layer's branch's parameters, by name."""
    layer, rank = adaptation.layer, adaptation.rank
    return {A: (layer.inputs, rank), B: (rank, layer.outputs)}


def fresh(adaptation: Adaptation, key: jax.Array, dtype: Any) -> dict[str, jax.Array]:
    """Initial parameters of the branch as they are stored, by name; of every layer of a stack."""
    sizes = adaptation.layer.stack.sizes
    wanted = {name: (*sizes, *shape) for name, shape in shapes(adaptation).items()}
    made = {A: init_a(key, wanted[A], dtype), B: init_b(key, wanted[B], dtype)}
    return {name: from_front(matrix, adaptation.layer.stack.matrix_axes) for name, matrix in made.items()}


def to_front(matrix: Any, axes: tuple[int, ...]) -> Any:
    """An array (NumPy's or JAX's) with ``axes``, those of a stack of layers, first."""
    return matrix.transpose(_order(matrix.ndim, axes))


def from_front(matrix: Any, axes: tuple[int, ...]) -> Any:
    """Undoes ``to_front``."""
    return matrix.transpose(tuple(np.argsort(_order(matrix.ndim, axes)).tolist()))


def _order(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return (*axes, *(axis for axis in range(ndim) if axis not in axes))


def delta(adaptation: Adaptation, a: Any, b: Any) -> jax.Array:
    """What the branch adds to the kernel, in the shape in which the kernel is stored.

    Args:
      adaptation: how the layer is adapted.
      a: ``A`` as it is stored, ``[inputs, rank]`` with the stack's axes, if there is one.
      b: ``B`` as it is stored, ``[rank, outputs]`` with the stack's axes.
    """
    layer = adaptation.layer
    a, b = (to_front(matrix, layer.stack.matrix_axes) for matrix in (a, b))
    product = adaptation.scale * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return from_front(product.reshape(*layer.stack.sizes, *layer.kernel_shape), layer.stack.kernel_axes)


def drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """``x`` with zeros for elements drawn with probability ``rate``, below 1, and the others divided by ``1 - rate``."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=explicit_sharding(x))
    return jnp.where(kept, x / (1 - rate), 0)


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedProduct:
    """Stands in for a layer's ``lax.dot_general`` or ``lax.conv_general_dilated``: low-rank backward pass and LoRA branch.

    Attributes:
      adaptation: how the layer is adapted.
      dense: the layer's own product, with the same signature.
      branch: returns ``A`` and ``B``; called at each call of a layer that has a branch.
      dropped: the dropout of the branch's input, which it is given and returns.
    """

    adaptation: Adaptation
    dense: Callable[..., Any]
    branch: Callable[[], tuple[jax.Array, jax.Array]]
    dropped: Callable[[jax.Array], jax.Array]

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The product plus the branch's output; the arguments are those of the function that this stands in for."""
        if not self.adaptation.rank:
            return self.dense(lhs, rhs, *args, **kwargs)
        y = self.dense(lhs, lax.stop_gradient(rhs), *args, **kwargs)
        if self.adaptation.layer.window:
            return y + self._convolved(lhs, *args, **kwargs).astype(y.dtype)
        lead = lhs.shape[: lhs.ndim - self.adaptation.layer.contracted]
        if self.adaptation.spec is None and not is_explicit(lhs):  # XLA on CPU contracts one axis faster than several
            lead = (math.prod(lead),)
        x = self.dropped(lhs.reshape(*lead, self.adaptation.layer.inputs))
        a, b = (matrix.astype(x.dtype) for matrix in self.branch())
        product = dense_product(self.adaptation)
        last = (((x.ndim - 1,), (0,)), ((), ()))
        options = {"precision": kwargs.get("precision")}
        z = product(product(x, a, last, **options), b, last, **options) * self.adaptation.scale
        return y + z.reshape(y.shape).astype(y.dtype)

    def _convolved(self, lhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The branch's output beside a convolution: one to ``rank`` channels with the same window, then ``B``."""
        a, b = (matrix.astype(lhs.dtype) for matrix in self.branch())
        layer, rank = self.adaptation.layer, self.adaptation.rank
        z = self.dense(self.dropped(lhs), a.reshape(*layer.window, layer.input_shape[-1], rank), *args, **kwargs)
        return jnp.matmul(z, b, precision=kwargs.get("precision")) * self.adaptation.scale


def dense_product(adaptation: Adaptation) -> Callable[..., Any]:
    """The stand-in for ``lax.dot_general`` with the layer's backward pass; exact where the layer is called on vectors."""
    if adaptation.spec is None:
        return lax.dot_general
    at = {"grid": adaptation.grid, "prefix_tokens": adaptation.prefix_tokens}
    product = adaptation.spec.dot_general(**at, name=adaptation.layer.path)
    return _ExactOnVectors(product) if adaptation.layer.on_vectors else product


@dataclasses.dataclass(frozen=True)
class _ExactOnVectors:
    """``lax.dot_general`` with the backward pass of ``product``, and an exact one for inputs ``[batch, channels]``."""

    product: Callable[..., Any]

    def __call__(self, lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *args: Any, **kwargs: Any) -> jax.Array:
        contracted = len(dimension_numbers[0][0])
        product = lax.dot_general if lhs.ndim - contracted <= 1 else self.product
        return product(lhs, rhs, dimension_numbers, *args, **kwargs)


def convolution(adaptation: Adaptation) -> Callable[..., Any]:
    """The stand-in for ``lax.conv_general_dilated`` with the layer's backward pass."""
    if adaptation.spec is None:
        return lax.conv_general_dilated
    return adaptation.spec.conv_general_dilated(name=adaptation.layer.path)
