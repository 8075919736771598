"""What the backward pass keeps of a model, and in how many bits: a setting beside ``LowRankSpec``."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from lbpwht_jax.ops.coders import ROW_BITS, SLOPE_BITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residuals:
    """What norms, activations, attention, convolutions and dense layers keep for the backward pass, and in how many bits.

    Without bits nothing is rounded: gradients are those of plain JAX, to rounding, but arrays are kept once, are derived from
    others, or are computed again.

    Attributes:
      slope_bits: bits of an activation's slope: 2, 3 or 4 (the levels of least squared error where the activation's input is
        normal, as in few-bit backward, Novikov et al., 2022), 8 (equal steps), or ``None`` for the slope as it is. Where its
        means over sub-blocks are kept (``lbpwht_jax.ops.subblock_means``) they have 8, or 4 in place of 2.
      norm_bits: bits of what a norm, a layer scale or a convolution keeps of its input, 4 or 8, with one scale per token;
        ``None`` for all of it.
      attention_bits: bits of attention's queries, keys and values, 4 or 8, with one scale per token and head; ``None`` for
        all of them.
      dense_bits: bits of what a dense layer keeps of its input, 4 or 8: its coefficients, with one scale for each, or all of it
        where the layer is backpropagated exactly, with one scale per token; ``None`` for numbers as they are. The embedding of
        ViT's and SwinV2's patches is one too. A layer that ``LoRA`` adapts keeps its input as it is.
      recompute_scores: computes attention's scores again from queries, keys and values, instead of keeping scores.

    Raises:
      ValueError: at construction, if bits are none of these.
      TypeError: at construction, if ``recompute_scores`` is no truth value.
    """

    slope_bits: int | None = None
    norm_bits: int | None = None
    attention_bits: int | None = None
    dense_bits: int | None = None
    recompute_scores: bool = True

    def __post_init__(self):
        rows = ("norm_bits", "attention_bits", "dense_bits")
        for field, allowed in (("slope_bits", SLOPE_BITS), *((field, ROW_BITS) for field in rows)):
            bits = getattr(self, field)
            if bits is not None and (isinstance(bits, bool) or bits not in allowed):
                raise ValueError(f"Residuals: {field} must be one of {', '.join(map(str, allowed))} or None, got {bits!r}")
        if not isinstance(self.recompute_scores, bool):
            raise TypeError(f"Residuals: recompute_scores must be True or False, got {self.recompute_scores!r}")
        if self.attention_bits is not None and not self.recompute_scores:
            raise ValueError(
                f"Residuals: attention_bits={self.attention_bits} needs recompute_scores=True; "
                "kept scores leave no use for rounded queries and keys"
            )


ResidualsName = Literal["plain", "exact", "lean", "tiny"]
RESIDUALS: Mapping[str, Residuals | None] = {
    "plain": None,
    "exact": Residuals(),
    "lean": Residuals(slope_bits=8, norm_bits=8, attention_bits=8, dense_bits=8),
    "tiny": Residuals(slope_bits=2, norm_bits=4, attention_bits=8, dense_bits=8),
}


def named_residuals(value: Any, where: str) -> Residuals | None:
    """The setting that a name stands for; ``None`` is ``"plain"``, what JAX keeps of itself.

    Args:
      value: ``"plain"``, ``"exact"``, ``"lean"``, ``"tiny"`` or a ``Residuals``.
      where: what the error message opens with.

    Raises:
      ValueError: if the name is unknown.
      TypeError: if it is neither a name nor a ``Residuals``.
    """
    if isinstance(value, Residuals):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{where}: residuals must be a name or a Residuals, got {type(value).__name__}")
    if value not in RESIDUALS:
        raise ValueError(f"{where}: residuals must be one of {', '.join(RESIDUALS)} or a Residuals, got {value!r}")
    return RESIDUALS[value]
