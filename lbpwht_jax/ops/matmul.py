"""``low_rank_matmul``: an exact product whose backward pass runs on a few Walsh coefficients of the token grid.

For ``y = x W`` and a cotangent ``g``, with ``A`` and ``E`` the projection and the expansion along the token axis,

    dW = (A x)^T (A g)        dx = E ((A g) W^T)        (LBP-WHT, section 3 and figure 2)

so that only ``A x`` and ``W`` are kept for the backward pass: ``A x`` where the kernel is differentiated, ``W`` where x is.
"""

import dataclasses
import math
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lbpwht_jax.ops import affine as affines
from lbpwht_jax.ops import norm_forms, normed_product
from lbpwht_jax.ops.affine import Affine
from lbpwht_jax.ops.affine_product import affine_product, takes_factors
from lbpwht_jax.ops.basis import holds_token_sum
from lbpwht_jax.ops.coders import check_row_bits
from lbpwht_jax.ops.dtypes import accumulation_dtype, static_precision
from lbpwht_jax.ops.exact import ExactProduct
from lbpwht_jax.ops.gelu import check_slope_bits, coded_gelu
from lbpwht_jax.ops.gelu_forms import Transforms
from lbpwht_jax.ops.heuristic import chosen
from lbpwht_jax.ops.sharding import is_explicit
from lbpwht_jax.ops.spec_fields import Grid, SpecFields
from lbpwht_jax.ops.validate import check_operands
from lbpwht_jax.ops.vjp import Like, Static, add_bias, matmul


@dataclasses.dataclass
class Link:
    """Joins a layer to the one behind it, so that the cotangent between them is passed on as coefficients and never expanded.

    Make one for each pair, give it to ``low_rank_matmul`` of the first layer, and to that of the second with the first's result
    as x and an activation. It takes effect where both are low-rank in the same functions, and x is that result itself and not
    something made of it; elsewhere nothing changes.

    Attributes:
      defers: whether the first layer may leave what it is given as ``affine`` to the second: between two low-rank layers less
        is kept so. The second must then be given ``deferred`` as ``before``.
      deferred: what the first layer has left to the second; ``None`` where there is no such map, or the first has applied it.
    """

    defers: bool = False
    deferred: Affine | None = None
    _made: tuple[jax.Array, jax.Array, Transforms] | None = None

    def check_given(self, before: Affine | None, name: str) -> None:
        """Raises ``ValueError``, opened by ``name``, if a layer is not given what the one in front has left to it."""
        if self.deferred is not None and before is None:
            raise ValueError(f"{name}: the layer in front has left its affine map to this one; give it before=link.deferred")

    def make(self, result: jax.Array, stand_in: jax.Array, transforms: Transforms) -> None:
        """Keeps the stand-in of the first layer's result."""
        self._made = result, stand_in, transforms

    def take(self, x: jax.Array, transforms: Transforms) -> jax.Array | None:
        """The stand-in of x, if the first layer made one of these coefficients for it."""
        if self._made is None:
            return None
        result, stand_in, made_for = self._made
        return stand_in if x is result and made_for == transforms else None


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
    input_bits: int | None = None,
    link: Link | None = None,
    affine: Affine | None = None,
    before: Affine | None = None,
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
      slope_bits: keeps the activation's slope in 2, 3, 4 or 8 bits; ``None`` keeps it as it is. Behind a ``link``, in float32
        and float64, few bits are those of the slope's means over sub-blocks, which are all that the cotangents take of it.
      input_bits: keeps the coefficients of ``x``, or all of it, in 4 or 8 bits, with a scale for each row of channels; ``None``
        keeps them as they are.
      link: joins this layer to the one behind it or, with an activation or ``before``, to the one before it; nothing else
        changes.
      affine: a normalisation by constant statistics and an activation, ``lbpwht_jax.ops.Affine``, applied to the result as one
        with the product, or left to the layer behind, if ``link.defers``, as ``link.deferred``. Its cotangents are exact, and
        the bias's is part of its mean's.
      before: the same, applied to ``x`` first, in place of an activation. With GELU it is one with a low-rank product, for
        GPUs' kernels with 8 bits or behind a ``link`` with few, and its cotangents are those of the low-rank cotangent of what
        it returns.
      name: where the operation is used; it opens the error messages.

    Returns:
      ``[..., out]``: the shape of ``x`` with the kernel's channels. Products accumulate in float32 or wider; the cotangents of
      ``x`` and ``kernel`` have their dtypes.

    Raises:
      TypeError: when tracing, if ``x``, ``kernel`` or ``bias`` is not floating point, ``spec`` is not a ``LowRankSpec``,
        ``grid`` is not a tuple of integers, ``prefix_tokens`` is not an integer, or ``affine`` or ``before`` is not an
        ``Affine``.
      ValueError: when tracing, if the grid is missing or does not fit ``x`` or the spec, prefix tokens are given without a
        grid, the shapes of ``x``, ``kernel``, ``bias``, ``affine`` and ``before`` do not fit, no function of the selection
        exists on the grid, an activation is unknown or given beside ``before``, there is no such number of bits, or the link's
        other layer has left a map that is not given as ``before``.
    """
    given_x, x = x, jnp.asarray(x)  # which makes a new array where JAX does not compile
    kernel, bias = jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    token_grid = check_operands(x, kernel, bias, spec, grid, prefix_tokens, name)
    if activation not in (None, "gelu"):
        raise ValueError(f"{name}: activation must be 'gelu' or None, got {activation!r}; apply others to x beforehand")
    check_slope_bits(slope_bits, name)
    check_row_bits(input_bits, name)
    affines.check_affine(affine, kernel.shape[1], name)
    affines.check_before(before, activation, kernel.shape[0], name)
    if link is not None:
        link.check_given(before, name)
    prefix_tokens = operator.index(prefix_tokens)
    if affine is not None and is_explicit(x):  # XLA shards what is behind the product
        fields = {"out_sharding": out_sharding, "bias": bias, "activation": activation, "before": before, "name": name}
        how = {"precision": precision, "preferred_element_type": preferred_element_type}
        how |= {"slope_bits": slope_bits, "input_bits": input_bits}
        return affines.apply(low_rank_matmul(x, kernel, spec, grid, prefix_tokens, **how, **fields), affine)
    if affine is not None and bias is not None:
        affine, bias = affine.after(bias), None
    # Elsewhere the coefficients do not hold the bias's cotangent, or XLA shards it: JAX adds the bias, and differentiates it.
    folded = None if is_explicit(x) or not holds_token_sum(spec, token_grid) else bias
    (x, kernel, folded), (affine, before) = affines.vary_with([affine, before], x, kernel, folded)
    in_front = activation is not None or before is not None
    place = None if link is None else "second" if in_front else "first"
    chosen_spec = chosen(spec, token_grid, prefix_tokens, *kernel.shape, place=place)
    exact = (chosen_spec.dx, chosen_spec.dw) == ("exact", "exact")
    low_rank = (chosen_spec.dx, chosen_spec.dw) == ("low_rank", "low_rank")
    precision = static_precision(precision)
    transforms = Transforms(chosen_spec, token_grid, prefix_tokens, precision)
    given = link.take(given_x, transforms) if link is not None and in_front else None
    if before is not None and not (low_rank and norm_forms.takes(x, before, transforms, given is not None)):
        if exact and preferred_element_type is None and normed_product.takes(x, kernel, before, input_bits):
            y = normed_product.normed_product(ExactProduct(precision), x, kernel, before)
            y = y if bias is None else add_bias(y, bias if folded is None else folded)
            return y if affine is None else affines.apply(y, affine)
        x, before = affines.apply(x, before), None
    may_defer = link is not None and link.defers and not in_front and low_rank
    if link is not None and affine is not None and may_defer and norm_forms.defers(x, affine, transforms):
        link.deferred, affine = affine, None
    plain = exact and activation is None and preferred_element_type is None
    if affine is not None and plain and takes_factors(x, kernel):
        return affine_product(ExactProduct(precision), x, kernel, affine, input_bits)
    tokens = x if grid is not None else x.reshape(*x.shape[: -1 - spec.ndim], math.prod(token_grid), x.shape[-1])
    fuses = low_rank and (slope_bits is not None or transforms.kernels("gelu_backward", tokens) != {})
    if activation is not None and not fuses:
        tokens = coded_gelu(tokens, slope_bits)
    given = given if before is not None or (activation is not None and fuses) else None
    links = link is not None and not in_front and affine is None and low_rank
    links = links and not is_explicit(x) and (bias is None or folded is not None)
    dtype = jnp.result_type(x, kernel) if preferred_element_type is None else jnp.dtype(preferred_element_type)
    static = Static(
        transforms=transforms,
        precision=precision,
        accumulate=accumulation_dtype(x.dtype, kernel.dtype),
        y=Like(dtype, out_sharding),
        x=Like.of(tokens),
        kernel=Like.of(kernel),
        bias=Like(dtype if folded is None else folded.dtype),
        gelu=activation is not None and fuses,
        slope_bits=slope_bits,
        input_bits=input_bits,
        stand_in=links,
    )
    results: Any = matmul(tokens, kernel, folded, given, affine, before, static)
    y, stand_in = results
    y = y if grid is not None else y.reshape(*x.shape[:-1], kernel.shape[1])
    if link is not None and links:
        link.make(y, stand_in, transforms)
    return y if bias is None or folded is not None else add_bias(y, bias)
