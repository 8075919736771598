"""Checks of the operation's arguments, with messages that say how to put them right."""

import math
import operator

import jax
import jax.numpy as jnp

from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.spec_fields import Grid, SpecFields


def check_grid(shape: tuple[int, ...], spec: SpecFields, grid: Grid | None, prefix_tokens: int, name: str) -> Grid:
    """The token grid of an input, checked.

    Args:
      shape: the input's: ``[..., prefix_tokens + tokens, channels]``, or ``[..., *grid, channels]`` if ``grid`` is ``None``.
      spec: the functions kept, a ``LowRankSpec``.
      grid: tokens along each axis, or ``None``.
      prefix_tokens: leading tokens outside the grid.
      name: where the layer is; it opens the messages.

    Returns:
      Tokens along each axis.

    Raises:
      TypeError: if ``spec`` is not a ``LowRankSpec``, ``grid`` not a tuple of integers or ``prefix_tokens`` not an integer.
      ValueError: if the grid is missing or does not fit the input or the spec.
    """
    if not isinstance(spec, SpecFields):
        raise TypeError(f"{name}: spec must be a LowRankSpec, such as lp_l1(4), got {spec!r}")
    try:
        prefix_tokens = operator.index(prefix_tokens)
        grid = None if grid is None else tuple(operator.index(n) for n in grid)
    except TypeError:
        raise TypeError(
            f"{name}: grid must be a tuple of integers and prefix_tokens an integer, got grid={grid!r}, "
            f"prefix_tokens={prefix_tokens!r}"
        ) from None
    if prefix_tokens < 0:
        raise ValueError(f"{name}: prefix_tokens must not be negative, got {prefix_tokens}")
    if grid is None:
        if prefix_tokens:
            raise ValueError(
                f"{name}: prefix_tokens={prefix_tokens} needs a token axis, but without a grid the input {list(shape)} is a "
                "channels-last map, which has none; pass grid=(height, width) and x of shape [..., tokens, channels]"
            )
        if len(shape) < spec.ndim + 2:
            raise ValueError(
                f"{name}: the grid is missing. Without it the input must be a channels-last map of shape "
                f"[batch, {', '.join(['size'] * spec.ndim)}, channels], got {list(shape)}. For tokens, "
                f"[..., tokens, channels], pass grid=({', '.join(['size'] * spec.ndim)}); for a single map add a batch axis"
            )
        grid = shape[-1 - spec.ndim : -1]
    if len(grid) != spec.ndim:
        raise ValueError(
            f"{name}: the spec's functions have {spec.ndim} axes and the grid {grid} has {len(grid)}; "
            f"make the spec with ndim={len(grid)}, such as lp_l1(4, ndim={len(grid)})"
        )
    if min(grid) < 1:
        raise ValueError(f"{name}: every axis of the grid needs at least one token, got {grid}")
    return grid


def check_operands(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    spec: SpecFields,
    grid: Grid | None,
    prefix_tokens: int,
    name: str,
) -> Grid:
    """The token grid of ``low_rank_matmul``'s input, with all of its arguments checked.

    Args:
      x: ``[..., prefix_tokens + tokens, in]`` with ``grid``, ``[..., *grid, in]`` without.
      kernel: ``[in, out]``.
      bias: ``[out]`` or ``None``.
      spec: the functions kept, a ``LowRankSpec``.
      grid: tokens along each axis, or ``None``.
      prefix_tokens: leading tokens outside the grid.
      name: where the layer is; it opens the messages.

    Returns:
      Tokens along each axis.

    Raises:
      TypeError, ValueError: as ``low_rank_matmul`` says.
    """
    flat = grid is not None
    grid = check_grid(x.shape, spec, grid, prefix_tokens, name)
    for label, array in (("x", x), ("kernel", kernel), ("bias", bias)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name}: {label} must be of a floating-point dtype, got {array.dtype}; cast it first")
    if kernel.ndim != 2:
        raise ValueError(f"{name}: the kernel must be [in, out], got shape {list(kernel.shape)}")
    if flat:
        expected = prefix_tokens + math.prod(grid)
        if x.ndim < 2 or x.shape[-2] != expected:
            raise ValueError(
                f"{name}: grid {grid} with {prefix_tokens} prefix tokens makes {expected} tokens, but x of shape "
                f"{list(x.shape)} has {x.shape[-2] if x.ndim > 1 else 'no token axis'} along its token axis"
            )
    if x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name}: x of shape {list(x.shape)} has {x.shape[-1]} channels, but the kernel of shape "
            f"{list(kernel.shape)} takes {kernel.shape[0]}"
        )
    if not coefficient_count(spec, grid):
        raise ValueError(
            f"{name}: none of the functions {spec.bases} exists on the grid {grid}, so every gradient would be zero; "
            "keep the mean, (0, 0), or use a larger grid"
        )
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(f"{name}: the bias must be [{kernel.shape[1]}], one per channel of the output, got {list(bias.shape)}")
    return grid
