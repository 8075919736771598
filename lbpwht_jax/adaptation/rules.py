"""The rules that say how the layers of a model are adapted."""

import dataclasses
import operator
import re
from typing import Any

from lbpwht_jax.ops.residuals import Residuals, named_residuals
from lbpwht_jax.ops.spec import Grid, LowRankSpec

NOTHING = "(?!)"
ALL_LINEAR = "all-linear"
_SHOWN = 200


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Backpropagates dense layers at low rank, as ``low_rank_matmul`` does; forward pass and parameters are unchanged.

    Calls of such a layer on vectors, ``[batch, channels]``, which have no tokens, are backpropagated exactly.

    Attributes:
      pattern: regular expression searched in the layers' paths, such as ``"blocks_0/mlp/fc1"``; or ``"all-linear"``: all
        dense layers and 1x1 convolutions but the head (the last layer, and all others after the last one on tokens or maps).
      spec: the Walsh functions kept.
      grid: tokens along each axis of inputs ``[..., prefix_tokens + tokens, channels]``. ``None`` for layers that know
        their own (this library's) and for channels-last maps, ``[batch, height, width, channels]``.
      prefix_tokens: leading tokens outside the grid (class or register tokens).

    Raises:
      ValueError: if the pattern is not a regular expression.
      TypeError: if ``spec`` is not a ``LowRankSpec``.
    """

    pattern: str
    spec: LowRankSpec
    grid: Grid | None = None
    prefix_tokens: int = 0

    def __post_init__(self):
        _check_pattern(self, self.pattern)
        if not isinstance(self.spec, LowRankSpec):
            raise TypeError(f"LowRank({self.pattern!r}): spec must be a LowRankSpec, such as lp_l1(4), got {self.spec!r}")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Freezes dense layers and trains a low-rank branch beside each: ``y = x W + (alpha / rank) (x A) B`` (Hu et al., 2021).

    ``A`` starts random and ``B`` at zero, so that the output is unchanged at first. Kernel and bias are frozen. Without a
    ``spec``, convolutions without groups take branches too: one of the same window and stride to ``rank`` channels, then ``B``.

    Attributes:
      pattern: see ``LowRank``.
      rank: columns of ``A`` and rows of ``B``.
      alpha: the branch is multiplied by ``alpha / rank``.
      spec: the Walsh functions kept in the backward pass of the layer and its branch; ``None`` backpropagates exactly.
      grid: see ``LowRank``; needed only with ``spec``.
      prefix_tokens: see ``LowRank``.
      fused: regular expression, searched in the paths, for layers that compute query, key and value together; they get three
        times the rank and alpha.
      dropout: in training, each element of the branch's input, not of the layer's, is zero with this probability, and the
        others are divided by what is left of 1, as in PEFT. For Linen, training is a call of ``AdaptedModule.apply`` that is
        given the rng ``dropout``; for NNX it is what ``model.train()`` and ``model.eval()`` say.
      rslora: multiplies the branch by ``alpha / rank ** 0.5`` instead (Kalajdzievski, 2023), so that a higher rank learns no
        slower.

    Raises:
      ValueError: if a pattern is not a regular expression, rank or alpha is not positive, or dropout is not in [0, 1).
      TypeError: if ``spec`` is neither a ``LowRankSpec`` nor ``None``, or rank is not an integer.
    """

    pattern: str
    rank: int = 8
    alpha: float = 8
    spec: LowRankSpec | None = None
    grid: Grid | None = None
    prefix_tokens: int = 0
    fused: str = NOTHING
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self):
        _check_pattern(self, self.pattern)
        _check_pattern(self, self.fused)
        where = f"LoRA({self.pattern!r})"
        if not (self.spec is None or isinstance(self.spec, LowRankSpec)):
            raise TypeError(f"{where}: spec must be a LowRankSpec, such as lp_l1(4), or None, got {self.spec!r}")
        try:
            operator.index(self.rank)
        except TypeError:
            raise TypeError(f"{where}: rank must be an integer, got {self.rank!r}") from None
        if not (self.rank > 0 and self.alpha > 0):
            raise ValueError(f"{where}: rank and alpha must be positive, got rank={self.rank} and alpha={self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{where}: dropout must be from 0 to less than 1, got {self.dropout}")


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Freezes the parameters of modules.

    Attributes:
      pattern: regular expression searched in the paths of modules that have parameters of their own, such as
        ``"blocks_0/norm1"``; the path of the whole model is ``""``.

    Raises:
      ValueError: if the pattern is not a regular expression.
    """

    pattern: str

    def __post_init__(self):
        _check_pattern(self, self.pattern)


@dataclasses.dataclass(frozen=True)
class Lean:
    """Lets Linen's norms, convolutions and attention keep few bits; the forward pass and parameters are unchanged.

    It goes beside the other rules: a norm can be frozen and lean, and the layers within an attention adapted; but a convolution
    that ``LowRank`` or ``LoRA`` adapts keeps what those say. For this library's own models ``create_model(..., residuals=...)``
    does it, and reaches activations too. On CPUs lean convolutions take this library's forms, depthwise ones as shifted sums.

    Attributes:
      pattern: regular expression searched in the paths of ``nn.LayerNorm``, ``nn.BatchNorm``, ``nn.Conv`` and
        ``nn.MultiHeadDotProductAttention`` (and what is derived from the last). Functions such as ``nn.gelu`` have no path.
      residuals: what they keep: ``"exact"``, ``"lean"``, ``"tiny"`` or a ``Residuals``.

    Raises:
      ValueError: if the pattern is not a regular expression, or there is no such setting.
      TypeError: if ``residuals`` is neither a name nor a ``Residuals``.
    """

    pattern: str
    residuals: str | Residuals = "lean"

    def __post_init__(self):
        _check_pattern(self, self.pattern)
        if self.setting is None:
            raise ValueError(f"Lean({self.pattern!r}): 'plain' changes nothing; leave the rule out")

    @property
    def setting(self) -> Residuals | None:
        """The setting that ``residuals`` names."""
        return named_residuals(self.residuals, f"Lean({self.pattern!r})")


Rule = LowRank | LoRA | Freeze | Lean


def _check_pattern(rule: Any, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        shown = pattern if len(pattern) <= _SHOWN else f"{pattern[:_SHOWN]}..."
        raise ValueError(f"{type(rule).__name__}: {shown!r} is no regular expression: {error}") from None
