"""What one product of a model costs in the backward pass as computed here: FLOPs, and bytes kept for it."""

import functools
import math

import jax
import jax.numpy as jnp

from lbpwht_jax.cost.trace import Product
from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.flops import product_flops
from lbpwht_jax.ops.projection import expand, project
from lbpwht_jax.ops.spec import Grid, LowRankSpec


def matmul_flops(product: Product, spec: LowRankSpec | None) -> int:
    """Backward FLOPs of one image: products and Walsh transforms, 2 a multiply-add.

    The projection of the inputs, done in the forward pass, is charged to the backward pass.

    Args:
      product: of the forward pass.
      spec: of its backward pass; ``None`` for an exact one.
    """
    dx, dw = product.needs_dx, int(product.needs_dw)
    if spec is None:
        return 2 * product.inside_macs * (dx + dw)
    grid, repeats = _grid(product)
    inputs, outputs = product.channels
    low_dx, low_dw = dx * (spec.dx == "low_rank"), dw * (spec.dw == "low_rank")
    analysis, synthesis = _transform_flops(spec, grid, product.prefix_tokens)
    projections = low_dw * inputs + max(low_dx, low_dw) * outputs
    flops = 2 * inputs * outputs * (low_dx + low_dw) * (product.prefix_tokens + coefficient_count(spec, grid))
    flops += analysis * projections + synthesis * low_dx * inputs
    return repeats * flops + 2 * product.macs * (dx - low_dx + dw - low_dw)


@functools.cache
def _transform_flops(spec: LowRankSpec, grid: Grid, prefix_tokens: int) -> tuple[int, int]:
    """FLOPs a channel of projecting a grid and of expanding its coefficients."""
    at = (spec, grid, prefix_tokens)
    tokens = jax.ShapeDtypeStruct((1, prefix_tokens + math.prod(grid), 1), jnp.float32)
    coefficients = jax.eval_shape(lambda x: project(x, *at), tokens)
    return product_flops(lambda x: project(x, *at), tokens), product_flops(lambda x: expand(x, *at), coefficients)


def saved_elements(product: Product, spec: LowRankSpec | None) -> int:
    """Numbers an image that the kernel's gradient needs from the forward pass: the input, or its coefficients.

    Args:
      product: of the forward pass, of a layer.
      spec: of its backward pass; ``None`` for an exact one.
    """
    if not product.needs_dw:
        return 0
    if spec is None or spec.dw == "exact":
        return product.input_elements
    grid, repeats = _grid(product)
    return repeats * (product.prefix_tokens + coefficient_count(spec, grid)) * product.channels[0]


def _grid(product: Product) -> tuple[Grid, int]:
    """The token grid of a product, and how many of them an image has."""
    if product.grid is None:
        raise ValueError(f"{product.path}: its token grid is not known, so it cannot be low-rank")
    return product.grid, product.tokens // (product.prefix_tokens + math.prod(product.grid))
