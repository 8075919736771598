"""LoRA's branch beside a dense layer (Hu et al., 2021): its arithmetic, its initial values, its merging into the kernel."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lbpwht_jax.adaptation.resolution import Adaptation
from lbpwht_jax.ops.sharding import explicit_sharding, is_explicit

A, B = "lora_a", "lora_b"


def init_a(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws ``A``, ``[..., inputs, rank]``, uniformly between ``-inputs ** -0.5`` and ``inputs ** -0.5``, as PEFT does."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def init_b(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Returns ``B``, ``[..., rank, outputs]``: zeros. ``key`` is not used."""
    return jnp.zeros(shape, dtype)


def shapes(adaptation: Adaptation) -> dict[str, tuple[int, int]]:
    """The shapes of the branch's parameters, by name."""
    layer, rank = adaptation.layer, adaptation.rank
    return {A: (layer.inputs, rank), B: (rank, layer.outputs)}


def delta(adaptation: Adaptation, a: Any, b: Any) -> jax.Array:
    """What the branch adds to the kernel, in the kernel's shape; for a stack of layers if ``a`` and ``b`` are stacks.

    Args:
      adaptation: how the layer is adapted.
      a: ``[..., inputs, rank]``.
      b: ``[..., rank, outputs]``.
    """
    product = adaptation.scale * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return product.reshape(*product.shape[:-2], *adaptation.layer.kernel_shape)


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


def dense_product(adaptation: Adaptation) -> Callable[..., Any]:
    """The stand-in for ``lax.dot_general`` with the layer's backward pass."""
    if adaptation.spec is None:
        return lax.dot_general
    at = {"grid": adaptation.grid, "prefix_tokens": adaptation.prefix_tokens}
    return adaptation.spec.dot_general(**at, name=adaptation.layer.path)


def convolution(adaptation: Adaptation) -> Callable[..., Any]:
    """The stand-in for ``lax.conv_general_dilated`` with the layer's backward pass."""
    if adaptation.spec is None:
        return lax.conv_general_dilated
    return adaptation.spec.conv_general_dilated(name=adaptation.layer.path)
