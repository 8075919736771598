"""The form in which a transform runs: chosen from the shape alone, here and nowhere else."""

import math
from typing import Literal

from lbpwht_jax.ops.block_sums import MATRIX_TOKENS, Side, subblock_sizes
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

Form = Literal["matrix", "by_axis", "by_block"]


def transform_form(spec: SpecFields, grid: Grid, side: Side) -> Form:
    """The form of ``project`` (the analysis) or of ``expand`` (the synthesis).

    Args:
      spec: the functions and the kind of projection.
      grid: tokens along each axis.
      side: ``"analysis"`` or ``"synthesis"``.

    Returns:
      ``"by_block"``: through sums over sub-blocks, where the functions allow them, or through their values. A grid within one
      block is expanded otherwise: there is little to save.
      ``"matrix"``: one matrix for the whole grid.
      ``"by_axis"``: one matrix per grid axis, for large grids.
    """
    has_subblocks = max(subblock_sizes(spec, grid, side)) > 1
    if has_subblocks and (side == "analysis" or max(grid) > spec.block):
        return "by_block"
    return "matrix" if math.prod(grid) <= MATRIX_TOKENS else "by_axis"
