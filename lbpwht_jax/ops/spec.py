"""Which Walsh functions low-rank backprop keeps, and what it does with them."""

import dataclasses
import itertools
import operator
from collections.abc import Callable
from typing import Any

from lbpwht_jax.ops.dot_general import LowRankConv, LowRankDotGeneral
from lbpwht_jax.ops.spec_fields import Basis, Grid, SpecFields, check_block

__all__ = ["Basis", "Grid", "LowRankSpec", "lp_l1", "lp_linf"]


@dataclasses.dataclass(frozen=True)
class LowRankSpec(SpecFields):
    """A static, hashable description of low-rank backprop for one layer.

    Attributes:
      bases: the Walsh functions kept in each block: for each function a tuple ``(i, j, ...)`` with its sequency index
        along each grid axis. Order does not matter to the gradients. Any iterable of such tuples is accepted.
      block: edge of a block in tokens, a power of two.
      projection: what happens to blocks that the grid does not fill. ``"fitted"`` orthonormalises the functions on the
        tokens that exist, so the projection is orthogonal, and exact when every function is kept; ``"official"`` reflects
        the grid out to whole blocks, as the authors' code does.
      dx: ``"low_rank"`` or ``"exact"``: how the input's cotangent is computed.
      dw: ``"low_rank"`` or ``"exact"``: how the kernel's cotangent is computed. Only ``"low_rank"`` saves activations.
      when: ``"always"``, or ``"faster"``: layers whose shape makes low rank slower (``lbpwht_jax.ops.heuristic``) stay
        exact, and keep their whole activations.
      ndim: number of grid axes; read-only.
      rank: number of functions kept in a whole block; read-only.
      mask: boolean array ``[block] * ndim``, true at the functions kept; read-only.

    Raises:
      ValueError: if the block is not a power of two or is too large (over 1024 tokens along an axis, or 65536 in all), the
        selection is empty, repeats a function or holds one outside the block, functions differ in their number of axes, or
        ``projection``, ``dx``, ``dw`` or ``when`` is unknown.
      TypeError: if the selection is not made of tuples of integers, or ``block`` is not an integer.
    """

    def dot_general(self, *, grid: Grid | None = None, prefix_tokens: int = 0, name: str = "") -> Callable[..., Any]:
        """A stand-in for ``jax.lax.dot_general`` with this backward pass, for Flax's ``dot_general=`` arguments.

        It fits ``nn.Dense``, ``nn.DenseGeneral``, the projections of Flax's attention layers and ``nnx.Linear``: the
        contracted dimensions must be the last of the left operand and the first of the right one.

        Args:
          grid: tokens along each axis, as for ``low_rank_matmul``; ``None`` for channels-last maps.
          prefix_tokens: leading tokens outside the grid.
          name: where the layer is, for error messages.

        Returns:
          ``f(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None)``.
        """
        return LowRankDotGeneral(self, grid if grid is None else tuple(grid), prefix_tokens, name)

    def conv_general_dilated(self, *, name: str = "") -> Callable[..., Any]:
        """A stand-in for ``jax.lax.conv_general_dilated`` with this backward pass, for 1x1 ``nn.Conv`` and ``nnx.Conv``.

        Args:
          name: where the layer is, for error messages.

        Returns:
          A callable with ``jax.lax.conv_general_dilated``'s signature, for kernels whose window is 1 along every axis.
        """
        return LowRankConv(self, name)


def _check_rank(function: str, r: int, ndim: int, largest: int, block: int) -> int:
    if ndim < 1:
        raise ValueError(f"{function}: ndim, the number of grid axes, must be at least 1, got {ndim}")
    check_block(block, ndim)
    try:
        r = operator.index(r)
    except TypeError:
        raise TypeError(f"{function}: r must be an integer, got {r!r}") from None
    if not 1 <= r <= largest:
        raise ValueError(
            f"{function}: r must be from 1 to {largest}, which keeps every function of a block of {block}; got {r}"
        )
    return r


def lp_l1(r: int, ndim: int = 2, *, block: int = 8, **fields) -> LowRankSpec:
    """LP_{L1-r}, which keeps the functions whose sequency indices sum to less than ``r`` (LBP-WHT, section 3).

    In two dimensions that is r(r+1)/2 functions for r up to ``block``.

    Args:
      r: 1 (the mean alone) to ``ndim * (block - 1) + 1`` (every function).
      ndim: number of grid axes.
      block: edge of a block in tokens.
      **fields: the other fields of ``LowRankSpec``.

    Raises:
      ValueError: if ``r`` is out of range or ``ndim`` below 1; and whatever ``LowRankSpec`` raises.
      TypeError: if ``r`` is not an integer.
    """
    r = _check_rank("lp_l1", r, ndim, ndim * (block - 1) + 1, block)
    return LowRankSpec(
        tuple(basis for basis in itertools.product(range(block), repeat=ndim) if sum(basis) < r), block=block, **fields
    )


def lp_linf(r: int, ndim: int = 2, *, block: int = 8, **fields) -> LowRankSpec:
    """LP_{Linf-r}, which keeps the functions whose sequency indices are all less than ``r`` (LBP-WHT, section 3).

    Args:
      r: 1 (the mean alone) to ``block`` (every function).
      ndim: number of grid axes.
      block: edge of a block in tokens.
      **fields: the other fields of ``LowRankSpec``.

    Raises:
      ValueError: if ``r`` is out of range or ``ndim`` below 1; and whatever ``LowRankSpec`` raises.
      TypeError: if ``r`` is not an integer.
    """
    r = _check_rank("lp_linf", r, ndim, block, block)
    return LowRankSpec(
        tuple(basis for basis in itertools.product(range(block), repeat=ndim) if max(basis) < r), block=block, **fields
    )
