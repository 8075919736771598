"""Hypothesis strategies for damaged files: flipped bits, cut ends, bytes in the wrong place, JSON edited by hand.

``pytest`` draws a hundred cases of each, always the same ones; ``pytest --hypothesis-profile=hostile`` draws five hundred.
"""

import re
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a file after one to four accidents."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "flip", "flip", "overwrite", "insert", "remove", "cut"])):
            case "flip" if data:
                data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
            case "overwrite":
                new = draw(st.binary(min_size=1, max_size=8))
                data = data[:at] + new + data[at + len(new) :]
            case "insert":
                data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
            case "remove":
                data = data[:at] + data[at + draw(st.integers(1, 16)) :]
            case "cut":
                data = data[:at]
    return data


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        value = draw(_edited_once(value))
    return value


@st.composite
def _edited_once(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not draw(st.integers(0, 9)):
        return draw(JSON)
    parts = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    key = draw(st.sampled_from([*parts, None]))
    if key is None:
        parts[draw(st.text(max_size=8)) if isinstance(value, dict) else len(parts)] = draw(JSON)
    elif draw(st.booleans()):
        parts[key] = draw(_edited_once(parts[key]))
    else:
        del parts[key]
    return parts if isinstance(value, dict) else list(parts.values())


def assert_says(error: Exception, name: str = "") -> None:
    """Checks that an error says something, names the file, and shows no object by its address."""
    text = str(error)
    assert text and name in text, text
    assert not re.search(r" at 0x[0-9a-f]+", text), text
