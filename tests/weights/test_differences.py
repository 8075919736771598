"""- is what the model wants and + what was found, wherever weights are refused."""

import re

import numpy as np
import pytest

from lbpwht_jax.weights.differences import check_same, describe_arrays


def test_nothing_is_said_of_what_is_the_same():
    tree = {"params": {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.ones(2, np.int8)}}
    assert describe_arrays(tree) == {"params.a.kernel": "float32[2, 3]", "params.b": "int8[2]"}
    check_same(describe_arrays(tree), describe_arrays(tree), "never")


def test_every_difference_is_listed():
    with pytest.raises(ValueError, match="file: no") as caught:
        check_same({"a": "[2]", "b": "[3]", "c": "[1]"}, {"d": "[4]", "b": "[5]", "c": "[1]"}, "file: no", "Do this")
    assert str(caught.value).splitlines() == [
        "file: no (- is what the model wants, + is what was found):",
        "1 missing",
        "  - a [2]",
        "1 unexpected",
        "  + d [4]",
        "1 of another shape or dtype",
        "  - b [3]",
        "  + b [5]",
        "Do this",
    ]


def test_long_lists_are_cut():
    with pytest.raises(ValueError) as caught:
        check_same({str(i): "[1]" for i in range(50)}, {}, "file: no")
    message = str(caught.value)
    assert "50 missing\n" in message and message.endswith("  and 30 more lines")
    assert len(re.findall(r"^  - ", message, re.MULTILINE)) == 20
