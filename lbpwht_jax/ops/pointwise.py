"""What makes a convolution a 1x1 convolution, which is a dense layer on every position."""

from collections.abc import Sequence
from typing import Any


def pointwise_lacks(window: Any, strides: Any, padding: Any, dilations: Sequence[Any], groups: Sequence[int]) -> list[str]:
    """What a convolution lacks to be a 1x1 convolution, in words; nothing if it is one.

    Args:
      window: size of the kernel along the spatial axes: an integer for all of them, or one per axis.
      strides: likewise; ``None`` for 1.
      padding: ``"SAME"``, ``"SAME_LOWER"`` or ``"VALID"``, which add nothing around a window of 1; or the numbers added, as
        an integer, one per axis or a pair per axis.
      dilations: of input and kernel, each as ``strides``.
      groups: of features and batch.
    """
    conditions = {
        "a window of 1": _all_are(1, window),
        "a stride of 1": _all_are(1, strides),
        "no padding": padding in ("SAME", "SAME_LOWER", "VALID") if isinstance(padding, str) else _all_are(0, padding),
        "no dilation": all(_all_are(1, dilation) for dilation in dilations),
        "no groups": all(count == 1 for count in groups),
    }
    return [condition for condition, holds in conditions.items() if not holds]


def _all_are(wanted: int, value: Any) -> bool:
    if isinstance(value, Sequence):
        return all(_all_are(wanted, item) for item in value)
    return value is None or value == wanted
