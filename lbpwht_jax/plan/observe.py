"""What each Walsh function holds of a layer's gradients, observed in one backward pass.

The functions of a block, orthonormalised, are an orthonormal basis of the tokens. With ``A_k`` the projection on the k-th,

    dW = sum_k (A_k x)^T (A_k g)        |dx|^2 = sum_k |A_k dx|^2

so that the inner products of the terms say what any selection of functions would lose of ``dW``, and the energies what it
would lose of ``dx``: one pass serves all of them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lbpwht_jax.ops.basis import coefficient_indices
from lbpwht_jax.ops.projection import project
from lbpwht_jax.ops.spec import Grid, LowRankSpec

_CHUNK = 2**24  # numbers of one piece of the functions' shares of a kernel's gradient


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer that is observed.

    Attributes:
      path: the module's path.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      block: edge of a block in tokens.
      inputs: input channels.
      outputs: output channels.
      contracted: how many of the input's last dimensions these are.
    """

    path: str
    grid: Grid
    prefix_tokens: int
    block: int
    inputs: int
    outputs: int
    contracted: int = 1

    @property
    def functions(self) -> tuple[tuple[int, ...], ...]:
        """All functions of a block."""
        return tuple(itertools.product(range(self.block), repeat=len(self.grid)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Energies:
    """What the functions of a layer's blocks hold of its gradients.

    Attributes:
      dw: inner products of the functions' shares of the kernel's gradient, ``[functions + 1, functions + 1]``; the last share
        is that of the prefix tokens.
      dx: energies of the shares of the input's cotangent, ``[functions + 1]``.
    """

    dw: Any
    dx: Any

    @classmethod
    def zeros(cls, site: Site) -> "Energies":
        """Those of no batch."""
        count = len(site.functions)
        return cls(jnp.zeros((count + 1, count + 1)), jnp.zeros(count + 1))


@functools.cache
def _rows(site: Site) -> np.ndarray:
    """Which coefficients belong to each function, and to the prefix tokens: ``[functions + 1, most]``.

    Where there are fewer, the number of all coefficients fills the row.
    """
    index = coefficient_indices(LowRankSpec(site.functions, block=site.block), site.grid)
    position = {basis: k for k, basis in enumerate(site.functions)}
    rows: list[list[int]] = [[] for _ in range(len(position) + 1)]
    rows[-1] = list(range(site.prefix_tokens))
    for row, each in enumerate(index):
        rows[position[tuple(each[:, 1].tolist())]].append(site.prefix_tokens + row)
    most = max(map(len, rows))
    return np.array([row + [site.prefix_tokens + len(index)] * (most - len(row)) for row in rows])


def _by_function(x: jax.Array, site: Site) -> jax.Array:
    """Coefficients of ``[batch, tokens, channels]``: ``[functions + 1, rows, channels]``, with zeros where there is none."""
    coefficients = project(x, LowRankSpec(site.functions, block=site.block), site.grid, site.prefix_tokens)
    rows = _rows(site)
    padded = jnp.pad(coefficients, ((0, 0), (0, 1), (0, 0)))
    taken = jnp.take(padded, rows.reshape(-1), axis=1).reshape(x.shape[0], *rows.shape, x.shape[-1])
    return jnp.moveaxis(taken, 1, 0).reshape(len(rows), -1, x.shape[-1])


def energies(x: jax.Array, g: jax.Array, dx: jax.Array, site: Site) -> Energies:
    """What the functions hold of the gradients of one layer.

    Args:
      x: ``[batch, tokens, inputs]``.
      g: ``[batch, tokens, outputs]``, the output's cotangent.
      dx: ``[batch, tokens, inputs]``, the input's.
      site: the layer.
    """
    x, g, dx = (_by_function(a.astype(jnp.float32), site) for a in (x, g, dx))
    inputs, outputs, functions = x.shape[-1], g.shape[-1], len(x)
    chunk = max(1, min(inputs, _CHUNK // (functions * outputs)))
    pieces = jnp.pad(x, ((0, 0), (0, 0), (0, -inputs % chunk))).reshape(functions, x.shape[1], -1, chunk)

    def add(total: jax.Array, piece: jax.Array) -> tuple[jax.Array, None]:
        shares = lax.dot_general(piece, g, (((1,), (1,)), ((0,), (0,)))).reshape(functions, -1)
        return total + shares @ shares.T, None

    dw, _ = lax.scan(add, jnp.zeros((functions, functions)), jnp.moveaxis(pieces, 2, 0))
    return Energies(dw, jnp.sum(dx**2, (1, 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, kernel: jax.Array, tap: Energies, site: Site) -> jax.Array:
    """``x @ kernel``, whose backward pass gives ``tap``, which is zero, the energies as its cotangent."""
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array, tap: Energies, site: Site) -> tuple[jax.Array, tuple]:
    return x @ kernel, (x, kernel)


def _backward(site: Site, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple:
    x, kernel = kept
    dx, dw = g @ kernel.T, jnp.einsum("bti,bto->io", x, g)
    return dx, dw.astype(kernel.dtype), energies(x, g, dx, site)


_product.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True, eq=False)
class Observer:
    """Makes the products of layers tell their energies: an interceptor for ``nn.intercept_methods``.

    Attributes:
      sites: the layers, by path.
      taps: zeros, by path; the derivative of the loss by them is the energies.
    """

    sites: Mapping[str, Site]
    taps: Mapping[str, Energies]

    def __call__(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Calls a layer."""
        module, path = context.module, "/".join(context.module.path)
        field = "conv_general_dilated" if isinstance(module, nn.Conv) else "dot_general"
        if path not in self.sites or context.method_name != "__call__" or _is_observed(getattr(module, field)):
            return call(*args, **kwargs)
        observed = _Observed(self.sites[path], self.taps[path], outputs=_outputs(module))
        replaced: dict[str, Any] = {field: observed}
        return module.clone(parent=module.scope, **replaced)(*args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Observed:
    """Stands in for a layer's ``lax.dot_general`` or ``lax.conv_general_dilated``.

    Attributes:
      site: the layer.
      tap: zeros.
      outputs: how many of the kernel's last dimensions are outputs.
    """

    site: Site
    tap: Energies
    outputs: int

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The product; further arguments are those of the function that this stands in for."""
        outputs = rhs.shape[-self.outputs :]
        kernel = rhs.reshape(-1, math.prod(outputs))
        tokens = self.site.prefix_tokens + math.prod(self.site.grid)
        x = lhs.reshape(-1, tokens, len(kernel))
        y: Any = _product(x, kernel, self.tap, self.site)
        return y.reshape(*lhs.shape[: lhs.ndim - self.site.contracted], *outputs).astype(lhs.dtype)


def _outputs(module: Any) -> int:
    return len(module.features) if isinstance(module.features, Sequence) else 1


def _is_observed(product: Any) -> bool:
    return isinstance(product, _Observed)
