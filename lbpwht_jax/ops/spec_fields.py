"""The fields of ``LowRankSpec`` and their checks, below everything that reads them."""

import collections
import dataclasses
import operator
from typing import Literal

import numpy as np

Basis = tuple[int, ...]
Grid = tuple[int, ...]

_LARGEST_BLOCK = 1024
_MOST_FUNCTIONS = 2**16

_CHOICES = {
    "projection": ("fitted", "official"),
    "dx": ("low_rank", "exact"),
    "dw": ("low_rank", "exact"),
    "when": ("always", "faster"),
}


def check_block(block: int, ndim: int) -> None:
    """Checks a block before its functions are listed.

    Args:
      block: edge of a block in tokens.
      ndim: number of grid axes.

    Raises:
      ValueError: if the block is no power of two, or has more functions than can be worked with: over 1024 along an axis, or
        over 65536 in all.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"LowRankSpec: block must be a power of two (such as 8), got {block}")
    if block > _LARGEST_BLOCK or block**ndim > _MOST_FUNCTIONS:
        raise ValueError(
            f"LowRankSpec: a block of {block} tokens along each of {ndim} axes is too large; it may have {_LARGEST_BLOCK} "
            f"tokens along an axis and {_MOST_FUNCTIONS} in all. Take a smaller one, such as block=8"
        )


@dataclasses.dataclass(frozen=True)
class SpecFields:
    """What ``LowRankSpec`` holds; the modules that compute take this as its type, and ``LowRankSpec`` says what it means."""

    bases: tuple[Basis, ...]
    block: int = 8
    projection: Literal["fitted", "official"] = "fitted"
    dx: Literal["low_rank", "exact"] = "low_rank"
    dw: Literal["low_rank", "exact"] = "low_rank"
    when: Literal["always", "faster"] = "always"

    def __post_init__(self):
        try:
            bases = tuple(tuple(operator.index(i) for i in basis) for basis in self.bases)
            block = operator.index(self.block)
        except TypeError:
            raise TypeError(
                "LowRankSpec: bases must be tuples of integers, one per grid axis, such as [(0, 0), (0, 1)], and block an "
                f"integer; got bases={self.bases!r}, block={self.block!r}"
            ) from None
        object.__setattr__(self, "bases", bases)
        object.__setattr__(self, "block", block)
        if not bases:
            raise ValueError("LowRankSpec: the selection is empty; keep at least one function, such as (0, 0)")
        lengths = {len(basis) for basis in bases}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(
                f"LowRankSpec: every function needs one index for each grid axis, got tuples of lengths {sorted(lengths)}"
            )
        check_block(block, len(bases[0]))
        repeated = sorted(basis for basis, count in collections.Counter(bases).items() if count > 1)
        if repeated:
            raise ValueError(f"LowRankSpec: repeated functions {repeated}; name each function once")
        outside = [basis for basis in bases if not all(0 <= i < block for i in basis)]
        if outside:
            raise ValueError(
                f"LowRankSpec: functions {outside} are outside the block: with block={block} every index is 0 to {block - 1}"
            )
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"LowRankSpec: {field} must be one of {allowed}, got {value!r}")

    @property
    def ndim(self) -> int:
        """Number of grid axes."""
        return len(self.bases[0])

    @property
    def rank(self) -> int:
        """Number of functions kept in a whole block."""
        return len(self.bases)

    @property
    def mask(self) -> np.ndarray:
        """Boolean array of shape ``[block] * ndim``, true at the functions kept."""
        mask = np.zeros((self.block,) * self.ndim, bool)
        mask[tuple(np.transpose(self.bases))] = True
        return mask
