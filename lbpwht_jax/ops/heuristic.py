"""The automatic choice: which layers low-rank backprop makes faster.

The time of a layer's backward pass is taken to be its FLOPs, those of Walsh transforms included, plus ``20`` for every element
that the products and transforms read or write beside the kernel: on the CPUs this was measured on (``lbpwht bench layers``)
moving a float32 costs about as much as 20 FLOPs of a matrix product. A transform passes over its tokens about once, but about
four times where it goes axis by axis: grids of more than 256 tokens with functions of index 4 or more (LP_{L1-6} on 56x56).
There, and where nearly every function of a narrow layer is kept, the exact products are faster.

On GPUs and TPUs products, projections and expansions run one after another, each as long as its FLOPs or its bytes need at the
chip's peaks, whichever is more (a roofline by kernel). Kernels' FLOPs count as nothing there: they hide behind their bytes.
On a TPU the operands of transforms lie in tiles, with channels padded to a multiple of 128 and tokens to one of 16, where exact
products of few channels may lie otherwise. Of two layers with GELU between them, joined by a ``Link``, the cotangent between
the two stays coefficients: on a GPU the first need not project it, and the second reads the tokens between them once instead
of projecting them and expanding their cotangent. A grid without prefix tokens is taken for a map on a TPU: XLA lays maps out
with the batch in the tiles, so that each transform copies its tokens there or back. (Compiled for a v5e at LP_{L1-4},
EfficientFormer-L1's MLPs move 1.5 to 2 times the bytes of the exact ones; ViT-B's layers move less.)
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, TypeVar

import jax

from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.cells import grid_cells
from lbpwht_jax.ops.forms import transform_form
from lbpwht_jax.ops.layer_flops import backward_flops, transformed_channels
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

_FLOPS_PER_ELEMENT = 20
_PASSES_BY_AXIS = 4

Platform = Literal["cpu", "cuda", "tpu"]
# FLOPs of a product in the time that one element of 16 bits takes to be moved, from the chips' bfloat16 FLOP/s and bytes/s:
# H100 SXM, 989e12 and 3.35e12 (NVIDIA's data sheet); TPU v5e, 197e12 and 819e9 (Google's documentation).
_FLOPS_PER_MOVED: dict[str, float] = {"cuda": 2 * 989e12 / 3.35e12, "tpu": 2 * 197e12 / 819e9}

# Rows and columns of the tiles in which 16-bit operands of transforms lie.
_TILES: dict[str, tuple[int, int]] = {"cuda": (1, 1), "tpu": (16, 128)}

_forced: ContextVar[Platform | None] = ContextVar("platform", default=None)

Spec = TypeVar("Spec", bound=SpecFields)
Place = Literal["first", "second"]


@contextlib.contextmanager
def choosing_for(platform: Platform) -> Iterator[None]:
    """Within this context the automatic choice is made for a platform, rather than for JAX's default backend.

    The choice is made when a program is traced (and when a model is adapted), since it decides what is kept: a program that is
    traced on one machine for another needs this.
    """
    token = _forced.set(platform)
    try:
        yield
    finally:
        _forced.reset(token)


_PLATFORMS: dict[str, Platform] = {"gpu": "cuda", "tpu": "tpu"}


def platform() -> Platform:
    """What the automatic choice is made for: the platform of ``choosing_for``, or JAX's default backend."""
    return _forced.get() or _PLATFORMS.get(jax.default_backend(), "cpu")


@functools.cache
def predicted_speedup(
    spec: SpecFields,
    grid: Grid,
    prefix_tokens: int,
    inputs: int,
    outputs: int,
    platform: Platform = "cpu",
    place: Place | None = None,
) -> float:
    """Time of a layer's exact backward pass over that of its low-rank one, predicted from its shape.

    Args:
      spec: the functions kept and what is low-rank.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      inputs: input channels.
      outputs: output channels.
      platform: what it runs on; GPUs and TPUs compute in 16 bits, at a large batch.
      place: which of two joined layers it is, the other being low-rank too; ``None`` for a layer by itself.

    Returns:
      The ratio, above 1 where low rank is predicted to be faster.
    """
    tokens, coefficients = prefix_tokens + math.prod(grid), prefix_tokens + coefficient_count(spec, grid)
    if platform != "cpu":
        copied = platform == "tpu" and not prefix_tokens
        kernels = platform == "cuda" and grid_cells(spec, grid, prefix_tokens) is not None
        return _roofline_speedup(spec, tokens, coefficients, inputs, outputs, platform, copied, place if kernels else None)
    by_axis = transform_form(spec, grid, "analysis") == "by_axis"
    per_channel = _PASSES_BY_AXIS * tokens if by_axis else tokens + coefficients
    exact_products = (spec.dx == "exact") + (spec.dw == "exact")
    moved = per_channel * sum(transformed_channels(spec, inputs, outputs)) + exact_products * tokens * (inputs + outputs)

    def time(flops: int, elements: int) -> int:
        return flops + _FLOPS_PER_ELEMENT * elements

    exact = time(2 * 2 * inputs * outputs * tokens, 2 * tokens * (inputs + outputs))
    return exact / time(backward_flops(spec, grid, prefix_tokens, inputs, outputs), moved)


def _roofline_speedup(
    spec: SpecFields,
    tokens: int,
    coefficients: int,
    inputs: int,
    outputs: int,
    platform: Platform,
    copied: bool,
    place: Place | None,
) -> float:
    """``copied``: whether each transform's tokens are also copied from one layout to another."""
    flops_per_moved, (rows_of_tile, lanes) = _FLOPS_PER_MOVED[platform], _TILES[platform]

    def product(rows: int, channels: int) -> float:
        return max(2 * rows * inputs * outputs, flops_per_moved * rows * channels)

    exact = product(tokens, inputs + outputs)
    columns = _up(inputs, lanes), _up(outputs, lanes)
    rows, kept_rows = _up(tokens, rows_of_tile), _up(coefficients, rows_of_tile)
    low = sum(product(kept_rows, sum(columns)) if kind == "low_rank" else exact for kind in (spec.dx, spec.dw))
    transformed = sum(transformed_channels(spec, *columns))
    if place is not None and (spec.dx, spec.dw) == ("low_rank", "low_rank"):
        transformed -= columns[1] if place == "first" else columns[0]
    moved = ((3 if copied else 1) * rows + kept_rows) * transformed
    return 2 * exact / (low + flops_per_moved * moved)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def chosen(spec: Spec, grid: Grid, prefix_tokens: int, inputs: int, outputs: int, place: Place | None = None) -> Spec:
    """``spec``, or an exact one where ``spec.when`` is ``"faster"`` and low rank is predicted to be slower.

    Predicted for JAX's default backend, or for the platform of ``choosing_for``.

    Args:
      spec: the functions kept and what is low-rank.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      inputs: input channels.
      outputs: output channels.
      place: as for ``predicted_speedup``.
    """
    if spec.when == "always" or predicted_speedup(spec, grid, prefix_tokens, inputs, outputs, platform(), place) >= 1:
        return spec
    return dataclasses.replace(spec, dx="exact", dw="exact")
