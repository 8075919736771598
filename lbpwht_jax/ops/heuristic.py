"""The automatic choice: which layers low-rank backprop makes faster.

The time of a layer's backward pass is taken to be its FLOPs, those of Walsh transforms included, plus ``20`` for every element
that the products and transforms read or write beside the kernel: on the CPUs this was measured on (``lbpwht bench layers``)
moving a float32 costs about as much as 20 FLOPs of a matrix product. A transform passes over its tokens about once, but about
four times where it goes axis by axis: grids of more than 256 tokens with functions of index 4 or more (LP_{L1-6} on 56x56).
There, and where nearly every function of a narrow layer is kept, the exact products are faster.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.flops import product_flops
from lbpwht_jax.ops.projection import expand, goes_by_axis, project
from lbpwht_jax.ops.spec import Grid, LowRankSpec

_FLOPS_AN_ELEMENT = 20
_PASSES_BY_AXIS = 4


@functools.cache
def predicted_speedup(spec: LowRankSpec, grid: Grid, prefix_tokens: int, inputs: int, outputs: int) -> float:
    """Time of a layer's exact backward pass over that of its low-rank one, predicted from its shape.

    Args:
      spec: the functions kept and what is low-rank.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      inputs: channels.
      outputs: channels.
    """
    tokens = prefix_tokens + math.prod(grid)
    coefficients = prefix_tokens + coefficient_count(spec, grid)
    low_dx, low_dw = spec.dx == "low_rank", spec.dw == "low_rank"

    def products(low: int) -> int:
        return 2 * inputs * outputs * (coefficients * low + tokens * (2 - low))

    at = (spec, grid, prefix_tokens)
    flops_in = product_flops(lambda x: project(x, *at), jax.ShapeDtypeStruct((1, tokens, 1), jnp.float32))
    flops_out = product_flops(lambda x: expand(x, *at), jax.ShapeDtypeStruct((1, coefficients, 1), jnp.float32))
    projected = low_dw * inputs + (low_dx or low_dw) * outputs
    expanded = low_dx * inputs
    passed = _PASSES_BY_AXIS * tokens if goes_by_axis(spec, grid) else tokens + coefficients
    moved = passed * (projected + expanded) + tokens * (inputs + outputs) * ((not low_dx) + (not low_dw))
    low = products(low_dx + low_dw) + flops_in * projected + flops_out * expanded + _FLOPS_AN_ELEMENT * moved
    return (products(0) + _FLOPS_AN_ELEMENT * 2 * tokens * (inputs + outputs)) / low


def chosen(spec: LowRankSpec, grid: Grid, prefix_tokens: int, inputs: int, outputs: int) -> LowRankSpec:
    """``spec``, or one that is exact where ``spec.when`` is ``"faster"`` and low rank is predicted to be slower.

    Args:
      spec: the functions kept and what is low-rank.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      inputs: channels.
      outputs: channels.
    """
    if spec.when == "always" or predicted_speedup(spec, grid, prefix_tokens, inputs, outputs) >= 1:
        return spec
    return dataclasses.replace(spec, dx="exact", dw="exact")
