"""The methods by their short names on the command line."""

import re
from typing import Any

from lbpwht_jax.spec import LowRankSpec, lp_l1, lp_linf

_SELECTIONS = {"lp_l1": lp_l1, "lp_linf": lp_linf}


def parse_method(method: str, **fields: Any) -> LowRankSpec | None:
    """The spec that a short name stands for.

    Args:
      method: ``"full"`` (exact backpropagation), ``"lp_l1-R"`` or ``"lp_linf-R"`` with an integer R, such as ``"lp_l1-4"``.
      **fields: of the ``LowRankSpec``, such as ``projection``.

    Returns:
      The spec, ``None`` for ``"full"``.

    Raises:
      ValueError: if the name is none of these, or R is out of range.
    """
    if method == "full":
        return None
    match = re.fullmatch(r"(lp_l1|lp_linf)-(\d+)", method)
    if match is None:
        raise ValueError(f"unknown method {method!r}; write full, lp_l1-R or lp_linf-R with an integer R, such as lp_l1-4")
    return _SELECTIONS[match[1]](int(match[2]), **fields)
