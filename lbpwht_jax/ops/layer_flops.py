"""FLOPs of the backward pass of one layer: what the automatic choice predicts by, and what the cost of a model is made of."""

import functools
import math

import jax
import jax.numpy as jnp

from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.flops import product_flops
from lbpwht_jax.ops.projection import expand, project
from lbpwht_jax.ops.spec_fields import Grid, SpecFields


@functools.cache
def transform_flops(spec: SpecFields, grid: Grid, prefix_tokens: int = 0) -> tuple[int, int]:
    """FLOPs per channel of projecting a grid of tokens, and of expanding its coefficients, 2 per multiply-add."""
    at = (spec, grid, prefix_tokens)
    tokens = jax.ShapeDtypeStruct((1, prefix_tokens + math.prod(grid), 1), jnp.float32)
    coefficients = jax.ShapeDtypeStruct((1, prefix_tokens + coefficient_count(spec, grid), 1), jnp.float32)
    return product_flops(lambda x: project(x, *at), tokens), product_flops(lambda x: expand(x, *at), coefficients)


def transformed_channels(spec: SpecFields, inputs: int, outputs: int, dx: bool = True, dw: bool = True) -> tuple[int, int]:
    """Channels that a layer projects, and those that it expands.

    Args:
      spec: what is low-rank.
      inputs: input channels.
      outputs: output channels.
      dx: whether the input's cotangent is computed.
      dw: whether the kernel's cotangent is computed.
    """
    low_dx, low_dw = dx and spec.dx == "low_rank", dw and spec.dw == "low_rank"
    return low_dw * inputs + (low_dx or low_dw) * outputs, low_dx * inputs


def backward_flops(
    spec: SpecFields, grid: Grid, prefix_tokens: int, inputs: int, outputs: int, dx: bool = True, dw: bool = True
) -> int:
    """Backward FLOPs of one layer on one grid of tokens: products and Walsh transforms, 2 per multiply-add.

    The projection of the inputs, done in the forward pass, is charged to the backward pass.

    Args:
      spec: the functions kept and what is low-rank.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      inputs: input channels.
      outputs: output channels.
      dx: whether the input's cotangent is computed.
      dw: whether the kernel's cotangent is computed.
    """
    tokens, coefficients = prefix_tokens + math.prod(grid), prefix_tokens + coefficient_count(spec, grid)
    rows = dx * (coefficients if spec.dx == "low_rank" else tokens) + dw * (coefficients if spec.dw == "low_rank" else tokens)
    projected, expanded = transformed_channels(spec, inputs, outputs, dx, dw)
    per_projection, per_expansion = transform_flops(spec, grid, prefix_tokens)
    return 2 * inputs * outputs * rows + per_projection * projected + per_expansion * expanded
