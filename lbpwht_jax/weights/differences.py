"""Where the arrays that were found are not those that a model wants, as text; the signs mean the same in every message."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

_SHOWN = 20
_SIGNS = "- is what the model wants, + is what was found"


def describe_arrays(tree: Mapping[str, Any]) -> dict[str, str]:
    """Dtype and shape, such as ``"float32[2, 3]"``, of each array in nested dictionaries, by its path joined with dots."""
    flat: dict[str, Any] = traverse_util.flatten_dict(dict(tree), sep=".")
    return {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in flat.items()}


def check_same(wanted: Mapping[str, str], found: Mapping[str, str], problem: str, advice: str = "") -> None:
    """Refuses arrays that are not those wanted.

    Args:
      wanted: descriptions of the model's arrays, by name.
      found: descriptions of the arrays that were found, by name.
      problem: the first line of the message.
      advice: the last line of the message.

    Raises:
      ValueError: if the two differ, with lists of what is missing (``-``), what is unexpected (``+``), and what has another
        description (one line of each); at most 20 lines per list.
    """
    # parameters first: what else differs (an optimiser's moments) mostly follows from them
    wanted, found = (
        dict(sorted(names.items(), key=lambda item: not item[0].startswith("params"))) for names in (wanted, found)
    )
    differing = [name for name in wanted if name in found and wanted[name] != found[name]]
    lists = {
        "missing": [f"- {name} {text}" for name, text in wanted.items() if name not in found],
        "unexpected": [f"+ {name} {text}" for name, text in found.items() if name not in wanted],
        "of another shape or dtype": [
            line for name in differing for line in (f"- {name} {wanted[name]}", f"+ {name} {found[name]}")
        ],
    }
    if not any(lists.values()):
        return
    lines = [f"{problem} ({_SIGNS}):"]
    for title, rows in lists.items():
        if rows:
            lines.append(f"{len({row.split()[1] for row in rows})} {title}")
            lines += [f"  {row}" for row in rows[:_SHOWN]]
        if len(rows) > _SHOWN:
            lines.append(f"  and {len(rows) - _SHOWN} more lines")
    raise ValueError("\n".join([*lines, advice] if advice else lines))
