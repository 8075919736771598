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
from typing import TypeVar

from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.forms import transform_form
from lbpwht_jax.ops.layer_flops import backward_flops, transformed_channels
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

_FLOPS_PER_ELEMENT = 20
_PASSES_BY_AXIS = 4

Spec = TypeVar("Spec", bound=SpecFields)


@functools.cache
def predicted_speedup(spec: SpecFields, grid: Grid, prefix_tokens: int, inputs: int, outputs: int) -> float:
    """Time of a layer's exact backward pass over that of its low-rank one, predicted from its shape.

    Args:
      spec: the functions kept and what is low-rank.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      inputs: input channels.
      outputs: output channels.

    Returns:
      The ratio, above 1 where low rank is predicted to be faster.
    """
    tokens, coefficients = prefix_tokens + math.prod(grid), prefix_tokens + coefficient_count(spec, grid)
    by_axis = transform_form(spec, grid, "analysis") == "by_axis"
    per_channel = _PASSES_BY_AXIS * tokens if by_axis else tokens + coefficients
    exact_products = (spec.dx == "exact") + (spec.dw == "exact")
    moved = per_channel * sum(transformed_channels(spec, inputs, outputs)) + exact_products * tokens * (inputs + outputs)

    def time(flops: int, elements: int) -> int:
        return flops + _FLOPS_PER_ELEMENT * elements

    exact = time(2 * 2 * inputs * outputs * tokens, 2 * tokens * (inputs + outputs))
    return exact / time(backward_flops(spec, grid, prefix_tokens, inputs, outputs), moved)


def chosen(spec: Spec, grid: Grid, prefix_tokens: int, inputs: int, outputs: int) -> Spec:
    """``spec``, or an exact one where ``spec.when`` is ``"faster"`` and low rank is predicted to be slower.

    Args:
      spec: the functions kept and what is low-rank.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      inputs: input channels.
      outputs: output channels.
    """
    if spec.when == "always" or predicted_speedup(spec, grid, prefix_tokens, inputs, outputs) >= 1:
        return spec
    return dataclasses.replace(spec, dx="exact", dw="exact")
