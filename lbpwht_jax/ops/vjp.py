"""The exact product with a low-rank backward pass as JAX differentiates it: what is kept, and the cotangents.

``lbpwht_jax.ops.matmul`` has the formulas. A layer can hand the cotangent of its input to the layer before it as coefficients
alone, all that that one needs, by way of a *stand-in*: a second result of the layer before and a last operand of this one, in
the shape of the coefficients of the array between the two, which nobody reads. The stand-in's cotangent holds the coefficients
of the array's, which itself is zero then and takes neither time nor memory.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lbpwht_jax.ops import affine as affines
from lbpwht_jax.ops import gelu_forms, norm_forms
from lbpwht_jax.ops.affine import Affine
from lbpwht_jax.ops.basis import coefficient_count, holds_token_sum, token_sum_weights
from lbpwht_jax.ops.coders import Companded, Rows
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.gelu import gelu
from lbpwht_jax.ops.gelu_forms import Transforms
from lbpwht_jax.ops.platforms import apart, by_platform, is_narrow
from lbpwht_jax.ops.sharding import explicit_sharding, with_whole_tokens


@dataclasses.dataclass(frozen=True)
class Like:
    """The dtype of an array, and its sharding where JAX must be told (on a mesh with explicit axes)."""

    dtype: Any
    sharding: Any = None

    @classmethod
    def of(cls, array: jax.Array) -> "Like":
        return cls(array.dtype, explicit_sharding(array))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """All that is known when tracing; hashable.

    Attributes:
      transforms: between tokens and coefficients, with the functions kept and what is low-rank, after the automatic choice.
      precision: precision of all products.
      accumulate: dtype in which products accumulate.
      y, x, kernel, bias: what the result and the operands' cotangents must be like.
      gelu: whether x goes through GELU first.
      slope_bits: in how many bits GELU's slope is kept; ``None`` for all of it.
      input_bits: in how many bits what is kept of x is kept; ``None`` for numbers as they are.
      stand_in: whether the result has a stand-in, for the layer behind.
    """

    transforms: Transforms
    precision: Any
    accumulate: Any
    y: Like
    x: Like
    kernel: Like
    bias: Like
    gelu: bool
    slope_bits: int | None
    input_bits: int | None
    stand_in: bool

    @property
    def spec(self) -> Any:
        return self.transforms.spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Residuals:
    """What the forward pass keeps for the backward pass.

    Attributes:
      x: the coefficients of x, or all of x where ``dw`` is exact, for the kernel's cotangent, as they are or in few bits;
        ``None`` if that is not wanted.
      kernel: for the cotangent of x; ``None`` if that is not wanted.
      gelu: for the cotangent of x: what ``gelu_forms`` keeps; ``None`` if that is not wanted or there is no GELU.
      before: what ``norm_forms`` keeps for the cotangents of x and of the norm in front, and that norm; ``None`` without one.
      affine: what is kept of the product for the cotangents in front of its affine map, and the map; ``None`` without one.
      wants_dx, wants_dw, wants_db: which operands are differentiated.
      projects_dx: whether the coefficients of x's cotangent are wanted, for the stand-in of x, and not all of it.
    """

    x: Any
    kernel: Any
    gelu: Any
    before: tuple[Companded | norm_forms.Means, Affine] | None
    affine: tuple[affines.Kept, Affine] | None
    wants_dx: bool = dataclasses.field(metadata={"static": True})
    wants_dw: bool = dataclasses.field(metadata={"static": True})
    wants_db: bool = dataclasses.field(metadata={"static": True})
    projects_dx: bool = dataclasses.field(metadata={"static": True})


def _product(a: jax.Array, b: jax.Array, contract: tuple, static: Static, like: Like) -> jax.Array:
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


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """``y + bias`` along the last axis."""
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def matmul(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    stand_in: jax.Array | None,
    affine: Affine | None,
    before: Affine | None,
    static: Static,
) -> tuple:
    """``affine`` of ``before(x) @ kernel + bias``, of tokens; and its stand-in, or ``None``.

    Args:
      x: ``[..., prefix_tokens + tokens, in]``.
      kernel: ``[in, out]``.
      bias: ``[out]`` or ``None``.
      stand_in: that of x, ``[..., prefix_tokens + coefficients, in]``; or ``None``.
      affine: of ``[..., out]``; ``None`` where there is a bias, or the result has a stand-in.
      before: of x, such as ``norm_forms`` takes; ``None`` with ``static.gelu``.
      static: what is known when tracing.
    """
    del stand_in
    if before is not None:
        x = before.activated(before.before_activation(x))
    y, made = _result(gelu(x) if static.gelu else x, kernel, bias, static)
    return y if affine is None else affine.activated(affine.before_activation(y)), made


def _result(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, static: Static) -> tuple:
    y = _product(x, kernel, ((x.ndim - 1,), (0,)), static, static.y)
    y = y if bias is None else add_bias(y, bias)
    if not static.stand_in:
        return y, None
    transforms = static.transforms
    rows = transforms.prefix_tokens + coefficient_count(transforms.spec, transforms.grid)
    # Nobody reads it. It is made of y so that vmap maps it too: it would sum the cotangents of a constant
    return y, jnp.broadcast_to(y[..., :1, :], (*y.shape[:-2], rows, y.shape[-1]))


def _forward(
    x: Any, kernel: Any, bias: Any, stand_in: Any, affine: Affine | None, before: Affine | None, static: Static
) -> tuple[tuple, _Residuals]:
    wants_dx, wants_dw = x.perturbed, kernel.perturbed
    wants_db = bias is not None and bias.perturbed
    x, kept_x, kept_gelu, kept_before, projected = x.value, None, None, None, stand_in is not None
    if before is not None:
        perturbed, before = affines.split(before)
        wants_dx = wants_dx or perturbed
        x, coefficients, kept_norm = norm_forms.forward(x, before, static.transforms, projected)
        kept_x, kept_before = coefficients if wants_dw else None, (kept_norm, before) if wants_dx else None
    elif static.gelu:
        x, kept_x, kept_gelu = gelu_forms.forward(x, static.transforms, static.slope_bits, wants_dx, wants_dw, projected)
    elif wants_dw:
        kept_x, x = apart((static.transforms.project(x, stored=True), x)) if static.spec.dw == "low_rank" else (x, x)
    if static.input_bits is not None and kept_x is not None:
        kept_x, x = apart((Rows.of(kept_x, static.input_bits), x))
    y, made = _result(x, kernel.value, None if bias is None else bias.value, static)
    kept_affine = None
    if affine is not None:
        perturbed, affine = affines.split(affine)
        y, kept_y = affines.forward(y, affine, perturbed)
        kept_affine = kept_y, affine
    kept_kernel, wanted = kernel.value if wants_dx else None, (wants_dx, wants_dw, wants_db)
    return (y, made), _Residuals(kept_x, kept_kernel, kept_gelu, kept_before, kept_affine, *wanted, projected)


def _backward(static: Static, kept: _Residuals, cotangents: tuple) -> tuple:
    if all(cotangent is None or isinstance(cotangent, SymbolicZero) for cotangent in cotangents):
        return (None,) * 6
    g, of_stand_in = cotangents
    wide: Any = None
    if kept.affine is not None:
        wide = affines.through_activation(g, *kept.affine)
        g = wide.astype(g.dtype)
    low_dx = kept.wants_dx and static.spec.dx == "low_rank"
    low_dw = kept.wants_dw and static.spec.dw == "low_rank"
    coefficients: Any = None
    if low_dx or low_dw or static.stand_in:
        coefficients = _coefficients(g, of_stand_in, kept.affine is not None, static)
    dx = dw = db = of_given = of_affine = of_before = None
    kept_x = kept.x
    if isinstance(kept_x, Rows):
        kept_x, g, coefficients = _decoded(kept_x, g, coefficients)
    if kept.affine is not None:
        of_affine = affines.parameter_cotangents(wide, _token_sums(g, coefficients, static), *kept.affine)
        g = affines.along_channels(g, kept.affine[1])
        coefficients = None if coefficients is None else affines.along_channels(coefficients, kept.affine[1])
    if kept.wants_dx:
        dx = _dx(coefficients if low_dx else g, kept.kernel, static)
        if kept.before is not None:
            dx, of_before = norm_forms.backward(dx, *kept.before, static.transforms, kept.projects_dx)
        elif static.gelu:
            dx, kept_x = gelu_forms.backward(dx, kept.gelu, kept_x, static.transforms, static.slope_bits, kept.projects_dx)
        elif low_dx:
            dx = static.transforms.expand(dx)
        if kept.projects_dx:
            dx, of_given = None, dx
    if kept.wants_dw:
        dw = _dw(kept_x, coefficients if low_dw else g, static)
    if kept.wants_db:
        db = _token_sums(g, coefficients, static).astype(static.bias.dtype)
    return dx, dw, db, of_given, of_affine, of_before


matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _decoded(rows: Rows, g: Any, coefficients: Any) -> tuple[Any, Any, Any]:
    """What was kept of x, decoded once the result's cotangent or its coefficients are there; and these two."""
    if coefficients is None:
        rows, g = apart((rows, g))
    else:
        rows, coefficients = apart((rows, coefficients))
    return rows.decoded(), g, coefficients


def _coefficients(g: Any, of_stand_in: Any, stored: bool, static: Static) -> jax.Array:
    """Those of the result's cotangent: of what comes whole, ``stored`` or not, and what comes as coefficients."""
    parts = [] if isinstance(g, SymbolicZero) else [static.transforms.project(g, stored)]
    parts += [] if of_stand_in is None or isinstance(of_stand_in, SymbolicZero) else [of_stand_in]
    return functools.reduce(jnp.add, parts)


def _dx(g: jax.Array, kernel: jax.Array, static: Static) -> jax.Array:
    """The cotangent of x from the result's, ``g``; where ``dx`` is low-rank, the coefficients of both."""
    like = static.x
    if static.spec.dx == "low_rank" and like.sharding is not None:
        like = dataclasses.replace(like, sharding=with_whole_tokens(like.sharding))
    return _product(g, kernel, ((g.ndim - 1,), (1,)), static, like)


def _dw(x: jax.Array, g: jax.Array, static: Static) -> jax.Array:
    """The kernel's cotangent; ``x`` and ``g`` are both whole, or both coefficients."""
    if static.x.sharding is None:  # on CPU XLA takes a quarter longer to contract several axes than one
        x, g = (a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in (x, g))
    rows = tuple(range(x.ndim - 1))
    return _product(x, g, (rows, rows), static, static.kernel)


def _token_sums(g: jax.Array, coefficients: jax.Array | None, static: Static) -> jax.Array:
    """The sums of ``g`` over batch and tokens, ``[channels]``: from the coefficients where they hold them."""
    transforms = static.transforms
    if coefficients is not None and holds_token_sum(transforms.spec, transforms.grid):
        weights = token_sum_weights(transforms.spec, transforms.grid, transforms.prefix_tokens)
        rows = np.flatnonzero(weights)
        dtype = accumulation_dtype(coefficients.dtype)
        g = _flat_batch(coefficients)[:, rows].astype(dtype) * jnp.asarray(weights[rows], dtype).reshape(1, -1, 1)
    return jnp.sum(_flat_batch(g), (0, 1), dtype=accumulation_dtype(g.dtype))


def _flat_batch(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
