"""``low_rank_matmul``: an exact product whose backward pass runs on a few Walsh coefficients of the token grid.

For ``y = x W`` and a cotangent ``g``, with ``A`` and ``E`` the projection and the expansion along the token axis,

    dW = (A x)^T (A g)        dx = E ((A g) W^T)        (LBP-WHT, section 3 and figure 2)

so that only ``A x`` and ``W`` are kept for the backward pass: ``A x`` where the kernel is differentiated, ``W`` where x is.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lbpwht_jax.ops.basis import coefficient_count, token_sum_weights
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.heuristic import chosen
from lbpwht_jax.ops.projection import expand, project
from lbpwht_jax.ops.spec import Grid, LowRankSpec


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the operation needs beyond arrays; hashable."""

    spec: LowRankSpec
    grid: Grid
    prefix_tokens: int
    precision: Any
    accumulate: Any
    output: Any
    out_sharding: Any
    x_dtype: Any
    kernel_dtype: Any
    x_sharding: Any
    kernel_sharding: Any


def _product(a: jax.Array, b: jax.Array, contract: tuple, static: _Static, out_sharding: Any = None) -> jax.Array:
    dtype = a.dtype if a.dtype == b.dtype else static.accumulate
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (contract, ((), ())),
        precision=static.precision,
        preferred_element_type=static.accumulate,
        out_sharding=out_sharding,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, static: _Static) -> jax.Array:
    y = _product(x, kernel, ((x.ndim - 1,), (0,)), static, static.out_sharding).astype(static.output)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _forward(x, kernel, bias, static):
    saved = None
    if kernel.perturbed:
        saved = x.value
        if static.spec.dw == "low_rank":
            saved = project(x.value, static.spec, static.grid, static.prefix_tokens, static.precision)
    y = _matmul(x.value, kernel.value, None if bias is None else bias.value, static)
    wanted = None if bias is None or not bias.perturbed else jnp.zeros((), bias.value.dtype)
    return y, (saved, kernel.value if x.perturbed else None, wanted)


def _backward(static, residuals, g):
    saved, kernel, bias = residuals
    if isinstance(g, SymbolicZero):
        return None, None, None
    spec, at = static.spec, (static.spec, static.grid, static.prefix_tokens, static.precision)
    wanted = ((kernel, spec.dx), (saved, spec.dw))
    coefficients = project(g, *at) if any(a is not None and kind == "low_rank" for a, kind in wanted) else g
    dx = dw = db = None
    if kernel is not None:
        dx, sharding = coefficients if spec.dx == "low_rank" else g, static.x_sharding
        if spec.dx == "low_rank" and sharding is not None:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-2], None, sharding.spec[-1]))
        dx = _product(dx, kernel, ((g.ndim - 1,), (1,)), static, sharding).astype(static.x_dtype)
        if spec.dx == "low_rank":
            dx = expand(dx, *at)
    if saved is not None:
        dw = coefficients if spec.dw == "low_rank" else g
        if static.x_sharding is None:  # on CPU XLA takes a quarter longer to contract several axes than one
            saved, dw = (a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in (saved, dw))
        rows = tuple(range(saved.ndim - 1))
        dw = _product(saved, dw, (rows, rows), static, static.kernel_sharding).astype(static.kernel_dtype)
    if bias is not None:
        db = _token_sum(coefficients, token_sum_weights(*at[:3]) if coefficients is not g else None).astype(bias.dtype)
    return dx, dw, db


def _token_sum(x: jax.Array, weights: np.ndarray | None) -> jax.Array:
    """Sum over batch and tokens of ``[..., tokens, channels]``, or of coefficients, weighted."""
    x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    if weights is not None:
        rows = np.flatnonzero(weights)
        dtype = accumulation_dtype(x.dtype)
        x = x[:, rows].astype(dtype) * jnp.asarray(weights[rows], dtype).reshape(1, -1, 1)
    return jnp.sum(x, (0, 1), dtype=accumulation_dtype(x.dtype))


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def is_explicit(array: jax.Array) -> bool:
    """Whether the array is on a mesh with explicit axes."""
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def _sharding(like: jax.Array) -> Any:
    """An array's sharding on a mesh with explicit axes, where a product over a sharded dimension must be told its own."""
    return jax.typeof(like).sharding if is_explicit(like) else None


def _vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Inside ``shard_map``, casts all to vary over the same mesh axes, so that a replicated kernel's cotangent is summed."""
    axes = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    missing = [tuple(sorted(frozenset().union(*axes) - own)) for own in axes]
    return [lax.pcast(a, names, to="varying") if names else a for a, names in zip(arrays, missing, strict=True)]


def check_grid(shape: tuple[int, ...], spec: LowRankSpec, grid: Grid | None, prefix_tokens: int, name: str) -> Grid:
    """The token grid of an input, checked.

    Args:
      shape: of the input: ``[..., prefix_tokens + tokens, channels]``, or ``[..., *grid, channels]`` if ``grid`` is ``None``.
      spec: the functions kept.
      grid: tokens along each axis, or ``None``.
      prefix_tokens: leading tokens outside the grid.
      name: where the layer is, opening the messages.

    Returns:
      Tokens along each axis.

    Raises:
      TypeError: if ``spec`` is no ``LowRankSpec``, or ``grid`` or ``prefix_tokens`` hold no integers.
      ValueError: if the grid is missing or does not fit the input or the spec.
    """
    if not isinstance(spec, LowRankSpec):
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


def _check(x: jax.Array, kernel: jax.Array, spec: LowRankSpec, grid: Grid | None, prefix_tokens: int, name: str) -> Grid:
    flat = grid is not None
    grid = check_grid(x.shape, spec, grid, prefix_tokens, name)
    for label, array in (("x", x), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
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
    return grid


def low_rank_matmul(
    x: jax.Array,
    kernel: jax.Array,
    spec: LowRankSpec,
    grid: Grid | None = None,
    prefix_tokens: int = 0,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    bias: jax.Array | None = None,
    name: str = "low_rank_matmul",
) -> jax.Array:
    """``x @ kernel``, or ``x @ kernel + bias``, exact, with a low-rank backward pass along the token grid (LBP-WHT, section 3).

    Only the coefficients of ``x`` (and its prefix tokens) and the kernel are kept for the backward pass; with
    ``spec.dw == "exact"``, or ``spec.when == "faster"`` and a shape that makes low rank slower, all of ``x`` is. Nothing of
    ``x`` is kept, and no cotangent computed, for a kernel that is not differentiated, nor the other way round. Reverse-mode
    differentiation only, once.

    Args:
      x: ``[..., prefix_tokens + tokens, in]`` with ``grid``; ``[batch, ..., *grid, in]`` (channels-last maps, at least one
        batch axis) without. Floating point.
      kernel: ``[in, out]``, floating point.
      spec: the functions kept and what is low-rank.
      grid: tokens along each axis, their product being ``tokens``; read off ``x`` if ``None``.
      prefix_tokens: leading tokens outside the grid (class or register tokens), backpropagated exactly.
      precision: of all products, forward and backward, as for ``jax.lax.dot_general``.
      preferred_element_type: dtype of the result, as for ``jax.lax.dot_general``; by default what ``x @ kernel`` has.
      out_sharding: of the result, on a mesh with explicit axes, as for ``jax.lax.dot_general``.
      bias: ``[out]``, of the result's dtype; its cotangent, always exact, is taken from the coefficients where they hold it.
      name: where the operation stands, opening the error messages.

    Returns:
      ``[..., out]``, of the shape of ``x`` but for the channels. Products accumulate in float32 or wider; the cotangents of
      ``x`` and ``kernel`` have their dtypes.

    Raises:
      TypeError: inputs that are not floating point, a spec that is no ``LowRankSpec``, a grid that is no tuple of integers.
      ValueError: a grid that is missing or does not fit ``x`` or the spec, prefix tokens without a grid, channels of ``x`` and
        ``kernel`` that differ, a selection of which nothing exists on the grid. All at trace time.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    flat_grid = _check(x, kernel, spec, grid, prefix_tokens, name)
    output = jnp.result_type(x, kernel) if preferred_element_type is None else jnp.dtype(preferred_element_type)
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(f"{name}: the bias must be [{kernel.shape[1]}], one a channel of the output, got {list(bias.shape)}")
    folded = [] if bias is None or is_explicit(x) or token_sum_weights(spec, flat_grid) is None else [bias]
    x, kernel, *folded = _vary_alike(x, kernel, *folded)
    tokens = x if grid is not None else x.reshape(*x.shape[: -1 - spec.ndim], math.prod(flat_grid), x.shape[-1])
    static = _Static(
        chosen(spec, flat_grid, operator.index(prefix_tokens), *kernel.shape),
        flat_grid,
        operator.index(prefix_tokens),
        precision if isinstance(precision, (str, lax.Precision, type(None))) else tuple(precision),
        accumulation_dtype(x.dtype, kernel.dtype),
        output,
        out_sharding,
        x.dtype,
        kernel.dtype,
        _sharding(tokens),
        _sharding(kernel),
    )
    y: Any = _matmul(tokens, kernel, folded[0] if folded else None, static)
    y = y if grid is not None else y.reshape(*x.shape[:-1], kernel.shape[1])
    return y if folded or bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
