"""The form in which the authors' code computes the projection, used only as a baseline for timing.

The grid is padded to whole 8x8 blocks by reflection; every function is broadcast over every block, multiplied and summed; the
input's gradient is expanded in the same way. Their framework stores each product before it is summed; the barriers here make
XLA do so too.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from lbpwht_jax.ops.spec import Grid, LowRankSpec
from lbpwht_jax.ops.walsh import walsh_matrix


def backward(x: jax.Array, kernel: jax.Array, g: jax.Array, spec: LowRankSpec, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Cotangents of the input and the kernel of ``x @ kernel``, by projections that broadcast, multiply and sum.

    Args:
      x: ``[batch, tokens, in]``.
      kernel: ``[in, out]``.
      g: cotangent of the output, ``[batch, tokens, out]``.
      spec: the Walsh functions, for two grid axes.
      grid: height and width.
    """
    functions = _functions(spec, x.dtype)
    x_hat, g_hat = _project(x, functions, spec.block, grid), _project(g, functions, spec.block, grid)
    dw = jnp.einsum("bnri,bnro->io", x_hat, g_hat) / spec.block**2
    dx_hat = jnp.einsum("bnro,io->bnri", g_hat, kernel) / spec.block**2
    product = lax.optimization_barrier(dx_hat[:, :, :, None, :] * functions[None, None, :, :, None])
    return _from_blocks(product.sum(2), spec.block, grid), dw


def _functions(spec: LowRankSpec, dtype: jnp.dtype) -> jax.Array:
    walsh = walsh_matrix(spec.block)
    return jnp.stack([jnp.outer(walsh[i], walsh[j]).ravel() for i, j in spec.bases]).astype(dtype)


def _project(x: jax.Array, functions: jax.Array, block: int, grid: Grid) -> jax.Array:
    blocks = _to_blocks(x, block, grid)
    return lax.optimization_barrier(blocks[:, :, None] * functions[None, None, :, :, None]).sum(3)


def _padding(block: int, grid: Grid) -> list[tuple[int, int]]:
    missing = [-n % block for n in grid]
    return [(-(-n // 2), n // 2) for n in missing]


def _to_blocks(x: jax.Array, block: int, grid: Grid) -> jax.Array:
    """``[batch, tokens, channels]`` to ``[batch, blocks, block * block, channels]``."""
    batch, channels = x.shape[0], x.shape[-1]
    x = jnp.pad(x.reshape(batch, *grid, channels), [(0, 0), *_padding(block, grid), (0, 0)], mode="reflect")
    height, width = (n // block for n in x.shape[1:3])
    x = x.reshape(batch, height, block, width, block, channels).swapaxes(2, 3)
    return lax.optimization_barrier(x.reshape(batch, height * width, block * block, channels))


def _from_blocks(x: jax.Array, block: int, grid: Grid) -> jax.Array:
    batch, channels = x.shape[0], x.shape[-1]
    height, width = (-(-n // block) for n in grid)
    x = x.reshape(batch, height, width, block, block, channels).swapaxes(2, 3)
    x = x.reshape(batch, height * block, width * block, channels)
    (top, _), (left, _) = _padding(block, grid)
    return x[:, top : top + grid[0], left : left + grid[1]].reshape(batch, math.prod(grid), channels)
