"""``low_rank_matmul``: an exact product whose backward pass runs on a few Walsh coefficients of the token grid.

For ``y = x W`` and a cotangent ``g``, with ``A`` and ``E`` the projection and the expansion along the token axis,

    dW = (A x)^T (A g)        dx = E ((A g) W^T)        (LBP-WHT, section 3 and figure 2)

so that only ``A x`` and ``W`` are kept for the backward pass: ``A x`` where the kernel is differentiated, ``W`` where x is.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lbpwht_jax.ops.basis import coefficient_count, holds_token_sum, token_sum_weights
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.gelu import check_slope_bits, coded_gelu, decoded_slope, gelu, gelu_and_slope, gelu_slope
from lbpwht_jax.ops.heuristic import chosen
from lbpwht_jax.ops.kernels import kernel_forms
from lbpwht_jax.ops.platforms import apart, by_platform, is_narrow
from lbpwht_jax.ops.projection import expand, project
from lbpwht_jax.ops.sharding import explicit_sharding, is_explicit, vary_alike, with_whole_tokens
from lbpwht_jax.ops.spec_fields import Grid, SpecFields
from lbpwht_jax.ops.validate import check_operands


@dataclasses.dataclass(frozen=True)
class _Like:
    """The dtype of an array, and its sharding where JAX must be told (on a mesh with explicit axes)."""

    dtype: Any
    sharding: Any = None

    @classmethod
    def of(cls, array: jax.Array) -> "_Like":
        return cls(array.dtype, explicit_sharding(array))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    """All that is known when tracing; hashable.

    Attributes:
      spec: the functions kept and what is low-rank, after the automatic choice.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      precision: precision of all products.
      accumulate: dtype in which products accumulate.
      y, x, kernel, bias: what the result and the operands' cotangents must be like.
      gelu: whether x goes through GELU first.
      slope_bits: in how many bits GELU's slope is kept; ``None`` for all of it.
    """

    spec: SpecFields
    grid: Grid
    prefix_tokens: int
    precision: Any
    accumulate: Any
    y: _Like
    x: _Like
    kernel: _Like
    bias: _Like
    gelu: bool
    slope_bits: int | None

    def project(self, x: jax.Array) -> jax.Array:
        return project(x, self.spec, self.grid, self.prefix_tokens, self.precision)

    def expand(self, coefficients: jax.Array) -> jax.Array:
        return expand(coefficients, self.spec, self.grid, self.prefix_tokens, self.precision)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Residuals:
    """What the forward pass keeps for the backward pass.

    Attributes:
      x: the coefficients of x, or all of x where ``dw`` is exact, for the kernel's cotangent; ``None`` if that is not wanted.
      kernel: for the cotangent of x; ``None`` if that is not wanted.
      gelu: for the cotangent of x: GELU's slope at x, or its ``Slopes`` in few bits, or x itself where a kernel computes the
        slope; ``None`` if that is not wanted or there is no GELU.
      wants_dx, wants_dw, wants_db: which operands are differentiated.
    """

    x: Any
    kernel: Any
    gelu: Any
    wants_dx: bool = dataclasses.field(metadata={"static": True})
    wants_dw: bool = dataclasses.field(metadata={"static": True})
    wants_db: bool = dataclasses.field(metadata={"static": True})


def _product(a: jax.Array, b: jax.Array, contract: tuple, static: _Static, like: _Like) -> jax.Array:
    dtype = a.dtype if a.dtype == b.dtype else static.accumulate

    def product(result: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(
            a,
            b,
            (contract, ((), ())),
            precision=static.precision,
            preferred_element_type=result,
            out_sharding=like.sharding,
        ).astype(like.dtype)

    wide, narrow = functools.partial(product, static.accumulate), functools.partial(product, like.dtype)
    if is_narrow(a.dtype, b.dtype, like.dtype) and like.sharding is None:
        # GPUs and TPUs accumulate in float32 inside; a float32 result, rounded afterwards, would cost twice the bytes
        return by_platform(wide, a, b, cuda=narrow, tpu=narrow)
    return wide(a.astype(dtype), b.astype(dtype))


def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, static: _Static) -> jax.Array:
    x = gelu(x) if static.gelu else x
    y = _product(x, kernel, ((x.ndim - 1,), (0,)), static, static.y)
    return y if bias is None else _add_bias(y, bias)


def _forward(x: Any, kernel: Any, bias: Any, static: _Static) -> tuple[jax.Array, _Residuals]:
    wants_dx, wants_dw = x.perturbed, kernel.perturbed
    x, kept_x, kept_gelu = x.value, None, None
    if static.gelu and wants_dx and wants_dw and static.slope_bits is None:
        x, kept_x, kept_gelu = _gelu_forward(x, static)
    else:
        if static.gelu:
            x, kept_gelu = gelu_and_slope(x, static.slope_bits) if wants_dx else (gelu(x), None)
        if wants_dw:
            kept_x, x = apart((static.project(x), x)) if static.spec.dw == "low_rank" else (x, x)
    y: Any = _matmul(x, kernel.value, None if bias is None else bias.value, dataclasses.replace(static, gelu=False))
    wants_db = bias is not None and bias.perturbed
    return y, _Residuals(kept_x, kernel.value if wants_dx else None, kept_gelu, wants_dx, wants_dw, wants_db)


def _backward(static: _Static, kept: _Residuals, g: jax.Array | SymbolicZero) -> tuple:
    if isinstance(g, SymbolicZero):
        return None, None, None
    low_dx = kept.wants_dx and static.spec.dx == "low_rank"
    low_dw = kept.wants_dw and static.spec.dw == "low_rank"
    coefficients: Any = static.project(g) if low_dx or low_dw else None
    dx = dw = db = None
    kept_x = kept.x
    if kept.wants_dx:
        dx = _dx(coefficients if low_dx else g, kept.kernel, static)
        if static.gelu and kept.wants_dw and static.slope_bits is None:
            dx, kept_x = _gelu_backward(dx, kept.gelu, kept_x, static)
        elif low_dx:
            dx = static.expand(dx)
            dx = dx if kept.gelu is None else dx * decoded_slope(kept.gelu)
    if kept.wants_dw:
        dw = _dw(kept_x, coefficients if low_dw else g, static)
    if kept.wants_db:
        db = _db(g, coefficients, static)
    return dx, dw, db


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _dx(g: jax.Array, kernel: jax.Array, static: _Static) -> jax.Array:
    """The cotangent of x from the result's, ``g``; where ``dx`` is low-rank, the coefficients of both."""
    like = static.x
    if static.spec.dx == "low_rank" and like.sharding is not None:
        like = dataclasses.replace(like, sharding=with_whole_tokens(like.sharding))
    return _product(g, kernel, ((g.ndim - 1,), (1,)), static, like)


def _gelu_forward(x: jax.Array, static: _Static) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``gelu(x)``, its coefficients and GELU's slope.

    Where ``_gelu_backward`` is a kernel, it computes these two from x: the slope's place takes x, the coefficients' zeros.
    """

    def plain(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        activated = gelu(x)
        return activated, static.project(activated), gelu_slope(x)

    def with_kernel(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = static.prefix_tokens + coefficient_count(static.spec, static.grid)
        return gelu(x), jnp.zeros_like(x, shape=(*x.shape[:-2], rows, x.shape[-1])), x

    kernels = kernel_forms("gelu_backward", x, static.spec, static.grid, static.prefix_tokens)
    return by_platform(plain, x, **dict.fromkeys(kernels, with_kernel))


def _gelu_backward(
    coefficients: jax.Array, kept_gelu: jax.Array, kept_x: jax.Array, static: _Static
) -> tuple[jax.Array, jax.Array]:
    """The cotangent of x and the coefficients of ``gelu(x)``, from what ``_gelu_forward`` kept."""
    kernels = kernel_forms("gelu_backward", coefficients, static.spec, static.grid, static.prefix_tokens)

    def plain(coefficients: jax.Array, slope: jax.Array, kept_x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return static.expand(coefficients) * slope, kept_x

    forms = {platform: functools.partial(_without_last, form) for platform, form in kernels.items()}
    return by_platform(plain, coefficients, kept_gelu, kept_x, **forms)


def _without_last(form: Callable[..., Any], *operands: jax.Array) -> Any:
    return form(*operands[:-1])


def _dw(x: jax.Array, g: jax.Array, static: _Static) -> jax.Array:
    """The kernel's cotangent; ``x`` and ``g`` are both whole, or both coefficients."""
    if static.x.sharding is None:  # on CPU XLA takes a quarter longer to contract several axes than one
        x, g = (a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in (x, g))
    rows = tuple(range(x.ndim - 1))
    return _product(x, g, (rows, rows), static, static.kernel)


def _db(g: jax.Array, coefficients: jax.Array | None, static: _Static) -> jax.Array:
    """The bias's cotangent, the sum of ``g`` over batch and tokens: from the coefficients where there are any."""
    if coefficients is not None:
        weights = token_sum_weights(static.spec, static.grid, static.prefix_tokens)
        rows = np.flatnonzero(weights)
        dtype = accumulation_dtype(coefficients.dtype)
        g = _flat_batch(coefficients)[:, rows].astype(dtype) * jnp.asarray(weights[rows], dtype).reshape(1, -1, 1)
    return jnp.sum(_flat_batch(g), (0, 1), dtype=accumulation_dtype(g.dtype)).astype(static.bias.dtype)


def _flat_batch(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def low_rank_matmul(
    x: jax.Array,
    kernel: jax.Array,
    spec: SpecFields,
    grid: Grid | None = None,
    prefix_tokens: int = 0,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    bias: jax.Array | None = None,
    activation: Literal["gelu"] | None = None,
    slope_bits: int | None = None,
    name: str = "low_rank_matmul",
) -> jax.Array:
    """``x @ kernel``, or ``x @ kernel + bias``, exact, with a low-rank backward pass along the token grid (LBP-WHT, section 3).

    Only the kernel and the coefficients of ``x`` (with its prefix tokens) are kept for the backward pass. All of ``x`` is kept
    with ``spec.dw == "exact"``, or with ``spec.when == "faster"`` and a shape that makes low rank slower. If the kernel is not
    differentiated, nothing of ``x`` is kept; if ``x`` is not, the kernel is not. Reverse-mode differentiation only, once.

    Args:
      x: ``[..., prefix_tokens + tokens, in]`` with ``grid``; ``[batch, ..., *grid, in]`` (channels-last maps, at least one
        batch axis) without. Floating point.
      kernel: ``[in, out]``, floating point.
      spec: the functions kept and what is low-rank, a ``LowRankSpec``.
      grid: tokens along each axis, their product being ``tokens``; read off ``x`` if ``None``.
      prefix_tokens: leading tokens outside the grid (class or register tokens), backpropagated exactly.
      precision: precision of all products, forward and backward, as for ``jax.lax.dot_general``.
      preferred_element_type: dtype of the result, as for ``jax.lax.dot_general``; by default that of ``x @ kernel``.
      out_sharding: sharding of the result on a mesh with explicit axes, as for ``jax.lax.dot_general``.
      bias: ``[out]``, of the result's dtype. Its cotangent is exact, and taken from the coefficients where they hold it.
      activation: ``"gelu"`` applies the exact GELU to ``x`` first, which kernels for GPUs do in passing.
      slope_bits: keeps the activation's slope in 2, 3, 4 or 8 bits; ``None`` keeps it as it is.
      name: where the operation is used; it opens the error messages.

    Returns:
      ``[..., out]``: the shape of ``x`` with the kernel's channels. Products accumulate in float32 or wider; the cotangents of
      ``x`` and ``kernel`` have their dtypes.

    Raises:
      TypeError: when tracing, if ``x``, ``kernel`` or ``bias`` is not floating point, ``spec`` is not a ``LowRankSpec``,
        ``grid`` is not a tuple of integers or ``prefix_tokens`` is not an integer.
      ValueError: when tracing, if the grid is missing or does not fit ``x`` or the spec, prefix tokens are given without a
        grid, the shapes of ``x``, ``kernel`` and ``bias`` do not fit, no function of the selection exists on the grid, the
        activation is unknown, or there is no such number of bits.
    """
    x, kernel, bias = jnp.asarray(x), jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    token_grid = check_operands(x, kernel, bias, spec, grid, prefix_tokens, name)
    if activation not in (None, "gelu"):
        raise ValueError(f"{name}: activation must be 'gelu' or None, got {activation!r}; apply others to x beforehand")
    check_slope_bits(slope_bits, name)
    prefix_tokens = operator.index(prefix_tokens)
    # Elsewhere the coefficients do not hold the bias's cotangent, or XLA shards it: JAX adds the bias, and differentiates it.
    folded = None if is_explicit(x) or not holds_token_sum(spec, token_grid) else bias
    if folded is None:
        x, kernel = vary_alike(x, kernel)
    else:
        x, kernel, folded = vary_alike(x, kernel, folded)
    tokens = x if grid is not None else x.reshape(*x.shape[: -1 - spec.ndim], math.prod(token_grid), x.shape[-1])
    chosen_spec = chosen(spec, token_grid, prefix_tokens, *kernel.shape)
    low_rank = (chosen_spec.dx, chosen_spec.dw) == ("low_rank", "low_rank")
    has_kernels = kernel_forms("gelu_backward", tokens, chosen_spec, token_grid, prefix_tokens) != {}
    fuses = low_rank and (has_kernels or slope_bits is not None)
    if activation is not None and not fuses:
        tokens = coded_gelu(tokens, slope_bits)
    dtype = jnp.result_type(x, kernel) if preferred_element_type is None else jnp.dtype(preferred_element_type)
    static = _Static(
        spec=chosen_spec,
        grid=token_grid,
        prefix_tokens=prefix_tokens,
        precision=precision if isinstance(precision, (str, lax.Precision, type(None))) else tuple(precision),
        accumulate=accumulation_dtype(x.dtype, kernel.dtype),
        y=_Like(dtype, out_sharding),
        x=_Like.of(tokens),
        kernel=_Like.of(kernel),
        bias=_Like(dtype if folded is None else folded.dtype),
        gelu=activation is not None and fuses,
        slope_bits=slope_bits,
    )
    y: Any = _matmul(tokens, kernel, folded, static)
    y = y if grid is not None else y.reshape(*x.shape[:-1], kernel.shape[1])
    return y if bias is None or folded is not None else _add_bias(y, bias)
